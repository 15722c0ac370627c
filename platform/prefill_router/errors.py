"""Exceptions for invalid input and for servers that do not answer.

InputError: jobs end with exit code 2, the server answers 4xx. UnavailableError: jobs end with exit code 1 and one line,
the server answers 503. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from pydantic import ValidationError


class InputError(ValueError):
    """Invalid input. The message is one line: the field, the value received, what is allowed, and how to fix it.

    A line break in it becomes a blank; other characters that cannot be printed are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class UnavailableError(RuntimeError):
    """Another server does not answer or fails, or a disk is full. A later attempt may succeed."""


def _printable(text: str) -> str:
    def one(char: str) -> str:
        return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")

    return "".join(char if char.isprintable() else one(char) for char in text)


def one_line(error: ValidationError) -> str:
    """A pydantic error as one line: `field.path: message (got VALUE)` per field, joined by `; `.

    The message of a check of several fields names them itself.
    """
    parts = []
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        field = ".".join(str(step) for step in item["loc"])
        if not field and item["type"] == "value_error":
            parts.append(message)
            continue
        got = "" if item["type"] in ("missing", "extra_forbidden") else f" (got {item['input']!r:.80})"
        parts.append(f"{field or 'value'}: {message}{got}")
    return "; ".join(parts)
