"""Peak memory and time of `jobs.probe` and `jobs.train` as the number of queries grows.

Writes outcomes, a pool and activations with random states to a scratch folder for every number of queries, then runs
the job in a process of its own. The trunk trains few members for few epochs, because neither changes the memory.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from benchmarks.simulated import SimulatedEncoder, Simulation, simulated_prompts
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.pool import Pool, TargetModel, save_pool
from prefill_router.prefill.shards import MAX_ROWS, PARQUET, finish, open_dataset

WORDS = 40.0  # median words of a prompt
TRUNK = ("--fit.trunk.members=2", "--fit.trunk.kept=1", "--fit.trunk.max-epochs=2", "--fit.lengths=median")


class FitMemoryConfig(FrozenModel):
    """The job and the sizes of its inputs."""

    output: Annotated[LocalPath, Field(description="folder for JOB.json")] = Path("runs/benchmarks/fit_memory")
    job: Annotated[Literal["probe", "train"], Field(description="job to measure")] = "probe"
    queries: Annotated[tuple[int, ...], Field(min_length=1, description="numbers of queries, a list")] = (3_000, 10_000)
    layers: Annotated[int, Field(ge=1, description="layers stored, with one pooling")] = 4
    hidden: Annotated[int, Field(ge=8, description="width of the states")] = 384
    targets: Annotated[int, Field(ge=1, description="models of the pool")] = 4


def run(config: FitMemoryConfig) -> str:
    """Measure peak memory and time of the layer search or of training for several numbers of queries."""
    config.output.mkdir(parents=True, exist_ok=True)
    found = [_measure(config, queries) for queries in config.queries]
    target = config.output / f"{config.job}.json"
    write_json(target, {"config": config.model_dump(mode="json"), "runs": found})
    slope = (found[-1]["peak_mib"] - found[0]["peak_mib"]) * 2**20 / max(1, config.queries[-1] - config.queries[0])
    return f"jobs.{config.job}: {slope / 1024:,.1f} KiB per query beyond the first size; figures in {target}"


def _measure(config: FitMemoryConfig, queries: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=config.output)).resolve()
    try:
        # Another process writes: Linux counts the memory of the process that starts the job as well.
        writer = get_context("spawn").Process(target=write_inputs, args=(folder, queries, config))
        writer.start()
        writer.join()
        paths = {"outcomes": "outcomes.parquet", "pool": "pool.yaml", "activations": "activations", "output": "run"}
        options = [f"--{name}={folder / file}" for name, file in paths.items()]
        started = time.perf_counter()
        log = (folder / "log").open("w+")
        job = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{config.job}", *options, *(TRUNK if config.job == "train" else ())],
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
        )
        _, status, usage = os.wait4(job.pid, 0)
        found = {
            "queries": queries,
            "exit": os.waitstatus_to_exitcode(status),
            "peak_mib": usage.ru_maxrss / 1024,
            "seconds": time.perf_counter() - started,
            "column_mib": queries * config.hidden * 2 / 2**20,
        }
        print(
            f"jobs.{config.job}: {queries:,} queries, {config.layers} layers x {config.hidden}: peak "
            f"{found['peak_mib']:,.0f} MiB, {found['seconds']:.0f} s, exit code {found['exit']}",
            flush=True,
        )
        if found["exit"]:
            print((folder / "log").read_text()[-1500:])
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_inputs(folder: Path, queries: int, config: FitMemoryConfig) -> None:
    """Writes pool, outcomes and activations."""
    rng = np.random.default_rng(0)
    names = [f"m{model}" for model in range(config.targets)]
    pool = Pool(models=tuple(TargetModel(name=n, input_usd_per_mtok=1.0, output_usd_per_mtok=1.0) for n in names))
    save_pool(pool, folder / "pool.yaml")
    simulation = Simulation(tokens_per_s=math.inf, hidden=config.hidden, layers=config.layers)
    encode, data = SimulatedEncoder(simulation), folder / "activations"
    prompts = simulated_prompts(queries, WORDS)
    open_dataset(data, simulation.header, prompts)
    for start in range(0, queries, MAX_ROWS):
        pq.write_table(encode(prompts.slice(start, MAX_ROWS)), data / f"{start:09d}.parquet", **PARQUET)
    finish(data, simulation.header)
    rows = np.repeat(np.arange(queries), config.targets)
    text = {
        name: pa.DictionaryArray.from_arrays(pa.array(rows), prompts.column(name).combine_chunks())
        for name in ("query_id", "prompt")
    }
    table = pa.table(
        {
            **text,
            "benchmark": np.array(["a", "b"])[rows % 2],
            "model": np.tile(names, queries),
            "correct": rng.integers(0, 2, len(rows)),
            "output_tokens": rng.integers(1, 100, len(rows)),
        }
    )
    pq.write_table(table, folder / "outcomes.parquet", compression="zstd")


if __name__ == "__main__":
    main(FitMemoryConfig, run)
