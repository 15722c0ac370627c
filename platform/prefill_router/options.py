"""The options of a program: from a configuration model to a command line, and back.

In: a `FrozenModel` class and arguments. Out: the configuration, or the help. Each field is an option: `--name`, and for
a field of a nested model `--group.field-name` or `--group.field_name`. Options win over `--config FILE.yaml`, the file
wins over the defaults. Knows nothing of what a program does (`prefill_router.cli`).
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from prefill_router import logs
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.locations import location

Config = TypeVar("Config", bound=FrozenModel)

COLUMNS = 100  # maximum width of the help
LABELS: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false", NoneType: "null"}
OWN = ("config", "dry_run", "log_format")  # options that are not fields
EPILOG = (
    "Names are accepted with - and with _. A flag --name means true, --no-name means false. Lists and mappings are "
    "YAML: '[a, b]', '{key: value}'."
)


def parse(kind: type[Config], description: str, argv: Sequence[str], name: str = "job") -> Config:
    """The configuration from `--config FILE.yaml` and the options. `--help` prints the help and exits with 0.

    A field with `json_schema_extra={"positional": True}` takes the arguments without a name: all of them if its type
    is a tuple or a list, otherwise one. Raises InputError with one line for an unknown option, a missing value, an
    unreadable file, or a field that is unknown, missing or out of bounds.
    """
    return read_options(kind, description, argv, name, forward=False)[0]


def parse_known(
    kind: type[Config], description: str, argv: Sequence[str], name: str = "job"
) -> tuple[Config, list[str]]:
    """As `parse`, but returns unknown arguments in their order. A positional argument precedes unknown options."""
    return read_options(kind, description, argv, name, forward=True)[:2]


def read_options(
    kind: type[Config], description: str, argv: Sequence[str], name: str, forward: bool
) -> tuple[Config, list[str], argparse.Namespace]:
    """The configuration, unknown arguments, and the options of every program (OWN)."""
    fields = {field.name: field for field in _fields(kind)}
    options, unknown = _parser(list(fields.values()), description, name).parse_known_intermixed_args(argv)
    if unknown and not forward:
        raise InputError(_unknown_argument(unknown, fields.values()))
    file = options.config
    given = {fields[key]: value for key, value in vars(options).items() if key not in OWN and value not in (None, [])}
    values = _read(location(file)) if file else {}
    for field, value in given.items():
        _set(values, field.path, _value(value, field) if isinstance(value, str) else value)
    try:
        return kind.model_validate(values), unknown, options
    except ValidationError as error:
        raise InputError(_invalid(error, fields, given, file)) from None


@dataclass(frozen=True, eq=False)
class _Field:
    """A field that is an option or a positional argument. `group` describes the nested model that contains it."""

    path: tuple[str, ...]
    info: FieldInfo
    group: str

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def options(self) -> list[str]:
        """Both spellings, or one if they are the same."""
        return list(dict.fromkeys((f"--{self.name.replace('_', '-')}", f"--{self.name}")))

    @property
    def negations(self) -> list[str]:
        """`--no-name` in both spellings if the field is a flag."""
        return [f"--no-{option[2:]}" for option in self.options] if bool in _members(self.info.annotation) else []

    @property
    def positional(self) -> bool:
        extra = self.info.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("positional"))

    @property
    def several(self) -> bool:
        return any(get_origin(member) in (tuple, list) for member in _members(self.info.annotation))

    @property
    def metavar(self) -> str:
        return self.path[-1].upper().removesuffix("S") if self.positional else _label(self.info.annotation)

    @property
    def help(self) -> str:
        """The description, and the default or `required`. Percent signs are escaped for argparse."""
        default = self.info.get_default(call_default_factory=True, validated_data={})
        note = "required" if self.info.is_required() else f"default: {_as_yaml(default)}"
        if default is True and self.negations:
            note += f"; {self.negations[0]} sets false"
        return f"{self.info.description or ''} ({note})".strip().replace("%", "%%")


def _fields(kind: type[BaseModel], path: tuple[str, ...] = (), group: str = "") -> list[_Field]:
    """The fields of a model and of its nested models, in the order of their declaration."""
    fields = []
    for name, info in kind.model_fields.items():
        members = _members(info.annotation)
        nested = [member for member in members if member is not NoneType]
        if len(nested) == 1 and inspect.isclass(nested[0]) and issubclass(nested[0], BaseModel):
            title = info.description or inspect.cleandoc(nested[0].__doc__ or "").partition("\n")[0]
            if NoneType in members and info.default is None:
                title = f"{title} Absent unless one of its fields is given.".strip()
            fields += _fields(nested[0], (*path, name), title)
        else:
            fields.append(_Field((*path, name), info, group))
    return fields


class _Parser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem == "expected one argument":
            problem = f"no value follows; a value that begins with a dash is written {option}=VALUE"
        raise InputError(f"{option}: {problem}" if problem else message)


def _parser(fields: Sequence[_Field], description: str, name: str) -> _Parser:
    positionals = [field for field in fields if field.positional]
    places = "".join(f" [{field.metavar}{' ...' if field.several else ''}]" for field in positionals)
    module = module_name() or ""
    width = min(shutil.get_terminal_size().columns, COLUMNS)
    parser = _Parser(
        prog=f"python -m {module}" if module.rpartition(".")[2] == name else name,
        usage=f"%(prog)s [--config FILE.yaml] [--name VALUE ...]{places}",
        description=inspect.cleandoc(description),
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=28, width=width),
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="fields as YAML; options win over the file")
    dry_run = "print what is read, what would be written and at what cost, and do nothing"
    log_format = f"text, or one JSON object per line (default: {logs.VARIABLE}, otherwise text)"
    for how in ("--dry-run", "--dry_run"):
        parser.add_argument(how, action="store_true", help=dry_run if "-r" in how else argparse.SUPPRESS)
    for how in ("--log-format", "--log_format"):
        shown = log_format if "-f" in how else argparse.SUPPRESS
        parser.add_argument(how, choices=logs.FORMATS, help=shown)
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for field in fields:
        group = field.path[:-1]
        if group not in groups:
            groups[group] = parser.add_argument_group(".".join(group), field.group)
        if field.positional:
            nargs = "*" if field.several else "?"
            parser.add_argument(field.name, nargs=nargs, metavar=field.metavar, help=field.help)
        else:
            _add_option(groups[group], field, bool(positionals))
    return parser


def _add_option(group: Any, field: _Field, positionals: bool) -> None:
    """Adds both spellings; the help shows the first. A flag takes `true` or `false` too, unless a positional argument
    could follow it."""
    how: dict[str, Any] = {"metavar": field.metavar}
    if field.negations:
        how = {"action": "store_const", "const": "true"} if positionals else {**how, "nargs": "?", "const": "true"}
    for index, option in enumerate(field.options):
        group.add_argument(option, dest=field.name, help=argparse.SUPPRESS if index else field.help, **how)
    for option in field.negations:
        group.add_argument(option, dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS)


def _members(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself. Annotations of constraints are removed."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _label(annotation: Any) -> str:
    """The type as the help shows it: `INT`, `{left,right}`, `[PATH, ...]`, `{TEXT: NUMBER}`, joined by `|`."""
    labels = []
    for member in _members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if origin is Literal:
            labels.append(f"{{{','.join(map(str, arguments))}}}")
        elif origin in (tuple, list):
            labels.append(f"[{', '.join('...' if one is Ellipsis else _label(one) for one in arguments)}]")
        elif origin is dict:
            labels.append(f"{{{': '.join(map(_label, arguments))}}}")
        else:
            labels.append(LABELS.get(member, "VALUE"))
    return "|".join(dict.fromkeys(labels))


def _as_yaml(value: Any) -> str:
    how: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": sys.maxsize}
    return yaml.safe_dump(to_jsonable_python(value), **how).removesuffix("...\n").strip()


def _value(text: str, field: _Field) -> Any:
    """Strings, paths and choices as typed; numbers, booleans, lists, mappings and null as YAML."""
    members = _members(field.info.annotation)
    if all(member in (str, Path, NoneType) or get_origin(member) is Literal for member in members):
        return None if text == "null" and NoneType in members else text
    if not text.strip():
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{field.options[0]} {text!r}: not a YAML value; a list is '[a, b]'") from None
    return value if value is None or isinstance(value, list | dict) or not _has_text(field.info.annotation) else text


def _has_text(annotation: Any) -> bool:
    """Whether the type, or a part of it, is a string or a path, so that `2024` may be a name."""
    return annotation in (str, Path) or any(_has_text(part) for part in get_args(annotation))


def _read(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {file}: not valid YAML ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"--config {file}: expected a mapping of fields, got {type(value).__name__}")
    return value


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for step in path[:-1]:
        if values.get(step) is None:
            values[step] = {}
        values = values[step]
        if not isinstance(values, dict):
            raise InputError(f"--config: {step}: got {values!r:.80}, but {'.'.join(path)} needs a mapping of fields")
    values[path[-1]] = value


def _unknown_argument(unknown: Sequence[str], fields: Iterable[_Field]) -> str:
    argument = next((argument for argument in unknown if argument.startswith("-")), None)
    if argument is None:
        return f"unexpected argument {unknown[0]!r}; values follow options as --name VALUE, and a list is '[a, b]'"
    name = argument.partition("=")[0]
    known = [option for field in fields if not field.positional for option in (field.options[0], *field.negations)]
    known += [f"--{own.replace('_', '-')}" for own in (*OWN, "help")]
    return f"unknown option {name}; {_suggestion(name.replace('_', '-'), known, 'options')}"


def _suggestion(name: str, known: Sequence[str], what: str) -> str:
    """The names with the same last part, otherwise the most similar one."""
    last = name.lstrip("-").rpartition(".")[2]
    near = [one for one in known if one.lstrip("-").rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else f"--help lists the {what}"


def _invalid(error: ValidationError, fields: Mapping[str, _Field], given: Iterable[_Field], file: str | None) -> str:
    """One line: the file if a value in it may be wrong, the errors, and how to correct missing and unknown fields."""
    hints, from_file = [], False
    for item in error.errors(include_url=False):
        where = tuple(map(str, item["loc"]))
        from_file |= not any(where[: len(field.path)] == field.path for field in given)
        name = ".".join(where)
        if item["type"] == "missing" and name in fields:
            hints.append(f"give {fields[name].metavar if fields[name].positional else fields[name].options[0]}")
        elif item["type"] == "extra_forbidden":
            groups = {".".join(field.path[:-1]) for field in fields.values()} - {""}
            hints.append(_suggestion(name, [*fields, *sorted(groups)], "fields"))
    prefix = f"{file}: " if file and from_file else ""
    return f"{prefix}{one_line(error)}" + (f" ({'; '.join(hints)})" if hints else "")


def module_name() -> str | None:
    """`jobs.train` under `python -m jobs.train`, `serve` under `python -m serve`, otherwise None."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else None
