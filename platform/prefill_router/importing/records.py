"""Reading of JSON files record by record, and typed fields of a record with errors that name file, record and field.

In: files of JSON lines or JSON arrays. Out: `Record`. Knows no format of evaluations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_router.errors import InputError
from prefill_router.files import read_json

BOOLEANS = {"true": 1, "false": 0}


@dataclass(frozen=True)
class Record:
    """One object of a file. `place` names it in errors: the file, and the line or the position."""

    values: Mapping[str, Any]
    place: str

    def get(self, *names: str) -> Any:
        """The value of the first of `names` that the record has. Raises InputError if it has none of them."""
        for name in names:
            if name in self.values:
                return self.values[name]
        raise InputError(f"{self.place}: no field {names[0]!r}; its fields are {', '.join(self.values) or 'none'}")

    def text(self, *names: str) -> str:
        """A value as text; numbers are converted. Raises InputError for null, lists and objects."""
        value = self.get(*names)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise InputError(f"{self.place}: {names[0]!r} must be text, it is {_shown(value)}")

    def number(self, name: str) -> float | None:
        """A number; None if the field is missing, null or NaN. Raises InputError for other values."""
        value: Any = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            value = BOOLEANS.get(value.strip().lower(), value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"{self.place}: {name!r} must be a number, true or false, it is {_shown(value)}; convert it"
            ) from None
        return None if math.isnan(number) else number

    def count(self, name: str) -> int | None:
        """A number of tokens; None if the field is missing or null. Raises InputError for one beyond int32."""
        number = self.number(name)
        if number is not None and not 0 <= number < 2**31:
            raise InputError(f"{self.place}: {name!r} must be from 0 to {2**31 - 1:,}, it is {number:g}")
        return None if number is None else round(number)

    def part(self, name: str) -> Record:
        """The object in a field, empty if the field is missing or null. Raises InputError for other values."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"{self.place}: {name!r} must be an object, it is {_shown(value)}")
        return Record(value, f"{self.place}, {name}")


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines, or of a file with one JSON array. Raises InputError for other content."""
    try:
        file = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first == "[":
                yield from json_array(path)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(json.loads(line), f"{path}, line {number}")
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise InputError(f"{path}: not valid JSON lines ({str(error)[:200]})") from None


def json_array(path: Path) -> Iterator[Record]:
    """The objects of a file with one JSON array. Raises InputError for other content."""
    given = read_json(path)
    if not isinstance(given, list):
        raise InputError(f"{path}: expected a JSON array, got {_shown(given)}")
    for number, value in enumerate(given):
        yield _record(value, f"{path}, record {number}")


def json_object(path: Path) -> Record:
    """The object of a JSON file. Raises InputError for other content."""
    return _record(read_json(path), str(path))


def beginning(path: Path, size: int = 4096) -> str:
    """The first characters of a file, for the detection of its format; empty if it is no text."""
    try:
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", "ignore")
    except OSError:
        return ""


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected an object, got {_shown(value)}")
    return Record(value, place)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
