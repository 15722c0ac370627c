"""The encoder interface: the protocol of all backends, the encoder's identity, and the activations table.

In: a table (query_id, prompt). Out: a table of `activations_schema`, one row per prompt in input order, with the pooled
hidden states per (pooling, layer). Layer 0 is the embedding output; layer l is the output of transformer block l before
the final norm (docs/equations.md, Hidden-state index). Independent of files and clusters.
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
from prefill_router.prefill.config import EncoderConfig, EncoderName, TruncationSide

COLUMN = re.compile(r"(last|mean)_L(\d+)")
# Columns that datasets from before they existed lack; they are read as nulls.
LATER_COLUMNS = ("n_unknown", "n_unknown_bytes", "n_bytes")
FORMER_DEFAULT_LIMIT = 4096  # tokens; default limit of datasets made before it rose to 8,192
UNKNOWN_LIMIT = 0.1  # share of a prompt above which the encoder is said not to read it
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompt: `ids` after truncation, their number `n_tokens` before truncation.

    `error` is the reason why the prompt cannot be encoded; `ids` is then empty. `n_unknown` counts the occurrences of
    the tokenizer's unknown token before truncation, `n_unknown_bytes` the UTF-8 bytes of the text that they replace.
    """

    ids: list[int]
    n_tokens: int
    error: str | None = None
    n_unknown: int = 0
    n_unknown_bytes: int = 0

    @property
    def digest(self) -> str:
        """16 hex digits of the ids' sha256: equal for prompts with the same tokens after truncation."""
        return hashlib.sha256(np.asarray(self.ids, dtype=np.int64).tobytes()).hexdigest()[:16]


class EncoderInfo(FrozenModel):
    """The identity of a loaded encoder: all properties that its states depend on, and its shape."""

    model: EncoderName
    revision: str | None
    architecture: str
    weights_digest: str
    tokenizer_digest: str
    attention: Literal["causal", "bidirectional"]
    last_token: Annotated[
        str,
        Field(
            description="token of the pooling `last`: `last real token`, `first token ([CLS])` or "
            "`last of K probe tokens`"
        ),
    ]
    n_layers: Annotated[int, Field(description="L, the number of transformer blocks of the full model")]
    hidden_size: int
    max_length: int
    truncation_side: TruncationSide
    template: Annotated[str | None, Field(description="text of the chat template; None: no template")]
    template_date: Annotated[
        str | None, Field(description="the date that the chat template prints as today; None: it prints none")
    ] = None
    adapter: Annotated[
        str | None,
        Field(
            description="digest of the adapter with probe tokens; None: no adapter",
            exclude_if=lambda digest: digest is None,  # fingerprints without adapter are as before
        ),
    ] = None
    dtype: Literal["float32", "bfloat16"]
    states_dtype: Literal["float16", "float32"]
    backend: Annotated[str, Field(description="backend, with its version and extraction method")]

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for two encoders exactly when their states are interchangeable.

        The location of the model, the backend and the dtype of the stored states are not part of it.
        """
        excluded = {"model", "revision", "backend", "states_dtype"}
        if self.template_date is None:  # fingerprints from before this field existed
            excluded.add("template_date")
        identity = self.model_dump(exclude=excluded)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def with_recorded_limit(config: EncoderConfig, max_length: int | None) -> EncoderConfig:
    """`config` with the limit of a dataset that was made with the former default of max_length.

    `max_length` is the recorded limit of the dataset's encoder; None if it is not recorded.
    """
    former = config.max_length is None and max_length == FORMER_DEFAULT_LIMIT
    return config.model_copy(update={"max_length": max_length}) if former else config


@dataclass(frozen=True)
class LoadedWeights:
    """Loaded part of a model: its transformer blocks and bytes of weights, and the totals of the model's files.

    `reason` explains why the preferred extraction method is not used; empty if it is.
    """

    blocks: int
    total_blocks: int
    bytes: int
    total_bytes: int
    reason: str = ""

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        if self.blocks == self.total_blocks:
            return f"all {self.blocks} blocks loaded, {self.bytes / 1e6:,.1f} MB{reason}"
        return (
            f"{self.blocks} of {self.total_blocks} blocks loaded, {self.bytes / 1e6:,.1f} of "
            f"{self.total_bytes / 1e6:,.1f} MB{reason}"
        )


@runtime_checkable
class PrefillEncoder(Protocol):
    """An encoder backend. Ray Data and Ray Serve run the same class: one code path for batch and online.

    `loaded` is the loaded part of the model, or the address of the server that runs it.
    """

    info: EncoderInfo
    columns: tuple[str, ...]
    loaded: LoadedWeights | str

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Encodes `query_id`, `prompt` (strings); returns rows of `activations_schema` in the same order.

        A prompt that cannot be encoded (null, empty, not a string, no token, a token without an embedding, non-finite
        states) has the reason in `error` and null states. It does not fail the batch.
        """
        ...

    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """Seconds of the loaded model's forward passes over the batches of these prompts.

        Includes the final norm; excludes tokenisation and pooling. None if the backend cannot measure it or no prompt
        can be encoded.
        """
        ...

    def close(self) -> None:
        """Releases the processes or connections of the encoder. The encoder cannot be called afterwards."""
        ...


def column_name(pooling: str, layer: int) -> str:
    """Activations column of a pooling and a layer, as in `last_L17`."""
    return f"{pooling}_L{layer}"


def parse_column(name: str) -> tuple[str, int]:
    """(pooling, layer) of a column name. Raises InputError for any other string."""
    match = COLUMN.fullmatch(name)
    if match is None:
        raise InputError(f"activations column {name!r}: expected POOLING_Ln, as in last_L17 or mean_L4")
    return match[1], int(match[2])


def resolve_layers(layers: Sequence[int] | Literal["upper", "all"], n_layers: int) -> tuple[int, ...]:
    """Hidden-state indices in ascending order without duplicates. Raises InputError for one outside 0..n_layers."""
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

    `n_tokens` is the number of tokens before truncation, `n_dropped` the number of truncated tokens. `tokens_digest` is
    equal for prompts with the same tokens after truncation. `n_unknown` and `n_unknown_bytes` are as in `Tokens`;
    `n_bytes` is the number of UTF-8 bytes of the prompt, 0 for a prompt that is not a string.
    """
    value = {"float16": pa.float16(), "float32": pa.float32()}[states_dtype]
    return pa.schema(
        [
            ("query_id", pa.string()),
            ("prompt_digest", pa.string()),
            ("n_tokens", pa.int32()),
            ("n_dropped", pa.int32()),
            *((name, pa.int32()) for name in LATER_COLUMNS),
            ("tokens_digest", pa.string()),
            ("error", pa.string()),
            *((name, pa.list_(value, hidden_size)) for name in columns),
        ]
    )


def unknown_share(rows: pa.Table) -> Float[np.ndarray, " rows"]:
    """Share of each prompt's UTF-8 bytes that the tokenizer replaces with its unknown token, 0 to 1.

    `rows` has the columns of `activations_schema`. NaN if the share is unknown: the dataset was written before these
    columns existed.
    """
    if not set(LATER_COLUMNS) <= set(rows.column_names):
        return np.full(rows.num_rows, np.nan)
    unknown, size = (rows.column(name).to_numpy().astype(np.float64) for name in ("n_unknown_bytes", "n_bytes"))
    return np.asarray(unknown / np.maximum(size, 1))


def activations_table(
    query_ids: pa.ChunkedArray,
    prompts: pa.ChunkedArray,
    tokens: Sequence[Tokens],
    columns: Sequence[str],
    states: Float[np.ndarray, "columns rows hidden"],
    peaks: Float[np.ndarray, "columns rows"],
) -> pa.Table:
    """Rows of `activations_schema`, in input order.

    `states` has the dtype to store; `peaks` is the largest magnitude of each state before the cast to that dtype.
    If a row has no tokens, a non-finite state or a state that overflows the stored dtype, `error` holds the reason
    and all components of its states are null. The lists themselves are not null: Arrow cannot read null fixed-size
    lists back from Parquet.
    """
    errors = [token.error for token in tokens]
    fits = peaks <= np.finfo(states.dtype).max  # false for NaN too
    for row in np.flatnonzero(~fits.all(axis=0)):
        # The lowest affected layer is the cause; higher layers inherit the value.
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
            pa.array([token.n_unknown for token in tokens], pa.int32()),
            pa.array([min(token.n_unknown_bytes, MAX_INT32) for token in tokens], pa.int32()),
            pa.array([min(utf8_bytes(text), MAX_INT32) for text in texts], pa.int32()),
            pa.array([token.digest if keep else None for token, keep in zip(tokens, kept, strict=True)], pa.string()),
            pa.array(errors, pa.string()),
            *(pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1), mask=null), hidden) for column in states),
        ],
        schema=schema,
    )


def utf8_bytes(text: object) -> int:
    """Number of UTF-8 bytes of a string; 0 for any other value."""
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def states_table(
    prompts: pa.Table,
    tokens: Sequence[Tokens],
    responses: Sequence[Float[np.ndarray, "columns hidden"] | str],
    columns: Sequence[str],
    info: EncoderInfo,
) -> pa.Table:
    """Rows of `activations_schema` from the responses of a vLLM backend.

    `responses` has one entry per prompt with tokens, in order: the pooled states in float32, or an error message.
    """
    tokens = list(tokens)
    states = np.zeros((len(columns), len(tokens), info.hidden_size), dtype=info.states_dtype)
    peaks = np.zeros((len(columns), len(tokens)), dtype=np.float32)
    readable = [row for row, one in enumerate(tokens) if one.error is None]
    for row, response in zip(readable, responses, strict=True):
        if isinstance(response, str):
            tokens[row] = replace(tokens[row], ids=[], error=response)
            continue
        with np.errstate(over="ignore"):  # overflow is reported through `peaks`
            states[:, row] = response
        peaks[:, row] = np.abs(response).max(axis=1)
    return activations_table(prompts.column("query_id"), prompts.column("prompt"), tokens, columns, states, peaks)
