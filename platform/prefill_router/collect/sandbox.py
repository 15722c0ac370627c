"""A sandbox for programs that models have written, on Linux, without docker and with or without root.

In: a command and the files of its working directory. Out: its exit code and its output. A program sees a read-only
/usr and the Python interpreter, no network, no other process, and none of the caller's files and environment variables.
It can write to a scratch folder in memory. bubblewrap makes the namespaces; docs/sandbox.md says what is not held.

Several threads can call `run` at the same time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefill_router.collect import scratch as folders
from prefill_router.collect.bubblewrap import SCRATCH, Limits, free_user, python
from prefill_router.collect.sandbox_process import Reason, SandboxProcess
from prefill_router.collect.scratch import Scratch, TooLargeError, entries_of
from prefill_router.errors import InputError

__all__ = ["Finished", "Limits", "Scratch", "check_host", "python", "run"]

DEFAULTS = Limits()


@dataclass(frozen=True)
class Finished:
    """A command that has ended, or that a limit has stopped.

    returncode: of a command that a signal has ended, 128 + the signal's number; None if it was stopped. stdout, stderr:
    at most `output_bytes` each. seconds: wall-clock time, without the start of the sandbox. stopped: the limit.
    """

    returncode: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    stopped: Reason | None = None


def run(
    command: Sequence[str],
    files: Mapping[str, bytes | str] | None = None,
    stdin: bytes = b"",
    limits: Limits = DEFAULTS,
    *,
    environment: Mapping[str, str] | None = None,
    folder: str = SCRATCH,
    scratch: Scratch | None = None,
) -> Finished:
    """Run a command in a sandbox of its own; `files` are in its scratch folder, which is the working directory.

    The first word of the command is looked up in the sandbox's PATH; `[*python(), "main.py"]` runs a Python file. All
    processes that the command has started end with it. `environment`: variables besides PATH, HOME and LANG. `folder`:
    another working directory, a path in the sandbox. `scratch`: a folder that lives over several commands; this one
    reads it and replaces its content, unless a limit on files stops it.

    Raises InputError if the host has no bubblewrap or forbids namespaces, and for invalid arguments.
    """
    if not command:
        raise InputError("command: must have at least one word")
    variables = dict(environment or {})
    for word in (*command, folder, *variables, *variables.values()):
        if "\0" in word:
            raise InputError(f"command: a word must not contain a null character, got {word[:60]!r}")
    entries = (scratch.entries if scratch else {}) | entries_of(files or {})
    with free_user() as user, SandboxProcess(command, limits, variables, folder, user) as sandbox:
        try:
            folders.write(sandbox.folder, entries, user)
        except OSError as error:
            size = sum(len(entry.content or b"") for entry in entries.values())
            raise InputError(
                f"files: {len(entries)} with {size:,} bytes do not fit into file_bytes={limits.file_bytes:,} "
                f"({error.strerror})"
            ) from None
        began = time.monotonic()
        stopped = sandbox.watch(stdin, limits)
        returncode = sandbox.end()
        seconds = time.monotonic() - began
        stopped = stopped or sandbox.overflow(limits)
        if stopped is None and returncode == 128 + signal.SIGXCPU:
            stopped = "time"
        if scratch is not None and stopped != "files":
            try:
                scratch.entries = folders.read(sandbox.folder, limits.file_bytes, limits.files)
            except TooLargeError:
                stopped = "files"
        out, err = (bytes(sandbox.output[stream][: limits.output_bytes]) for stream in ("stdout", "stderr"))
    return Finished(returncode if stopped is None else None, out, err, seconds, stopped)


def check_host() -> None:
    """Raise InputError, with what to do, if this machine cannot run a sandbox."""
    run(["true"])
