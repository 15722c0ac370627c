"""GPUs, ports and disks of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prefill_router.doctor.finding import Finding
from prefill_router.files import cache_folder

PORTS = (
    (8000, "python -m serve", "give serve another --port"),
    (8265, "Ray's dashboard", "ray start --dashboard-port N"),
)
GIB = 2**30
FULL = 0.95  # share of a disk from which Ray refuses to write objects
RAY_TEMP, SHARED_MEMORY = Path("/tmp/ray"), Path("/dev/shm")


def gpus() -> Iterator[Finding]:
    """The GPUs that torch sees; a warning if the driver has some that torch does not see."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        available = torch.cuda.is_available()
        names = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if available else 0)
        ]
    if names:
        shown = ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in names)
        yield Finding("ok", "gpu", f"{len(names)}: {shown}; torch for CUDA {torch.version.cuda}")
        return
    driver = _driver()
    if driver is None:
        yield Finding("ok", "gpu", "none; encoders run on the CPU")
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("warning", "gpu", f"driver {driver}, hidden by CUDA_VISIBLE_DEVICES", "unset it")
        return
    reason = "; ".join(" ".join(str(one.message).split())[:200] for one in caught)
    built = torch.version.cuda
    detail = f"driver {driver}, but torch sees no GPU: "
    detail += (
        "it is a CPU build" if built is None else f"it is built for CUDA {built}{f' ({reason})' if reason else ''}"
    )
    way_out = "install torch's CUDA build" if built is None else "update the driver, or install torch for its CUDA"
    yield Finding("warning", "gpu", detail, way_out)


def ports(wanted: Sequence[tuple[int, str, str]] = PORTS) -> Iterator[Finding]:
    """Whether each (port, user, way out) is free on 127.0.0.1, and which process holds it."""
    for port, user, way_out in wanted:
        if is_free(port):
            yield Finding("ok", f"port {port}", f"free for {user}")
        else:
            yield Finding("warning", f"port {port}", f"in use by {holder(port)}", f"stop it, or {way_out}")


def disks(runs: Path) -> Iterator[Finding]:
    """Free space where outputs, caches, shared memory and Ray's files are."""
    for name, folder, low, few in (
        ("disk runs", runs, 5.0, 0.5),
        ("disk cache", cache_folder(), 2.0, 0.2),
        ("disk shared", SHARED_MEMORY, 1.0, 0.0),
        ("disk ray", RAY_TEMP, 2.0, 0.2),
    ):
        yield _disk(name, folder, low, few)


def is_free(port: int) -> bool:
    """Whether a server can listen on the port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """`pid 12 (python -m serve)` of the process that listens on a port, or `another process` if it cannot be seen."""
    sockets = _listening(port)
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):
            if any(os.readlink(one) in sockets for one in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({command[:60]})"
    return "another process"


def _listening(port: int) -> set[str]:
    """The sockets that listen on a port, as the links in /proc/PID/fd name them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _disk(name: str, folder: Path, low: float, few: float) -> Finding:
    """`low` and `few` are GiB below which the free space is a warning and an error."""
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        return Finding("error", name, f"{folder}: {above} is not a folder", "move the file away")
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding("error", name, f"{folder}: cannot be written by this user", "change its owner, or use another")
    usage = shutil.disk_usage(above)
    free, detail = usage.free / GIB, f"{folder}: {usage.free / GIB:,.1f} GiB free"
    if free < few:
        return Finding("error", name, detail, "free some space")
    if folder == RAY_TEMP and usage.used > FULL * usage.total:
        return Finding(
            "warning", name, f"{detail}, {usage.used / usage.total:.0%} full", "free space: Ray stops at 95 %"
        )
    if free < low:
        more = "Ray puts objects on disk, which is slower" if folder == SHARED_MEMORY else "long jobs may fill it"
        return Finding("warning", name, f"{detail}; {more}", "give it more space")
    return Finding("ok", name, detail)


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        return said[0] if said else None
    return "of unknown version" if Path("/dev/nvidia0").exists() else None
