"""Edits of JSON objects as text: fields of the top level are set or removed, all other characters stay as they are.

In: the text of a JSON object. Out: the edited text. Parsing and writing the object again would change numbers, escapes,
white space and the order of repeated fields, which the gateway must pass on as it received them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from typing import Any, Final

REMOVED: Final = object()  # as the value of a change: the field is removed
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Field:
    """A field of the object: its name, and positions of its parts in the text.

    `start` and `end` are those of the text between two commas, `value` and `value_end` those of the value.
    """

    name: str
    start: int
    value: int
    value_end: int
    end: int


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """`text` with every field of `changes` set to its value, or removed if the value is REMOVED.

    Fields that the object lacks are added at its end. If a field occurs several times, every occurrence changes. Raises
    ValueError if `text` is not one JSON object.
    """
    fields, opened, closed = _fields(text)
    kept = []
    for field in fields:
        if field.name not in changes:
            kept.append(text[field.start : field.end])
        elif changes[field.name] is not REMOVED:
            new = json.dumps(changes[field.name])
            kept.append(text[field.start : field.value] + new + text[field.value_end : field.end])
    known = {field.name for field in fields}
    kept += [
        f"{json.dumps(name)}:{json.dumps(value)}"
        for name, value in changes.items()
        if name not in known and value is not REMOVED
    ]
    inside = ",".join(kept) if fields or kept else text[opened:closed]
    return text[:opened] + inside + text[closed:]


def value_of(text: str, name: str) -> Any:
    """The value of a field, the last one if it occurs several times; None if there is none.

    Raises ValueError if `text` is not one JSON object.
    """
    found = [field for field in _fields(text)[0] if field.name == name]
    return json.loads(text[found[-1].value : found[-1].value_end]) if found else None


def _fields(text: str) -> tuple[list[Field], int, int]:
    """The fields of the object, and the positions after its opening and at its closing brace."""
    opened = _expect(text, _space(text, 0), "{")
    fields: list[Field] = []
    at = _space(text, opened)
    if text[at : at + 1] != "}":
        start = opened
        while True:
            at = _space(text, start)
            _expect(text, at, '"')
            name, at = _DECODER.raw_decode(text, at)
            value = _space(text, _expect(text, _space(text, at), ":"))
            _, value_end = _DECODER.raw_decode(text, value)
            at = _space(text, value_end)
            fields.append(Field(name, start, value, value_end, at))
            if text[at : at + 1] != ",":
                break
            start = at + 1
    closed = _expect(text, at, "}") - 1
    if _space(text, closed + 1) != len(text):
        raise JSONDecodeError("Extra data", text, closed + 1)
    return fields, opened, closed


def _space(text: str, at: int) -> int:
    """The position of the next character that is not white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    """The position after `character`. Raises ValueError if it does not stand at `at`."""
    if text[at : at + 1] != character:
        raise JSONDecodeError(f"Expecting {character!r}", text, at)
    return at + 1
