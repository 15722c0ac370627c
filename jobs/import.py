"""Import job: files of evaluations in, an outcomes table out, for training.

The formats are those of `prefill_router.importing.formats`, found by the content of a file. Any other table is read by
a mapping file. Nothing is written unless every file could be read.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import read_yaml, write_parquet
from prefill_router.importing import mapped
from prefill_router.importing.answers import Answer, outcomes_of
from prefill_router.importing.formats import Format, answers_of, files_of, terms_of
from prefill_router.locations import LocalPath, Location
from prefill_router.prefill.counting import token_counter
from prefill_router.progress import tqdm


class ImportConfig(FrozenModel):
    """Files of evaluations, how to read them, and the outcomes to write."""

    input: Annotated[
        tuple[LocalPath, ...], Field(min_length=1, description="files and folders: a path or a list of paths")
    ]
    output: Annotated[Location, Field(description="outcomes file to write (Parquet)")]
    format: Annotated[Format | None, Field(description="format of all files; None: found by their content")] = None
    mapping: Annotated[
        LocalPath | None,
        Field(description="YAML file that names the columns of any CSV, Parquet or JSON Lines file; None: no mapping"),
    ] = None
    metric: Annotated[
        str | None,
        Field(description="metric or scorer, for formats with several; None: the first of the file"),
    ] = None
    rename: Annotated[
        dict[str, str], Field(description="names of models in the output by their names in the files; others are kept")
    ] = {}
    correct_from: Annotated[
        float | None,
        Field(gt=0, le=1, description="mean score from which a label is 1, else 0; None: the mean score is the label"),
    ] = None
    tokenizer: Annotated[
        str | None,
        Field(
            description="encoder whose tokenizer estimates token counts that the files lack, such as smollm2; None: no "
            "estimates"
        ),
    ] = None

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value


def plan(config: ImportConfig) -> list[str]:
    """What a dry run says: the files that it would read. Raises InputError as `run` does for files without a format."""
    cost = "costs nothing but the time of this machine"
    if config.mapping is not None:
        _mapping(config, config.mapping)
        return [cost]
    files = files_of(config.input, config.format)
    kinds = ", ".join(f"{count:,} of {kind}" for kind, count in Counter(files.values()).items())
    return [*terms_of(files), f"reads {len(files):,} files: {kinds}", cost]


def run(config: ImportConfig) -> str:
    """Turn files of evaluations into outcomes."""
    terms: tuple[str, ...] = ()
    if config.mapping is not None:
        mapping = _mapping(config, config.mapping)
        answers: Iterator[Answer] = (answer for path in config.input for answer in mapped.read(path, mapping))
    else:
        files = files_of(config.input, config.format)
        terms = terms_of(files)
        answers = answers_of(files, config.metric)
    for one in terms:
        print(f"import: {one}", file=sys.stderr, flush=True)
    prepared: Iterator[Answer] = (replace(one, model=config.rename.get(one.model, one.model)) for one in answers)
    if config.tokenizer is not None:
        name, count = config.tokenizer, token_counter(config.tokenizer)
        prepared = (one.estimated(count, name) for one in prepared)
    with tqdm(desc="import", unit=" answers") as bar:

        def counted() -> Iterator[Answer]:
            for one in prepared:
                yield one
                bar.update()

        imported = outcomes_of(counted(), config.correct_from)
    notes = {"note": "; ".join(terms)} if terms else None
    write_parquet(config.output, imported.table.replace_schema_metadata(notes))
    return f"{imported.summary}; {config.output}"


def _mapping(config: ImportConfig, path: Path) -> mapped.Mapping:
    if config.format is not None or config.metric is not None:
        raise InputError("mapping: got a mapping and a format or metric; give one of them")
    return read_yaml(path, mapped.Mapping)


if __name__ == "__main__":
    main(ImportConfig, run, plan=plan)
