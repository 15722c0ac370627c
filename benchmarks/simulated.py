"""A simulated encoder and simulated prompts, for measurements of everything around an encoder.

`SimulatedEncoder` has the interface that `jobs.shards.write_shards` maps over prompts: it sleeps for the time that the
prompts' tokens take at a given speed and returns random states of the activations schema. A word is a token.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from prefill_router.config import FrozenModel
from prefill_router.locations import LocalPath
from prefill_router.prefill.encoder import EncoderInfo, Tokens, activations_table
from prefill_router.prefill.shards import ActivationsHeader

BLOCK = 100_000  # prompts generated at once
WORD = "token "


class Simulation(FrozenModel):
    """Speed and shape of a simulated encoder."""

    tokens_per_s: Annotated[float, Field(gt=0, description="tokens per second of an actor; inf: no sleep")]
    hidden: Annotated[int, Field(ge=1, description="width of the states")] = 384
    layers: Annotated[int, Field(ge=1, description="layers stored, with one pooling")] = 2
    times: Annotated[
        LocalPath | None,
        Field(description="folder for a file per process with the start and end of its shards"),
    ] = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the states."""
        return tuple(f"mean_L{layer + 1}" for layer in range(self.layers))

    @property
    def header(self) -> ActivationsHeader:
        """The header of the dataset."""
        info = EncoderInfo(
            model="simulated", revision=None, architecture="none", weights_digest="0" * 64, tokenizer_digest="0" * 64,
            attention="causal", last_token="last real token", n_layers=self.layers, hidden_size=self.hidden,
            max_length=8192, truncation_side="left", template=None, dtype="float32", states_dtype="float16",
            backend="none",
        )  # fmt: skip
        return ActivationsHeader(
            encoder=info, columns=self.columns, config={"encoder": {"layers": list(range(1, self.layers + 1))}}
        )


class SimulatedEncoder:
    """Sleeps as long as an encoder would compute, and returns random states."""

    def __init__(self, config: Simulation) -> None:
        self._config = config
        self._rng = np.random.default_rng(os.getpid())

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Rows of the activations schema, in the order of the prompts."""
        began = time.monotonic()
        config, texts = self._config, prompts.column("prompt").to_pylist()
        counts = [text.count(WORD) for text in texts]
        states = self._rng.standard_normal((len(config.columns), len(texts), config.hidden), dtype=np.float32)
        states = states.astype(np.float16)
        rows = activations_table(
            prompts.column("query_id"),
            prompts.column("prompt"),
            [Tokens([hash(text) & 0xFFFF] * count, count) for text, count in zip(texts, counts, strict=True)],
            config.columns,
            states,
            np.abs(states).max(axis=2).astype(np.float32),
        )
        time.sleep(max(0.0, began + sum(counts) / config.tokens_per_s - time.monotonic()))
        if config.times is not None:
            with (config.times / str(os.getpid())).open("a") as log:
                log.write(f"{began} {time.monotonic()}\n")
        return rows


def simulated_prompts(rows: int, median_words: float, seed: int = 0, first: int = 0) -> pa.Table:
    """`rows` prompts of lognormal length with ids from `first` on, as `read_prompts` returns them."""
    rng = np.random.default_rng([seed, first])
    lengths = np.clip(np.exp(rng.normal(np.log(median_words), 0.6, rows)), 1, 2048).astype(int)
    ids = [f"query-{row:010d}" for row in range(first, first + rows)]
    texts = [f"{row} {WORD * words}" for row, words in zip(range(first, first + rows), lengths.tolist(), strict=True)]
    return pa.table({"query_id": ids, "prompt": texts})


def write_prompts(path: Path, rows: int, median_words: float) -> None:
    """Writes simulated prompts to a Parquet file, in blocks."""
    writer: pq.ParquetWriter | None = None
    for first in range(0, rows, BLOCK):
        table = simulated_prompts(min(BLOCK, rows - first), median_words, first=first)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
