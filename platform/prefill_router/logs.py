"""What a job prints: lines of text, or one JSON object per line (`--log-format json`).

In: text and fields, from `say`, from anything that writes to standard output or standard error in Python, from the
module logging and from warnings. Out, in the format json: objects with `time` (ISO 8601, UTC), `level` (debug, info,
warning, error), `job`, `message` and further fields, on the stream that the text would have gone to. Knows nothing of
what the jobs do.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import RLock
from typing import Any

from prefill_router.errors import InputError

FORMATS = ("text", "json")
VARIABLE = "PREFILL_ROUTER_LOG_FORMAT"
LEVELS = ("warning", "error")  # a line of text that begins with one of these and a colon has this level


def log_format(given: str | None) -> str:
    """The format of the option, otherwise of PREFILL_ROUTER_LOG_FORMAT, otherwise `text`. Raises InputError."""
    value, name = (given, "--log-format") if given is not None else (os.environ.get(VARIABLE) or "text", VARIABLE)
    if value not in FORMATS:
        raise InputError(f"{name}: got {value!r}, allowed are {', '.join(FORMATS)}")
    return value


def say(message: str, level: str = "info", file: Any = None, **fields: Any) -> None:
    """Prints a line to the text stream `file`: `message`, or an object with `message` and `fields`.

    `file` is standard output by default. `fields` are only in the object, so `message` names the same figures.
    """
    file = file or sys.stdout
    if isinstance(file, JsonLines):
        file.emit(message, level, **fields)
    else:
        print(message, file=file, flush=True)


@contextmanager
def structured(job: str, wanted: str) -> Iterator[None]:
    """Within the context all lines of this process have the format `wanted`. The streams are restored at the end.

    Child processes print text: the variable is for this process alone.
    """
    os.environ.pop(VARIABLE, None)
    if wanted == "text":
        yield
        return
    before = sys.stdout, sys.stderr, warnings.showwarning
    sys.stdout, sys.stderr = out, err = JsonLines(job, before[0]), JsonLines(job, before[1])
    root, handler = logging.getLogger(), _Handler(logging.WARNING)
    root.addHandler(handler)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        root.removeHandler(handler)
        out.close()
        err.close()
        sys.stdout, sys.stderr, warnings.showwarning = before


def say_error(name: str, error: BaseException, details: bool = False) -> None:
    """Prints `NAME: error: REASON` to standard error; `details` adds the traceback as a field."""
    reason = " ".join(str(error).split())
    if isinstance(sys.stderr, JsonLines):
        fields = {"traceback": "".join(traceback.format_exception(error))} if details else {}
        sys.stderr.emit(f"{type(error).__name__}: {reason}" if details else reason, "error", **fields)
    else:
        print(f"{name}: error: {reason}", file=sys.stderr)


def is_structured() -> bool:
    """Whether this process prints objects."""
    return isinstance(sys.stderr, JsonLines)


class JsonLines(io.TextIOBase):
    """A text stream whose lines become objects on the stream `file`. Blank lines are left out.

    A carriage return ends a line too, as in progress bars. The name of the job at the beginning of a line is left out.
    """

    def __init__(self, job: str, file: Any) -> None:
        self._job = job
        self._file = file
        self._open = ""  # the line without its end
        self._lock = RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._open = (self._open + text).replace("\r", "\n").split("\n")
            for line in lines:
                self._line(line)
        return len(text)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Does nothing: a line is printed when it ends."""

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def close(self) -> None:
        """Prints a last line without an end. The stream below stays open."""
        with self._lock:
            self._line(self._open)
            self._open = ""

    def emit(self, message: str, level: str = "info", **fields: Any) -> None:
        """Prints an object. Numbers that JSON does not have become null."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        value = {"time": moment, "level": level, "job": self._job, "message": message, **fields}
        try:
            text = json.dumps(value, allow_nan=False, default=str)
        except ValueError:
            text = json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))
        with self._lock:
            self._file.write(f"{text}\n")
            self._file.flush()

    def _line(self, line: str) -> None:
        message = line.strip()
        message = message.removeprefix(f"{self._job}: ")
        if message:
            level = next((name for name in LEVELS if message.lower().startswith(f"{name}: ")), "info")
            self.emit(message if level == "info" else message[len(level) + 2 :], level)


class _Handler(logging.Handler):
    """Records of the module logging, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
        say(record.getMessage(), level, sys.stderr, **fields)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """As `warnings.showwarning`."""
    say(" ".join(str(message).split()), "warning", sys.stderr, category=category.__name__, at=f"{filename}:{lineno}")
