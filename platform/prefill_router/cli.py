"""The command line of every program: options, dry run, format of the lines, record of the run, and exit codes.

In: a `FrozenModel` class, whose fields are the options (`prefill_router.options`), and a function from it to a one-line
summary. `--dry-run` prints what a program reads and would write (`prefill_router.dry_run`), `--log-format json` makes
every line an object (`prefill_router.logs`), and a program that wrote a folder leaves a `run.json` there
(`prefill_router.run_record`). Exit codes: 0 success, 1 failure (one line if a server does not answer, otherwise a
traceback), 2 invalid usage or input (one line). Knows nothing of the programs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from prefill_router import logs
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError
from prefill_router.options import module_name, parse, parse_known, read_options

__all__ = ["main", "main_known", "parse", "parse_known"]

Config = TypeVar("Config", bound=FrozenModel)


def main(
    kind: type[Config],
    run: Callable[[Config], str],
    argv: Sequence[str] | None = None,
    *,
    plan: Callable[[Config], Iterable[str]] | None = None,
    then: str | None = None,
) -> NoReturn:
    """Parses the command line into `kind`, calls `run`, prints its summary as the last line, and exits.

    The docstring of `run` is the description in the help. `argv` defaults to the arguments of the process.

    With `--dry-run` it calls `plan` instead, whose lines say what the job would do and what that costs. `plan` reads
    the inputs as `run` does, so that both raise the same errors; it writes nothing, starts no cluster and asks no
    provider. `then` is the next command for `run.json`, in which `{output}` is the output folder.
    """

    def call(name: str, arguments: Sequence[str]) -> str:
        config, _, own = read_options(kind, run.__doc__ or "", arguments, name, forward=False)
        if own.dry_run:
            return _dry_run(name, config, plan)
        started = time.time()
        try:
            summary = run(config)
        except InputError:
            raise
        except SystemExit as end:
            # A text and 1 are verdicts, such as alerts, whose files are complete. Ray exits with 15 after SIGTERM.
            verdict = isinstance(end.code, str) or end.code == 1
            _record(name, config, arguments, f"ended with {end.code}", started, then if verdict else None, not verdict)
            raise
        except BaseException as error:  # an interrupt too: every end is recorded, then raised again
            last = str(error).strip().splitlines()[-1:]  # errors of Ray begin with a traceback
            with suppress(Exception):  # the error of the run is the one to report
                _record(name, config, arguments, ": ".join([type(error).__name__, *last]), started, None, failed=True)
            raise
        _record(name, config, arguments, summary, started, then)
        return summary

    _exit(call, argv)


def main_known(
    kind: type[Config], run: Callable[[Config, list[str]], str], argv: Sequence[str] | None = None
) -> NoReturn:
    """As `main`, for a program that forwards unknown arguments: `run` receives them as its second argument."""

    def call(name: str, arguments: Sequence[str]) -> str:
        config, rest, own = read_options(kind, run.__doc__ or "", arguments, name, forward=True)
        return _dry_run(name, config, None) if own.dry_run else run(config, rest)

    _exit(call, argv)


def _exit(call: Callable[[str, Sequence[str]], str], argv: Sequence[str] | None) -> NoReturn:
    name = "job" if argv is not None else (module_name() or Path(sys.argv[0]).stem).rpartition(".")[2]
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns after a fork
    try:
        wanted = logs.log_format(_given_format(arguments))
    except InputError as error:
        logs.say_error(name, error)
        sys.exit(2)
    with logs.structured(name, wanted):
        sys.exit(_ended(name, partial(call, name, arguments)))


def _given_format(arguments: Sequence[str]) -> str | None:
    """The value of --log-format, before the other options are read: their errors have the format too."""
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scanner.add_argument("--log-format", "--log_format", nargs="?")
    known, _ = scanner.parse_known_args(list(arguments))
    return known.log_format if known.log_format in logs.FORMATS else None  # another value is refused with the options


def _ended(name: str, call: Callable[[], str]) -> int:
    """Calls the program, prints its summary or its error, and returns the exit code."""
    try:
        summary = call()
    except (InputError, UnavailableError) as error:
        logs.say_error(name, error)
        return 2 if isinstance(error, InputError) else 1
    except SystemExit as end:
        if not logs.is_structured() or not isinstance(end.code, str):
            raise
        logs.say(end.code.removeprefix(f"{name}: "), "error", sys.stderr)
        return 1
    except Exception as error:
        if (full := _full_disk(error)) is not None:
            logs.say_error(name, full)
            return 1
        if not logs.is_structured():
            raise
        logs.say_error(name, error, details=True)
        return 1
    if logs.is_structured():
        logs.say(summary, summary=True)
    else:
        print(f"{name}: {summary}", flush=True)
    return 0


def _full_disk(error: Exception) -> UnavailableError | None:
    """The error of a library or a process that met a full disk, as one line; None for any other error."""
    from prefill_router.files import is_full

    if not is_full(error):
        return None
    last = str(error).strip().splitlines()[-1][:200]
    return UnavailableError(f"a disk is full ({last}); free space and run the same command again")


def _dry_run(name: str, config: FrozenModel, plan: Callable[[Any], Iterable[str]] | None) -> str:
    """Prints what the program reads and would write, then the lines of its plan. Returns the summary."""
    from prefill_router.dry_run import report

    # the plan first: its errors are those of the run
    planned = ["costs nothing but the time of this machine"] if plan is None else list(plan(config))
    for line in [*report(config), *planned]:
        logs.say(f"{name}: {line}" if not logs.is_structured() else line)
    return "dry run: nothing was written, started or asked"


def _record(
    name: str,
    config: FrozenModel,
    arguments: Sequence[str],
    summary: str,
    started: float,
    then: str | None,
    failed: bool = False,
) -> None:
    """Writes run.json into the output folder, if there is one.

    If that fails, it warns after a success and says nothing after a failure.
    """
    output = getattr(config, "output", None)
    if not isinstance(output, Path):
        return
    from prefill_router.run_record import write_record

    program = f"python -m {module_name() or name}"
    try:
        write_record(output, name, program, arguments, config, summary, started, then, failed)
    except (OSError, UnavailableError) as error:
        if not failed:
            logs.say(f"{name}: warning: {output / 'run.json'} cannot be written ({error})", file=sys.stderr)
