"""Memory and time of `jobs.train` on outcomes tables with much text.

Writes one of two tables and matching activations with random states to OUTPUT, then trains in a process of its own:

- `repeated`: 300 prompts of 240 kB and 32 models; summed over rows the text has 2.1 GiB, the file a few kB;
- `distinct`: 2,600 prompts of 1 MiB and 3 models: 2.5 GiB of distinct text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.pool import Pool, TargetModel, save_pool
from prefill_router.prefill.encoder import EncoderInfo, Tokens, activations_table
from prefill_router.prefill.shards import PARQUET, ActivationsHeader, finish, open_dataset

COLUMNS, HIDDEN = ("mean_L1", "mean_L2"), 32
FIT = ("--fit.components", "4", "--fit.trunk.members", "3", "--fit.trunk.max-epochs", "8", "--fit.trunk.kept", "2")


class MemoryConfig(FrozenModel):
    """The table, and the folder for inputs and checkpoint."""

    table: Annotated[Literal["repeated", "distinct"], Field(description="300 repeated or 2,600 distinct prompts")]
    output: Annotated[Path, Field(description="output folder")]


def run(config: MemoryConfig) -> str:
    """Train on a table with much text in a process of its own; print its peak memory and time."""
    # Inputs are written in another process: Linux counts the memory of the process that starts the training as well.
    writer = get_context("spawn").Process(target=write_inputs, args=(config,))
    writer.start()
    writer.join()
    files = {"outcomes": "outcomes.parquet", "pool": "pool.yaml", "activations": "activations", "output": "run"}
    paths = [f"--{name}={config.output / file}" for name, file in files.items()]
    started = time.perf_counter()
    training = subprocess.Popen([sys.executable, "-m", "jobs.train", *paths, *FIT])
    _, status, usage = os.wait4(training.pid, 0)
    seconds = time.perf_counter() - started
    size_mb = (config.output / "outcomes.parquet").stat().st_size / 1e6
    return (
        f"{config.table}: file of {size_mb:,.2f} MB, exit code {os.waitstatus_to_exitcode(status)}, peak memory "
        f"{usage.ru_maxrss / 2**20:.2f} GiB, {seconds:.0f} s"
    )


def write_inputs(config: MemoryConfig) -> None:
    """Writes pool, outcomes and activations."""
    queries, size, models = (300, 240_000, 32) if config.table == "repeated" else (2_600, 2**20, 3)
    config.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = [f"{q:08d} " + "word " * (size // 5) for q in range(queries)]
    ids = [f"q{q}" for q in range(queries)]
    names = [f"m{m}" for m in range(models)]
    pool = Pool(models=tuple(TargetModel(name=n, input_usd_per_mtok=1.0, output_usd_per_mtok=1.0) for n in names))
    save_pool(pool, config.output / "pool.yaml")
    _write_outcomes(config.output / "outcomes.parquet", ids, prompts, names, rng)
    _write_activations(config.output / "activations", ids, prompts, rng)


def _write_outcomes(path: Path, ids: list[str], prompts: list[str], names: list[str], rng: np.random.Generator) -> None:
    """Writes one row group per 300 queries, each with a dictionary of its prompts."""
    writer: pq.ParquetWriter | None = None
    for start in range(0, len(ids), 300):
        queries, models = len(ids[start : start + 300]), len(names)
        text = pa.array(prompts[start : start + 300], pa.string())
        table = pa.table(
            {
                "query_id": np.repeat(ids[start : start + 300], models),
                "benchmark": pa.array(["b"] * queries * models),
                "prompt": pa.DictionaryArray.from_arrays(np.repeat(np.arange(queries), models), text),
                "model": np.tile(names, queries),
                "correct": rng.integers(0, 2, queries * models),
                "output_tokens": rng.integers(1, 100, queries * models),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_activations(folder: Path, ids: list[str], prompts: list[str], rng: np.random.Generator) -> None:
    info = EncoderInfo(
        model="random", revision=None, architecture="none", weights_digest="0" * 64, tokenizer_digest="0" * 64,
        attention="causal", last_token="last real token", n_layers=2, hidden_size=HIDDEN, max_length=512,
        truncation_side="left", template=None, dtype="float32", states_dtype="float32", backend="none",
    )  # fmt: skip
    header = ActivationsHeader(encoder=info, columns=COLUMNS, config={"encoder": {"layers": [1, 2]}})
    text = pa.table({"query_id": ids, "prompt": pa.array(prompts, pa.large_string())})
    open_dataset(folder, header, text)
    states = rng.normal(size=(len(COLUMNS), len(ids), HIDDEN)).astype(np.float32)
    tokens = [Tokens([q], 1) for q in range(len(ids))]
    rows = activations_table(
        text.column("query_id"), text.column("prompt"), tokens, COLUMNS, states, np.abs(states).max(axis=2)
    )
    pq.write_table(rows, folder / "part.parquet", **PARQUET)
    finish(folder, header)


if __name__ == "__main__":
    main(MemoryConfig, run)
