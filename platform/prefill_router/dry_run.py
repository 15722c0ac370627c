"""`--dry-run`: what a job reads and what it would write, from the locations in its configuration.

In: a configuration. Out: one line per location. Reads sizes, numbers of rows and manifests; writes nothing. A field is
an output if it is named `output` or has `json_schema_extra={"written": True}`; every other location is an input.
Knows nothing of the jobs: what one costs comes from its own `plan` (`prefill_router.cli.main`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel

from prefill_router.errors import InputError
from prefill_router.locations import ObjectPath, readable
from prefill_router.text_columns import column_names

MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
RESUMED = (PARTIAL, "sweep.json", "semantic.json", "ledger.jsonl")  # files of runs that the same command resumes
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Place:
    """A location in a configuration. `field` is its dotted name, `written` whether the job writes it."""

    field: str
    path: Path
    written: bool


def places(config: BaseModel) -> list[Place]:
    """The locations of a configuration and of the models in it, in the order of their fields."""
    return list(_places(config, ""))


def report(config: BaseModel) -> list[str]:
    """A line for every location. Raises InputError for a missing input and an output without permission."""
    found = places(config)
    lines = [f"reads {place.field}: {place.path}: {describe(place.path)}" for place in found if not place.written]
    return lines + [
        f"writes {place.field}: {place.path}: {describe_output(place.path)}" for place in found if place.written
    ]


def describe(path: Path) -> str:
    """Kind, size and rows of an input. Raises InputError if it does not exist."""
    if path.suffix == ".parquet":
        column_names(path)  # raises what a job's reader raises
    if path.is_dir():
        return _folder(path)
    try:
        size = size_text(path.stat().st_size)
        if path.suffix != ".parquet":
            return size
        with pq.ParquetFile(readable(path)) as table:
            return f"{table.metadata.num_rows:,} rows, {size}"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def describe_output(path: Path) -> str:
    """What exists at an output, and the free space. Raises InputError if its folder cannot be written."""
    if isinstance(path, ObjectPath):
        return _state(path)
    above = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{path}: {above} is a file; choose another output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {above} cannot be written by this user; choose another output")
    return f"{_state(path)}, {size_text(shutil.disk_usage(above).free)} free"


def size_text(size: int | float) -> str:
    """Bytes as `1.5 MiB`."""
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            break
        size /= 1024
    return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def _places(config: BaseModel, prefix: str) -> Iterator[Place]:
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        written = name == "output" or (isinstance(extra, dict) and bool(extra.get("written")))
        for value, where in _values(getattr(config, name), f"{prefix}{name}"):
            if isinstance(value, BaseModel):
                yield from _places(value, f"{where}.")
            elif isinstance(value, Path):
                yield Place(where, value, written)


def _values(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    """A value, or the values of a list or a mapping with their names."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _values(one, f"{where}.{key}")
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _values(one, where)
    else:
        yield value, where


def _folder(folder: Path) -> str:
    if (folder / PARTIAL).is_file():
        return "folder, unfinished: its job has to be completed first"
    if (folder / MANIFEST).is_file():
        rows = _rows(folder)
        return "folder with a manifest" + ("" if rows is None else f", {rows:,} rows")
    return f"folder, {sum(1 for _ in folder.iterdir()):,} entries"


def _state(path: Path) -> str:
    """What a job finds at its output."""
    if not path.exists():
        return "new"
    if not path.is_dir():
        return f"exists, {size_text(path.stat().st_size)}; would be replaced"
    if any((path / name).is_file() for name in RESUMED):
        return "holds an earlier run; would be resumed"
    if (path / MANIFEST).is_file():
        rows = _rows(path)
        return "finished" + ("" if rows is None else f", {rows:,} rows") + "; would be extended if the input has more"
    return "exists; files of the same names would be replaced" if any(path.iterdir()) else "an empty folder"


def _rows(folder: Path) -> int | None:
    """The rows of a dataset by its manifest."""
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["counts"]["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
