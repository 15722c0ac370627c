"""One run of bubblewrap: its start, a watch over what its processes use, and their end.

In: a command with limits, variables and a user. Out: output, exit code and the limit that has stopped the command. The
kernel holds the limits on files, and those of each process. Output is counted here; memory and the number of files are
measured from outside, every 50 milliseconds.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Literal

from prefill_router.collect.bubblewrap import SCRATCH, Limits, find_bwrap, options, starter
from prefill_router.collect.scratch import FOLDER
from prefill_router.collect.seccomp import seccomp_filter
from prefill_router.errors import InputError

Reason = Literal["time", "memory", "output", "files"]
PERIOD = 0.05  # seconds between two measurements
START = 60.0  # seconds within which bwrap must be ready
CHUNK = 65536
PAGE = os.sysconf("SC_PAGE_SIZE")


class SandboxProcess:
    """A sandbox whose command waits until `watch`. The end of the block ends all of its processes.

    folder: descriptor of the scratch folder, valid until the end of the block. output: what the command has written.
    """

    def __init__(
        self, command: Sequence[str], limits: Limits, environment: Mapping[str, str], folder: str, user: int | None
    ) -> None:
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        self._open = ExitStack()
        self._first: int | None = None  # descriptor of the first process in the sandbox
        self._returncode: int | None = None
        words = [*starter(limits, folder, user), *command]
        self._process, info = _start(options(limits, environment, user), words)
        try:
            with info:
                self._watch_from_outside(info)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> SandboxProcess:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        finally:
            self._open.close()

    def _watch_from_outside(self, info: IO[bytes]) -> None:
        if not self._ready():
            self._process.kill()
            raise InputError(_why(self._pipe("stderr").read().decode(errors="replace")))
        first = json.loads(info.read())["child-pid"]
        root = f"/proc/{first}/root"
        try:
            self._first = self._opened(os.pidfd_open(first))
            self.folder = self._opened(os.open(root + SCRATCH, FOLDER))
            self._shared = self._opened(os.open(root + "/dev/shm", FOLDER))
            self._processes = self._opened(os.open(root + "/proc", FOLDER))
            # If the machine runs out of memory, the kernel ends the program and not the caller.
            for number in self._numbers():
                _write_to(f"{number}/oom_score_adj", b"1000", self._processes)
        except OSError as error:
            raise InputError(f"the sandbox cannot be watched: {error}; mount /proc without hidepid") from None

    def _pipe(self, name: str) -> IO[bytes]:
        found = getattr(self._process, name)
        assert found is not None
        return found

    def _opened(self, descriptor: int) -> int:
        self._open.callback(os.close, descriptor)
        return descriptor

    def _ready(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe("stdout"), selectors.EVENT_READ)
            return bool(selector.select(START)) and self._pipe("stdout").read(1) == b"."

    def watch(self, stdin: bytes, limits: Limits) -> Reason | None:
        """Give the command its input and collect its output until it ends, or until the limit that is returned."""
        pending = memoryview(b"\n" + stdin)  # the line that the sandbox waits for
        began = checked = time.monotonic()
        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            ended = os.pidfd_open(self._process.pid)
            stack.callback(os.close, ended)
            selector.register(ended, selectors.EVENT_READ, "end")
            for name in self.output:
                selector.register(self._pipe(name), selectors.EVENT_READ, name)
            os.set_blocking(self._pipe("stdin").fileno(), False)
            selector.register(self._pipe("stdin"), selectors.EVENT_WRITE, "stdin")
            while True:
                now = time.monotonic()
                if now - began >= limits.seconds:
                    return "time"
                if now - checked >= PERIOD:
                    checked = now
                    reason = self._excess(limits)
                    if reason is not None:
                        return reason
                events = selector.select(min(PERIOD, began + limits.seconds - now))
                for key, _ in events:
                    if key.data == "stdin":
                        try:
                            pending = pending[os.write(key.fd, pending[:CHUNK]) :]
                        except BrokenPipeError:
                            pending = pending[:0]
                        if not pending:
                            selector.unregister(key.fileobj)
                            self._pipe("stdin").close()
                    elif key.data != "end":
                        chunk = os.read(key.fd, CHUNK)
                        self.output[key.data] += chunk
                        if not chunk:
                            selector.unregister(key.fileobj)
                if self.overflow(limits):
                    return "output"
                if any(key.data == "end" for key, _ in events):
                    return None

    def overflow(self, limits: Limits) -> Reason | None:
        """`output` if more of it has come than the limit."""
        return "output" if any(len(found) > limits.output_bytes for found in self.output.values()) else None

    def end(self) -> int:
        """End all processes, wait until they are gone, read the rest of their output, and return the exit code."""
        if self._returncode is not None:
            return self._returncode
        if self._first is None:
            self._process.kill()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            # The kernel ends all processes of a pid namespace ahead of the first one.
            with selectors.DefaultSelector() as selector:
                selector.register(self._first, selectors.EVENT_READ)
                selector.select()
        self._returncode = self._process.wait()
        if self._returncode < 0:
            self._returncode = 128 - self._returncode
        for name, found in self.output.items():
            if self._first is not None:
                found += self._pipe(name).read()  # at most what a pipe holds
        for name in ("stdin", *self.output):
            self._pipe(name).close()
        return self._returncode

    def _excess(self, limits: Limits) -> Reason | None:
        for folder in (self.folder, self._shared):
            found = os.fstatvfs(folder)
            if found.f_files - found.f_ffree > limits.files:
                return "files"
        numbers = self._numbers()
        if sum(self._resident(one) for one in numbers) <= limits.memory_bytes:
            return None
        # Processes share pages after a fork. The second measurement divides each page among its owners.
        return "memory" if sum(self._proportional(one) for one in numbers) > limits.memory_bytes else None

    def _numbers(self) -> list[str]:
        return [name for name in os.listdir(self._processes) if name.isdigit()]

    def _resident(self, number: str) -> int:
        try:
            return int(_read_from(f"{number}/statm", self._processes).split()[1]) * PAGE
        except (OSError, IndexError):  # it has ended
            return 0

    def _proportional(self, number: str) -> int:
        try:
            lines = _read_from(f"{number}/smaps_rollup", self._processes).splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:"))
        except (OSError, StopIteration):
            return self._resident(number)


def _start(given: Sequence[str], words: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """bwrap with its options and the command, and where it tells the number of its first process."""
    told, tell = os.pipe()
    inherited = [_memory("\0".join([*given, ""]).encode()), _memory(seccomp_filter()), tell]
    arguments, seccomp, _ = map(str, inherited)
    try:
        process = subprocess.Popen(
            [find_bwrap(), "--args", arguments, "--seccomp", seccomp, "--info-fd", str(tell), "--", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={},
            pass_fds=inherited,
        )
    except OSError as error:
        os.close(told)
        raise InputError(f"the command cannot be started ({error.strerror}); pass long texts as files") from None
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    return process, os.fdopen(told, "rb")


def _why(message: str) -> str:
    """The error of a sandbox that does not start."""
    line = message.strip().splitlines()[-1] if message.strip() else "bwrap says nothing"
    return (
        f"bubblewrap cannot start a sandbox: {line[:300]}; the host must allow namespaces, see docs/sandbox.md: on "
        "Ubuntu an AppArmor profile for bwrap, in a container the option --privileged"
    )


def _memory(content: bytes) -> int:
    """The descriptor of an unnamed file with this content, at its start."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read_from(path: str, folder: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        return file.read()


def _write_to(path: str, content: bytes, folder: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder), "wb", buffering=0) as file:
        file.write(content)
