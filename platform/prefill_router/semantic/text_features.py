"""The text features dataset: its format on disk, its manifest, and reading one feature family.

A dataset is a folder with `manifest.json` and Parquet shards of `features_schema`. Every query_id occurs once, in any
order. A feature family (`complexity`, `perplexity`) is one column. Readers join on `query_id` and check
`prompt_digest`. Does not compute features (see extraction.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import sha256_strings
from prefill_router.locations import location
from prefill_router.prefill.dataset import DatasetType, check_rows, find_rows, list_values, read_manifest, read_shards
from prefill_router.prefill.shards import (
    DatasetHeader,
    check_shards,
    input_digest,
    shorten,
    total_bytes,
    write_manifest,
)

TEXT_FEATURES = DatasetType("text features dataset", "text features", "text features", "features", "extraction")
VERSIONS = ("prefill-router", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
INDEX = ["query_id", "prompt_digest", "error"]


class Family(FrozenModel):
    """A feature family, stored as one column.

    `identity`: everything besides the prompt that the features depend on. `source`: where the model came from, which
    does not change the features.
    """

    features: tuple[str, ...]
    identity: dict[str, Any]
    source: dict[str, Any] = {}


class FeaturesHeader(DatasetHeader):
    """Header that all rows of a text features dataset share."""

    kind: ClassVar[DatasetType] = TEXT_FEATURES

    families: dict[str, Family]
    config: dict[str, Any]

    def require(self, wanted: Any, folder: Path) -> None:
        """Raises InputError for other families, or a family of another identity."""
        if list(self.families) != list(wanted.families):
            raise InputError(
                f"{folder}: holds the families {', '.join(self.families)}, requested are "
                f"{', '.join(wanted.families)}; choose another output folder, or request the families that it holds"
            )
        for name, family in self.families.items():
            was, now = _facts(family), _facts(wanted.families[name])
            for fact in {**was, **now}:
                if was.get(fact) != now.get(fact):
                    raise InputError(
                        f"{folder}: holds other {name} features: {fact} was "
                        f"{shorten(was.get(fact))}, is now {shorten(now.get(fact))}; choose another output "
                        "folder"
                    )


class FeaturesCounts(FrozenModel):
    """Counts of a dataset: rows, rows with an error, bytes on disk."""

    rows: int
    errors: int
    bytes: int


class FeaturesManifest(FrozenModel):
    """Provenance of a text features dataset (docs/data-formats.md)."""

    format_version: Literal[1] = 1
    families: dict[str, Family]
    versions: dict[str, str]
    input_digest: str
    counts: FeaturesCounts
    shards: tuple[str, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class TextFeatures:
    """A text features dataset, read lazily."""

    folder: Path
    manifest: FeaturesManifest

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.manifest.families)

    @cached_property
    def digest(self) -> str:
        """sha256 of the families' identities and all (query_id, prompt) pairs, for lineage."""
        return sha256_strings(
            [
                *(
                    f"{name}: {sorted(_facts(family).items())}"
                    for name, family in sorted(self.manifest.families.items())
                ),
                self.manifest.input_digest,
            ]
        )

    def values(
        self, family: str, query_ids: Sequence[str] | np.ndarray, prompt_digests: Sequence[str]
    ) -> Float[np.ndarray, "queries features"]:
        """One family's features, float32, in the order of `query_ids`.

        Raises InputError for an unknown family, and for the first query that is missing, that has another prompt digest
        than `prompt_digests`, or that has an error instead of features.
        """
        if family not in self.families:
            raise InputError(f"{self.folder}: no family {family!r}, available are {', '.join(self.families)}")
        rows = find_rows(self._index, query_ids, self.folder, TEXT_FEATURES)
        check_rows(self._index, rows, query_ids, prompt_digests, self.folder, TEXT_FEATURES)
        column = read_shards(self.folder, self.manifest.shards, [family]).column(family)
        return list_values(column, len(self.manifest.families[family].features))[rows]

    def errors(self) -> pa.Table:
        """`query_id` and `error` of the rows without features."""
        return self._index.filter(self._index.column("error").is_valid()).select(["query_id", "error"])

    @cached_property
    def _index(self) -> pa.Table:
        return read_shards(self.folder, self.manifest.shards, INDEX).combine_chunks()


def read_text_features(folder: Path | str) -> TextFeatures:
    """Opens a finished dataset. Raises InputError if it is missing, unfinished, damaged or of another version."""
    folder = location(folder)
    return TextFeatures(folder, read_manifest(folder, FeaturesManifest, TEXT_FEATURES))


def features_schema(families: Mapping[str, Family]) -> pa.Schema:
    """The Arrow schema of a shard (docs/data-formats.md)."""
    return pa.schema(
        [
            ("query_id", pa.string()),
            ("prompt_digest", pa.string()),
            ("error", pa.string()),
            *((name, pa.list_(pa.float32(), len(family.features))) for name, family in families.items()),
        ]
    )


def finish_features(folder: Path, header: FeaturesHeader) -> FeaturesManifest:
    """Checks the shards, writes `manifest.json` atomically and returns it. Call after all rows are written."""
    shards = check_shards(folder, features_schema(header.families))
    index = read_shards(folder, shards, INDEX)
    manifest = FeaturesManifest(
        families=header.families,
        versions={name: version(name) for name in VERSIONS},
        input_digest=input_digest(index),
        counts=FeaturesCounts(
            rows=index.num_rows,
            errors=index.num_rows - index.column("error").null_count,
            bytes=total_bytes(folder, shards),
        ),
        shards=shards,
        config=header.config,
    )
    write_manifest(folder, manifest)
    return manifest


def _facts(family: Family) -> dict[str, Any]:
    return {"features": list(family.features), **family.identity}
