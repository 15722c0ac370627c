"""How prefill scales: efficiency over actors, memory of the driver over prompts, and the time to resume.

A simulated encoder (benchmarks/simulated.py) runs through the code of `jobs.prefill`: `open_dataset`, `write_shards` on
a local Ray with one actor per logical CPU, `finish`. Parts:

- `actors`: one run per number of actors. Efficiency is the time that the tokens take at the given speed, divided by
  the time of the actors: from end to end, and in the steady state, in which every actor has started and none has
  finished its last shard;
- `driver`: peak memory of the driver in every stage, for several numbers of prompts;
- `resume`: an unfinished dataset, with several shares of its rows present;
- `plan`: peak memory and time of the stages that do not need Ray, for millions of short prompts.

Every run of `driver`, `resume` and `plan` has a process of its own.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from benchmarks.simulated import SimulatedEncoder, Simulation, simulated_prompts, write_prompts
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import prompt_digest, write_json
from prefill_router.locations import LocalPath
from prefill_router.prefill.prompts import read_prompts
from prefill_router.prefill.shards import (
    MAX_ROWS,
    finish,
    input_digest,
    open_dataset,
    pending_prompts,
)

MEDIAN_WORDS = 150.0  # of a prompt
SHORT_WORDS = 12.0  # of a prompt of part `plan`
CPUS = 64  # logical CPUs of the local Ray
SAMPLE_S = 0.05  # seconds between two looks at the memory
FULL_S = 40.0  # seconds of a full run of part `resume`

Part = Literal["actors", "driver", "resume", "plan"]


class ScaleConfig(FrozenModel):
    """The part to measure and its sizes."""

    part: Annotated[Part, Field(description="what to measure")]
    output: Annotated[LocalPath, Field(description="folder for PART.json")] = Path("runs/benchmarks/scale")
    actors: Annotated[tuple[int, ...], Field(min_length=1, description="numbers of actors of part `actors`")] = (1, 4)
    shard_s: Annotated[float, Field(gt=0, description="seconds of an average shard of part `actors`")] = 20.0
    shards_per_actor: Annotated[int, Field(ge=1, description="shards per actor of part `actors`")] = 6
    rows_per_shard: Annotated[int, Field(ge=1, description="prompts of a shard of part `actors`")] = 64
    rows: Annotated[tuple[int, ...], Field(min_length=1, description="numbers of prompts of the other parts")] = (
        10_000,
        30_000,
        100_000,
    )
    done: Annotated[tuple[float, ...], Field(description="shares of rows present, of part `resume`")] = (0.1, 0.5, 0.9)
    workers: Annotated[int, Field(ge=1, description="actors of parts `driver` and `resume`")] = 8


@dataclass
class Stages:
    """Seconds and peak memory in MiB of named stages of this process.

    Memory is anonymous memory. Pages of mapped files do not count, because the system drops them when it needs memory.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the body. The peak is that of the process, so it includes what earlier stages keep."""
        self.peak_mib[name], done = 0.0, Event()

        def watch() -> None:
            running = True
            while running:
                running = not done.wait(SAMPLE_S)
                self.peak_mib[name] = max(self.peak_mib[name], memory_kib("RssAnon") / 1024)

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - began
            done.set()
            watcher.join()


def run(config: ScaleConfig) -> str:
    """Measure how prefill scales with a simulated encoder; print a table."""
    measure: dict[Part, Callable[[ScaleConfig], list[dict[str, Any]]]] = {
        "actors": _actors,
        "driver": lambda config: [_alone(_driver, rows, config) for rows in config.rows],
        "resume": lambda config: [_alone(_resume, share, config) for share in config.done],
        "plan": lambda config: [_alone(_plan, rows, config) for rows in config.rows],
    }
    found = measure[config.part](config)
    target = config.output / f"{config.part}.json"
    write_json(target, {"config": config.model_dump(mode="json"), "runs": found})
    return f"{len(found)} runs of part {config.part}; figures in {target}"


def _actors(config: ScaleConfig) -> list[dict[str, Any]]:
    from prefill_router.cluster import connect

    connect(num_cpus=CPUS)
    print("| actors | shards | ideal s | wall s | efficiency | start s | steady window s | steady efficiency |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found = []
    for actors in config.actors:
        one = _run_actors(actors, config)
        found.append(one)
        print(
            f"| {actors} | {one['shards']} | {one['ideal_s']:.1f} | {one['wall_s']:.1f} | {one['efficiency']:.3f} | "
            f"{one['start_s']:.1f} | {one['window_s']:.1f} | {one['steady_efficiency']:.3f} |",
            flush=True,
        )
    return found


def _run_actors(actors: int, config: ScaleConfig) -> dict[str, Any]:
    shards = actors * config.shards_per_actor
    prompts = simulated_prompts(shards * config.rows_per_shard, MEDIAN_WORDS)
    tokens = sum(text.count("token ") for text in prompts.column("prompt").to_pylist())
    with _scratch(config) as folder:
        simulation = Simulation(tokens_per_s=tokens / (shards * config.shard_s), times=folder / "times")
        (folder / "times").mkdir()
        began, _ = _encode(folder, prompts, simulation, config.rows_per_shard, actors)
        ended = time.monotonic()
        logs = [np.loadtxt(path, ndmin=2) for path in (folder / "times").iterdir()]
    ideal = shards * config.shard_s / actors
    first, last = max(log[0, 0] for log in logs), min(log[-1, 1] for log in logs)
    busy = sum(np.clip(np.minimum(log[:, 1], last) - np.maximum(log[:, 0], first), 0, None).sum() for log in logs)
    return {
        "actors": len(logs),
        "shards": shards,
        "ideal_s": ideal,
        "wall_s": ended - began,
        "efficiency": ideal / (ended - began),
        "start_s": first - began,
        "window_s": last - first,
        "steady_efficiency": busy / (actors * (last - first)) if last > first else math.nan,
    }


def _driver(rows: int, config: ScaleConfig) -> dict[str, Any]:
    stages = Stages()
    with _scratch(config) as folder:
        _write_prompts(folder, rows, MEDIAN_WORDS)
        baseline = memory_kib("RssAnon") / 1024
        simulation = Simulation(tokens_per_s=math.inf)
        with stages.stage("read"):
            prompts = read_prompts(folder / "prompts.parquet")
        text_mib = prompts.nbytes / 2**20
        _, stages = _encode(folder, prompts, simulation, MAX_ROWS, config.workers, stages)
        shards = [path.stat().st_size for path in (folder / "data").glob("*.parquet")]
    found = {
        "rows": rows,
        "text_mib": text_mib,
        "baseline_mib": baseline,
        "shards": len(shards),
        "shard_mib": float(np.median(shards)) / 2**20,
        **asdict(stages),
    }
    _print(
        f"{rows:,} prompts, {text_mib:,.0f} MiB of text, {len(shards)} shards of {found['shard_mib']:.1f} MiB", found
    )
    return found


def _resume(share: float, config: ScaleConfig) -> dict[str, Any]:
    rows, stages = config.rows[-1], Stages()
    prompts = simulated_prompts(rows, MEDIAN_WORDS)
    tokens = sum(text.count("token ") for text in prompts.column("prompt").to_pylist())
    simulation = Simulation(tokens_per_s=tokens / config.workers / FULL_S)
    with _scratch(config) as folder:
        data, present = folder / "data", int(rows * share)
        encode = SimulatedEncoder(simulation.model_copy(update={"tokens_per_s": math.inf}))
        open_dataset(data, simulation.header, prompts)
        for start in range(0, present, MAX_ROWS):
            pq.write_table(encode(prompts.slice(start, min(MAX_ROWS, present - start))), data / f"was-{start}.parquet")
        _, stages = _encode(folder, prompts, simulation, MAX_ROWS // 4, config.workers, stages)
    found = {"rows": rows, "present": present, "left": rows - present, **asdict(stages)}
    _print(f"{share:.0%} of {rows:,} prompts present", found)
    return found


def _plan(rows: int, config: ScaleConfig) -> dict[str, Any]:
    stages = Stages()
    with _scratch(config) as folder:
        _write_prompts(folder, rows, SHORT_WORDS)
        baseline = memory_kib("RssAnon") / 1024
        with stages.stage("read"):
            prompts = read_prompts(folder / "prompts.parquet")
        text_mib = prompts.nbytes / 2**20
        with stages.stage("open"):
            open_dataset(folder / "data", Simulation(tokens_per_s=1).header, prompts)
        with stages.stage("slice"):
            shards = [prompts.slice(start, MAX_ROWS) for start in range(0, rows, MAX_ROWS)]
        half = prompts.slice(0, rows // 2)
        with stages.stage("digests of stored rows"):
            digests = [prompt_digest(text) for text in half.column("prompt").to_pylist()]
            stored = pa.table({"query_id": half.column("query_id"), "prompt_digest": digests})
            del digests
        with stages.stage("pending"):
            pending = pending_prompts(prompts, stored, folder)
        assert pending.num_rows == rows - rows // 2
        del pending
        with stages.stage("digest of the input"):
            input_digest(stored)
    found = {"rows": rows, "text_mib": text_mib, "baseline_mib": baseline, "shards": len(shards), **asdict(stages)}
    _print(f"{rows:,} short prompts, {text_mib:,.0f} MiB of text, {len(shards):,} shards", found)
    return found


def _encode(
    folder: Path, prompts: pa.Table, simulation: Simulation, rows: int, actors: int, stages: Stages | None = None
) -> tuple[float, Stages]:
    """Opens, encodes and finishes the dataset as `jobs.prefill` does. Returns when encoding began, and the stages."""
    from jobs.shards import write_shards
    from prefill_router.cluster import connect

    stages, data = stages or Stages(), folder / "data"
    with stages.stage("connect"):
        connect(num_cpus=CPUS)
    with stages.stage("open"):
        opened = open_dataset(data, simulation.header, prompts)
    began = time.monotonic()
    with stages.stage("encode"):
        write_shards(
            f"{actors} actors", data, opened.pending, SimulatedEncoder, simulation, rows, actors, {"num_cpus": 1}
        )
    with stages.stage("finish"):
        counts = finish(data, simulation.header).counts
    assert counts.rows == prompts.num_rows, counts
    return began, stages


def memory_kib(field: str) -> int:
    """Memory of this process in KiB: a field of /proc/self/status, as in VmRSS. Other modules with it import torch."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _write_prompts(folder: Path, rows: int, median_words: float) -> None:
    """Writes the prompts in another process, so that this one's memory is that of reading them."""
    writer = get_context("spawn").Process(target=write_prompts, args=(folder / "prompts.parquet", rows, median_words))
    writer.start()
    writer.join()


def _alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        return own.submit(measure, *arguments).result()


@contextmanager
def _scratch(config: ScaleConfig) -> Iterator[Path]:
    """A folder below the output for the inputs and the dataset, deleted afterwards."""
    config.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=config.output)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print(title: str, found: dict[str, Any]) -> None:
    without = f"; process without data {found['baseline_mib']:,.0f} MiB" if "baseline_mib" in found else ""
    print(f"\n{title}{without}")
    for name, seconds in found["seconds"].items():
        print(f"  {name:24} {seconds:8.1f} s, peak {found['peak_mib'][name]:8,.0f} MiB", flush=True)


if __name__ == "__main__":
    main(ScaleConfig, run)
