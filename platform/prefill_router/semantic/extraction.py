"""Computes the text features of prompts; Ray Data maps this class.

In: a table of (query_id, prompt). Out: a table of `features_schema`, one row per prompt in the given order. The family
complexity is always computed, perplexity only with a language model; only perplexity imports torch. Does not read or
write dataset files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from prefill_router.files import prompt_digest
from prefill_router.semantic import complexity
from prefill_router.semantic.text_features import Family, features_schema

if TYPE_CHECKING:
    from prefill_router.semantic.perplexity import PerplexityConfig


class TextExtractor:
    """Text features of tables of prompts. Loads the language model, if any, on construction; raises as `Perplexity`."""

    def __init__(self, perplexity: PerplexityConfig | None) -> None:
        self.families = {"complexity": Family(features=complexity.NAMES, identity={"version": complexity.VERSION})}
        self._perplexity = None
        if perplexity is not None:
            from prefill_router.semantic.perplexity import NAMES, Perplexity  # imports torch

            self._perplexity = Perplexity(perplexity)
            source = {"model", "revision", "backend"}
            info = self._perplexity.info
            self.families["perplexity"] = Family(
                features=NAMES, identity=info.model_dump(exclude=source), source=info.model_dump(include=source)
            )

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Features of a batch. A prompt that is null, blank or not readable by the language model does not fail the
        batch: its row has the reason in `error` and null in every feature component."""
        texts = prompts.column("prompt").to_pylist()
        errors = [_unreadable(text) for text in texts]
        values = {"complexity": complexity.complexity([text or "" for text in texts])}
        if self._perplexity is not None:
            values["perplexity"], reasons = self._perplexity(texts)
            errors = [error or reason for error, reason in zip(errors, reasons, strict=True)]
        failed = np.asarray([error is not None for error in errors], dtype=bool)
        return pa.Table.from_arrays(
            [
                prompts.column("query_id").cast(pa.string()).combine_chunks(),
                pa.array([None if text is None else prompt_digest(text) for text in texts], pa.string()),
                pa.array(errors, pa.string()),
                *(_lists(array, failed) for array in values.values()),
            ],
            schema=features_schema(self.families),
        )


def _unreadable(text: str | None) -> str | None:
    if text is None:
        return "prompt is null"
    return None if text.strip() else "prompt is empty"


def _lists(values: Float[np.ndarray, "queries features"], null: np.ndarray) -> pa.FixedSizeListArray:
    # Components are null instead of lists: Arrow writes null fixed-size lists to Parquet but cannot read them back.
    flat = pa.array(values.astype(np.float32).reshape(-1), mask=np.repeat(null, values.shape[1]))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
