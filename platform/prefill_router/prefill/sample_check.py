"""A sample of prompts, and its errors: whether a run over all prompts is worth its time.

In: the prompts, then the errors of the sample's rows. Out: the sample, then a warning or an InputError. Independent of
encoders, files and clusters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefill_router.errors import InputError

NUMERIC = re.compile(r"overflows float16|non-finite state|values are not finite")
MAX_NUMERIC = 0.5  # share of the prompts that the model reads


def sample_prompts(prompts: pa.Table, rows: int) -> pa.Table:
    """Up to `rows` prompts at evenly spaced quantiles of text length; their mean length estimates that of all."""
    texts = prompts.column("prompt")
    has_text = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
    lengths = pc.fill_null(pc.utf8_length(texts), 0).to_numpy() if has_text else np.zeros(len(texts), np.int64)
    order = np.argsort(lengths, kind="stable")
    spaced = (np.arange(min(rows, len(order))) + 0.5) * len(order) / min(rows, len(order))
    chosen = order[spaced.astype(np.int64)].tolist()
    # Table.take would copy the whole text into memory.
    return pa.concat_tables([prompts.slice(0, 0), *(prompts.slice(row, 1) for row in chosen)]).combine_chunks()


def check_sample(errors: Sequence[str | None], field: str, values: str) -> str | None:
    """A warning if some prompts of the sample have an error; None if none has.

    `field` names the configured model and `values` the rows' content in messages. Raises InputError if every prompt of
    the sample has an error, or if more than half of the prompts that the model reads have values that are not finite or
    overflow the stored dtype.
    """
    failed = [error for error in errors if error is not None]
    if not failed:
        return None
    numeric = [error for error in failed if NUMERIC.search(error)]
    if len(numeric) > MAX_NUMERIC * (len(errors) - len(failed) + len(numeric)):
        remedy = "" if "; use " in numeric[0] else "; use dtype float32 or another model"
        raise InputError(
            f"{field}: {len(numeric)} of {len(errors)} sampled prompts have no {values}: {numeric[0]}{remedy}"
        )
    if len(failed) == len(errors):
        raise InputError(
            f"{field}: none of the {len(errors)} sampled prompts has {values}: {failed[0]}; correct the prompts or use "
            "another model"
        )
    return f"{len(failed)} of {len(errors)} sampled prompts have no {values}; the first reason: {failed[0]}"


def require_finite(largest: float, model: object) -> float:
    """`largest`, the largest magnitude of a model's values. Raises InputError if it is not finite."""
    if not math.isfinite(largest):
        raise InputError(
            f"model: the values of {model} are not finite; use dtype float32, or download or save the weights again"
        )
    return largest
