"""What an encoder is: its configuration, its identity, and the one call that every backend offers.

In: a table of (query_id, prompt). Out: a table of the activations schema, one row per prompt in the given order:
pooled hidden states per (pooling, layer). Layer 0 is the embedding output, layer l the output of block l before
the final norm (EQUATIONS.md, Hidden-state index). Knows nothing of files or clusters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from pydantic import Field

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.prefill.config import EncoderName
from prefill_router.prefill.tokens import Tokens

COLUMN = re.compile(r"(last|mean)_L(\d+)")


class EncoderInfo(FrozenModel):
    """The identity of a loaded encoder: everything that its states depend on, and its shape."""

    model: EncoderName
    revision: str | None
    architecture: str
    weights_digest: str
    tokenizer_digest: str
    attention: Literal["causal", "bidirectional"]
    last_token: Annotated[str, Field(description="what `last` pools: `last real token` or `first token ([CLS])`")]
    n_layers: Annotated[int, Field(description="L, the number of blocks of the whole model")]
    hidden_size: int
    max_length: int
    truncation_side: Literal["left", "right"]
    template: Annotated[str | None, Field(description="the chat template's text, None where none is used")]
    dtype: Literal["float32", "bfloat16"]
    states_dtype: Literal["float16", "float32"]
    backend: Annotated[str, Field(description="what ran the model, with its version and way of reading")]

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for two encoders exactly when their states are interchangeable.

        Where the model was loaded from and by which backend does not enter.
        """
        what = self.model_dump(exclude={"model", "revision", "backend", "states_dtype"})
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """How much of a model was loaded: blocks, of how many, and bytes of weights, of those in its files."""

    blocks: int
    of_blocks: int
    bytes: int
    of_bytes: int
    why: str = ""  # states are not read in the usual way

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        if self.blocks == self.of_blocks:
            return f"all {self.blocks} blocks loaded, {self.bytes / 1e6:,.1f} MB{why}"
        return (
            f"{self.blocks} of {self.of_blocks} blocks loaded, {self.bytes / 1e6:,.1f} of "
            f"{self.of_bytes / 1e6:,.1f} MB{why}"
        )


@runtime_checkable
class PrefillEncoder(Protocol):
    """An encoder backend. Ray Data maps this class, Serve holds it: one code path for batch and online."""

    info: EncoderInfo
    columns: tuple[str, ...]
    loaded: Loaded | str  # how much of the model, or where it runs

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Reads `query_id`, `prompt` (strings); returns `activations_schema(...)` rows in the same order.

        A prompt that cannot be encoded (null, empty, not a string, no token, non-finite states) gets its reason in
        `error` and states of nulls; it never fails the batch.
        """
        ...

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Seconds that the loaded model's forward pass alone takes over the batches of these prompts: tokenised
        beforehand, nothing pooled or kept, run to the end, final norm included. None where the backend cannot tell,
        or no prompt can be read."""
        ...

    def close(self) -> None:
        """Gives back what the encoder holds outside this process. Nothing can be read any more."""
        ...


def column_name(pooling: str, layer: int) -> str:
    """`last_L17`."""
    return f"{pooling}_L{layer}"


def parse_column(name: str) -> tuple[str, int]:
    """(pooling, layer) of a column name. Raises InputError for any other string."""
    match = COLUMN.fullmatch(name)
    if match is None:
        raise InputError(f"activations column {name!r}: expected POOLING_Ln, as in last_L17 or mean_L4")
    return match[1], int(match[2])


def resolve_layers(layers: Sequence[int] | Literal["upper", "all"], n_layers: int) -> tuple[int, ...]:
    """The hidden-state indices meant, ascending, each once. Raises InputError for one outside 0..n_layers."""
    if layers == "upper":
        return tuple(range((n_layers + 1) // 2, n_layers + 1))
    if layers == "all":
        return tuple(range(n_layers + 1))
    wrong = [layer for layer in layers if not 0 <= int(layer) <= n_layers]
    if wrong or not layers:
        raise InputError(
            f"layers: got {list(layers)}, allowed are hidden-state indices 0..{n_layers} "
            "(0 is the embedding output), `upper` or `all`"
        )
    return tuple(sorted({int(layer) for layer in layers}))


def activations_schema(columns: Sequence[str], hidden_size: int, states_dtype: str) -> pa.Schema:
    """The Arrow schema of an activations shard (docs/data-formats.md).

    `n_tokens` counts the whole prompt before truncation, `n_dropped` what truncation cut off, `tokens_digest`
    recognises prompts that became the same tokens.
    """
    value = {"float16": pa.float16(), "float32": pa.float32()}[states_dtype]
    return pa.schema(
        [
            ("query_id", pa.string()),
            ("prompt_digest", pa.string()),
            ("n_tokens", pa.int32()),
            ("n_dropped", pa.int32()),
            ("tokens_digest", pa.string()),
            ("error", pa.string()),
            *((name, pa.list_(value, hidden_size)) for name in columns),
        ]
    )


def activations_table(
    query_ids: pa.ChunkedArray,
    prompts: pa.ChunkedArray,
    tokens: Sequence[Tokens],
    columns: Sequence[str],
    states: Float[np.ndarray, "columns rows hidden"],
    peaks: Float[np.ndarray, "columns rows"],
) -> pa.Table:
    """The rows of `activations_schema`, in the order given.

    `peaks` is the largest magnitude of each state before it was cast to the kept dtype. A row without tokens, or with
    a state that is not finite or does not fit the kept dtype, has its reason in `error` and states whose every
    component is null (not null lists: Arrow writes those to Parquet, but cannot read them back).
    """
    errors = [token.error for token in tokens]
    fits = peaks <= np.finfo(states.dtype).max  # false for NaN too
    for row in np.flatnonzero(~fits.all(axis=0)):
        # The lowest layer is where it began.
        wrong = min(np.flatnonzero(~fits[:, row]), key=lambda column: parse_column(columns[column])[1])
        errors[row] = (
            f"{columns[wrong]} overflows {states.dtype} (max {peaks[wrong, row]:.1e}); use states_dtype float32"
            if np.isfinite(peaks[wrong, row])
            else f"non-finite state in {columns[wrong]}"
        )
    hidden = states.shape[2]
    null = np.repeat([error is not None for error in errors], hidden).astype(bool)
    texts = prompts.to_pylist()
    digests = [prompt_digest(text) if isinstance(text, str) else None for text in texts]
    kept = [token.error is None for token in tokens]
    schema = activations_schema(columns, hidden, str(states.dtype))
    return pa.Table.from_arrays(
        [
            query_ids.cast(pa.string()).combine_chunks(),
            pa.array(digests, pa.string()),
            pa.array([token.n_tokens for token in tokens], pa.int32()),
            pa.array(
                [token.n_tokens - len(token.ids) if keep else 0 for token, keep in zip(tokens, kept, strict=True)],
                pa.int32(),
            ),
            pa.array([token.digest if keep else None for token, keep in zip(tokens, kept, strict=True)], pa.string()),
            pa.array(errors, pa.string()),
            *(pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1), mask=null), hidden) for column in states),
        ],
        schema=schema,
    )


def states_table(
    prompts: pa.Table,
    tokens: Sequence[Tokens],
    answers: Sequence[Float[np.ndarray, "columns hidden"] | str],
    columns: Sequence[str],
    info: EncoderInfo,
) -> pa.Table:
    """The same from what an engine answered for each prompt that could be read: its states, float32, or why there are
    none."""
    tokens = list(tokens)
    states = np.zeros((len(columns), len(tokens), info.hidden_size), dtype=info.states_dtype)
    peaks = np.zeros((len(columns), len(tokens)), dtype=np.float32)
    readable = [row for row, one in enumerate(tokens) if one.error is None]
    for row, answer in zip(readable, answers, strict=True):
        if isinstance(answer, str):
            tokens[row] = replace(tokens[row], ids=[], error=answer)
            continue
        with np.errstate(over="ignore"):  # what does not fit is told of by its peak
            states[:, row] = answer
        peaks[:, row] = np.abs(answer).max(axis=1)
    return activations_table(prompts.column("query_id"), prompts.column("prompt"), tokens, columns, states, peaks)
