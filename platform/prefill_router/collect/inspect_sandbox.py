"""The sandbox as a provider of inspect_ai: `sandbox="bubblewrap"` of a task, once this module is imported.

Every sample has a scratch folder, which is /tmp and the working directory of its commands. It lives in memory from the
first command to the end of the sample. No process outlives its command, so that servers and tools of inspect_ai that
run in the background do not work. Files are read and written by commands in the sandbox, where links lead to files of
the sandbox.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Any, Literal, overload

import anyio
from anyio import to_thread
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    concurrency,
    sandboxenv,
)
from pydantic import BaseModel, Field

from prefill_router.collect.bubblewrap import SCRATCH
from prefill_router.collect.sandbox import Finished, Limits, Scratch, check_host, run
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError

WRITE = 'if [ -d "$1" ]; then echo "Is a directory" >&2; exit 1; fi; mkdir -p -- "${1%/*}" && cat > "$1"'
KILLED = 137  # exit code of a command that SIGKILL has ended
# Words of the C library's messages, in the sandbox's language.
FAULTS: dict[str, type[OSError]] = {
    "No such file": FileNotFoundError,
    "Not a directory": FileNotFoundError,
    "Is a directory": IsADirectoryError,
    "Permission denied": PermissionError,
    "Read-only file system": PermissionError,
}


class SandboxConfig(FrozenModel):
    """Limits of each command. Output has the limits of inspect_ai."""

    seconds: Annotated[float, Field(gt=0, description="time of a command that has no timeout of its own")] = 60.0
    memory_bytes: Annotated[int, Field(gt=0, description="of all processes together")] = 512 * 2**20
    processes: Annotated[int, Field(gt=0, description="number of processes and threads")] = 64
    file_bytes: Annotated[int, Field(gt=0, description="of all files of a sample")] = 64 * 2**20
    files: Annotated[int, Field(gt=0, description="number of files of a sample")] = 10_000


@sandboxenv(name="bubblewrap")
class BubblewrapSandbox(SandboxEnvironment):
    """The sandbox of one sample. Its commands run one after the other."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        super().__init__()
        self.config = config or SandboxConfig()
        self.scratch = Scratch()
        self._turn = anyio.Lock()

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        """Raise InputError, with what to do, if this machine cannot run a sandbox."""
        await to_thread.run_sync(check_host)

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """An empty sandbox. Raises InputError for a configuration that is no SandboxConfig."""
        if not isinstance(config, SandboxConfig | None):
            raise InputError(f"sandbox bubblewrap: its configuration must be a SandboxConfig, it is {config!r:.80}")
        return {"default": cls(config)}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """Forget the files. There are no processes between two commands."""
        for environment in environments.values():
            environment.as_type(BubblewrapSandbox).scratch = Scratch()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """The configuration that a log holds."""
        return SandboxConfig(**config)

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command. One that takes too much memory or too many files has exit code 137, with the reason in stderr.

        Raises TimeoutError, OutputLimitExceededError, PermissionError for a command that is no program, and
        SandboxUserUnsupportedError for any user.
        """
        if user is not None:
            raise SandboxUserUnsupportedError(
                f"commands in bubblewrap run as one user, not as {user!r}; leave user out"
            )
        most = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        done = await self._run(cmd, input or b"", most, _path(cwd or SCRATCH), env, timeout, concurrency)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if done.stopped == "output":
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, out or err)
        if done.returncode is None:
            return ExecResult(False, KILLED, out, f"{err}\nkilled: beyond the limit of {done.stopped}")
        if done.returncode == 126 and "Permission denied" in err:
            raise PermissionError(err.strip())
        return ExecResult(done.returncode == 0, done.returncode, out, err)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file, and folders above it. Raises PermissionError, IsADirectoryError and OSError."""
        done = await self._run(["/bin/sh", "-c", WRITE, "sh", _path(file)], contents)
        _check(done, file)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """The content of a file. Raises OSError, OutputLimitExceededError, and UnicodeDecodeError for text."""
        done = await self._run(["cat", "--", _path(file)], b"", SandboxEnvironmentLimits.MAX_READ_FILE_SIZE)
        if done.stopped == "output":
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        _check(done, file)
        return done.stdout.decode() if text else done.stdout

    async def _run(
        self,
        command: list[str],
        stdin: str | bytes,
        output_bytes: int = 2**20,
        folder: str = SCRATCH,
        environment: dict[str, str] | None = None,
        timeout: int | None = None,
        throttled: bool = True,
    ) -> Finished:
        config = self.config
        limits = Limits(
            seconds=float(timeout or config.seconds),
            memory_bytes=config.memory_bytes,
            processes=config.processes,
            output_bytes=output_bytes,
            file_bytes=config.file_bytes,
            files=config.files,
        )
        given = stdin.encode() if isinstance(stdin, str) else stdin
        call = partial(run, command, None, given, limits, environment=environment, folder=folder, scratch=self.scratch)
        async with self._turn:
            if throttled:
                async with concurrency("bubblewrap", os.cpu_count() or 1):
                    done = await to_thread.run_sync(call)
            else:
                done = await to_thread.run_sync(call)
        if done.stopped == "time":
            raise TimeoutError(f"{command[0]} took longer than {limits.seconds:g} s")
        return done


def _path(name: str) -> str:
    return name if name.startswith("/") else f"{SCRATCH}/{name}"


def _check(done: Finished, file: str) -> None:
    if done.returncode == 0:
        return
    message = done.stderr.decode(errors="replace").strip()
    for words, fault in FAULTS.items():
        if words in message:
            raise fault(f"{file}: {words}" + ("" if fault is not FileNotFoundError else " or directory"))
    raise OSError(f"{file}: {message or f'stopped by the limit of {done.stopped}'}")
