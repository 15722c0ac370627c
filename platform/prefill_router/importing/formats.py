"""The formats of files of evaluations: which one a file has, and its answers.

In: files and folders, and a format or None. Out: an iterator of `Answer` over all of them, and notices about their
terms of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from prefill_router.errors import InputError
from prefill_router.importing import inspect_logs, llm_router_bench, lm_eval, router_arena, router_bench
from prefill_router.importing.answers import Answer

Format = Literal["inspect_ai", "lm_eval", "llm_router_bench", "router_bench", "router_arena"]


@dataclass(frozen=True)
class Reader:
    """The functions of a format: `matches(path)` and `read(path, metric)`. `terms`: a notice for the output."""

    matches: Callable[[Path], bool]
    read: Callable[[Path, str | None], Iterator[Answer]]
    terms: str | None = None


READERS: Mapping[Format, Reader] = {
    "inspect_ai": Reader(inspect_logs.matches, inspect_logs.read),
    "lm_eval": Reader(lm_eval.matches, lm_eval.read),
    "llm_router_bench": Reader(llm_router_bench.matches, llm_router_bench.read),
    "router_bench": Reader(router_bench.matches, router_bench.read),
    "router_arena": Reader(router_arena.matches, router_arena.read, router_arena.TERMS),
}
assert tuple(READERS) == get_args(Format)


def files_of(inputs: Sequence[Path], wanted: Format | None) -> dict[Path, Format]:
    """The files of the inputs with their formats, in alphabetical order within a folder.

    A file that is given itself must have a format; the files of a folder that have none, such as results beside
    samples, are left out. Raises InputError for a file that does not exist or has no known format, and for a folder
    without a file of a known format.
    """
    found: dict[Path, Format] = {}
    for given in inputs:
        if not given.exists():
            raise InputError(f"input: {given}: no such file or folder")
        given = given.resolve()  # a file that is given twice is read once
        paths = sorted(path for path in given.rglob("*") if path.is_file()) if given.is_dir() else [given]
        own = {path: kind for path in paths if (kind := _format_of(path, wanted)) is not None}
        if not own and given.is_file() and wanted is not None:
            own = {given: wanted}
        if not own:
            what = "the folder has no file of" if given.is_dir() else "the file has none of"
            known = ", ".join([wanted] if wanted else READERS)
            raise InputError(
                f"input: {given}: {what} the formats {known}; for another table give a mapping file "
                "(docs/importing.md), and for the decision log of the server use jobs.learn"
            )
        found |= own
    return found


def answers_of(files: Mapping[Path, Format], metric: str | None = None) -> Iterator[Answer]:
    """The answers of the files. Raises InputError as the readers do."""
    for path, kind in files.items():
        yield from READERS[kind].read(path, metric)


def terms_of(files: Mapping[Path, Format]) -> tuple[str, ...]:
    """The notices of the formats, each once."""
    return tuple(dict.fromkeys(terms for kind in files.values() if (terms := READERS[kind].terms) is not None))


def _format_of(path: Path, wanted: Format | None) -> Format | None:
    return next((kind for kind, one in READERS.items() if kind in (wanted or kind,) and one.matches(path)), None)
