"""The exceptions that are not faults of ours: the input is wrong, or another server does not answer.

On InputError jobs end with exit code 2, and the server answers 4xx. Its message is one line that names the field, the
value received, what is allowed and the way out. On UnavailableError the server answers 503. Any other exception is a
fault of ours and keeps its traceback.
"""

from __future__ import annotations

from pydantic import ValidationError


class InputError(ValueError):
    """Input that the user can mend. The message names field, value, what is allowed and the way out."""


class UnavailableError(RuntimeError):
    """A server that is asked for something does not answer, or fails. Trying again later may help."""


def one_line(error: ValidationError) -> str:
    """The pydantic error as one line: `field.path: what is wrong (got VALUE)`, the fields joined by `; `."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(step) for step in item["loc"]) or "value"
        got = "" if item["type"] in ("missing", "extra_forbidden") else f" (got {item['input']!r:.80})"
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(parts)
