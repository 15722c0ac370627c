"""The command line that every job shares: `--config FILE.yaml`, `--field value` overrides, exit codes, the summary.

In: a frozen pydantic configuration class and a function from it to a one-line summary. Exit codes: 0 done,
1 failed (traceback, or one line where a server does not answer), 2 bad usage or bad input (one line). Knows nothing of
what the jobs do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError, one_line

Config = TypeVar("Config", bound="FrozenModel")


def main(kind: type[Config], run: Callable[[Config], str], argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the command line into `kind`, runs the job, prints its summary last, and exits."""
    name = Path(sys.argv[0]).stem if argv is None else "job"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = parse(kind, run.__doc__ or "", sys.argv[1:] if argv is None else argv, name)
        summary = run(config)
    except (InputError, UnavailableError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    print(f"{name}: {summary}", flush=True)
    sys.exit(0)


def parse(kind: type[Config], description: str, argv: Sequence[str], name: str = "job") -> Config:
    """The configuration from `--config FILE.yaml` and the overrides, which win. Nested fields are dotted.

    A field with `json_schema_extra={"positional": True}` takes the arguments that stand without a name.

    Raises InputError naming the field and value; argparse itself exits with 2 on an unknown option.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {_package()}.{name}",
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="fields as YAML; options below win over it")
    leaves = dict(_leaves(kind))
    for field, info in leaves.items():
        default = "" if info.default in (PydanticUndefined, None, ()) else f" (default: {info.default})"
        says = f"{info.description or ''}{default}".replace("%", "%%")
        option = f"--{field.replace('_', '-')}"
        if (info.json_schema_extra or {}).get("positional"):
            parser.add_argument(field, nargs="*", metavar=field.upper().removesuffix("S"), help=says)
        elif info.annotation is bool:  # the name alone means true
            parser.add_argument(option, dest=field, metavar="VALUE", help=says, nargs="?", const="true")
        else:
            parser.add_argument(option, dest=field, metavar="VALUE", help=says)
    given = vars(parser.parse_intermixed_args(argv))
    path = given.pop("config")
    values: dict[str, Any] = _read(path) if path else {}
    for field, text in given.items():
        if isinstance(text, list):
            if text:
                _set(values, field.split("."), text)
        elif text is not None:
            _set(values, field.split("."), _value(text, leaves[field].annotation, field))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{f'{path}: ' if path else ''}{one_line(error)}") from None


def _package() -> str:
    """`jobs`, or the package of another command that is run as `python -m PACKAGE.NAME`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.parent if spec is not None and spec.parent else "jobs"


def _leaves(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, info in kind.model_fields.items():
        nested = info.annotation
        if isinstance(nested, UnionType):  # a part that may be left out: any field of it brings it in
            nested = next((one for one in get_args(nested) if one is not NoneType), None)
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            leaves += _leaves(nested, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", info))
    return leaves


def _value(text: str, annotation: Any, field: str) -> Any:
    """Strings and paths as they were typed; numbers, switches, lists and null as YAML."""
    if annotation in (str, Path) or not text.strip():
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--{field.replace('_', '-')} {text!r}: not a YAML value; lists are [a, b]") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise InputError(f"--config {path}: expected a mapping of fields, got {type(value).__name__}")
    return value


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for step in path[:-1]:
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            raise InputError(f"--config: {step} must be a mapping to take {'.'.join(path)}")
    values[path[-1]] = value
