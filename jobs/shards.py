"""Shared by the prefill and features jobs: maps a class over prompts with Ray Data and writes Parquet shards.

In: prompts. Out: shards with one row per prompt. The library defines the class and the dataset (prefill/shards.py).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import pyarrow as pa
import ray
from pydantic import Field
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from prefill_router.errors import UnavailableError
from prefill_router.locations import ObjectPath
from prefill_router.outcomes.table import read_outcomes, unique_prompts
from prefill_router.prefill.shards import PARQUET, ShardCounter, read_prompts
from prefill_router.text_columns import column_names

RowsPerShard = Annotated[
    int | None,
    Field(
        ge=1,
        description="prompts per task and per Parquet shard; None: 64 to 1,024, about 30 seconds of an actor's work",
    ),
]


def input_prompts(path: Path) -> pa.Table:
    """The (query_id, prompt) rows of an outcomes table or a prompts file. Raises InputError if the file is invalid."""
    is_outcomes = {"model", "correct"} <= set(column_names(path))
    return unique_prompts(read_outcomes(path)) if is_outcomes else read_prompts(path)


def write_shards(
    label: str,
    folder: Path,
    prompts: pa.Table,
    extractor: type,
    config: Any,
    rows: int,
    actors: int,
    resources: dict[str, Any],
    bare_tokens_per_s: float | None = None,
) -> None:
    """Maps `extractor(config)` over the prompts and writes one shard per `rows` prompts into `folder`.

    `label` is the label of the progress bar. `bare_tokens_per_s` is the throughput of one actor's forward pass alone;
    the bar shows the measured throughput relative to it. Ray Data replaces an actor whose process or node fails and
    repeats its tasks.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False  # they count Ray Data blocks, not prompts
    shards = [prompts.slice(start, rows) for start in range(0, prompts.num_rows, rows)]
    mapped = ray.data.from_arrow(shards).map_batches(
        extractor,
        fn_constructor_args=(config,),
        batch_size=rows,
        batch_format="pyarrow",  # Ray Data refuses None together with GPUs
        compute=ActorPoolStrategy(size=actors),
        **resources,
    )
    with _progress(label, folder, prompts.num_rows, actors, bare_tokens_per_s):
        # Writers request no CPU, because the actors may occupy all CPUs.
        path, store = str(folder.resolve()), {}
        if isinstance(folder, ObjectPath):
            path, store = folder.key, {"filesystem": folder.filesystem, "try_create_dir": False}
        mapped.write_parquet(path, concurrency=actors, ray_remote_args={"num_cpus": 0}, **store, **PARQUET)


@contextmanager
def _progress(label: str, folder: Path, rows: int, actors: int, bare_tokens_per_s: float | None) -> Iterator[None]:
    """A progress bar of the prompts whose rows are on disk, with the throughput in tokens per second."""
    counter, done = ShardCounter(folder, time.monotonic()), Event()
    interval = 1 if sys.stderr.isatty() else 10

    def watch() -> None:
        with tqdm(total=rows, desc=label, unit=" prompts", mininterval=interval) as bar:
            running = True
            while running:
                running = not done.wait(interval)
                now = time.monotonic()
                with suppress(UnavailableError):
                    counter.update(now)
                bar.set_postfix_str(throughput(counter.tokens_per_s(now), actors, bare_tokens_per_s), refresh=False)
                bar.update(counter.rows - bar.n)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def throughput(tokens_per_s: float | None, actors: int, bare_tokens_per_s: float | None) -> str:
    """Throughput of all actors, and its ratio to `actors` times `bare_tokens_per_s`; empty if it is unknown."""
    if tokens_per_s is None:
        return ""
    ratio = f", {tokens_per_s / actors / bare_tokens_per_s:.2f} of the bare forward" if bare_tokens_per_s else ""
    return f"{tokens_per_s:,.0f} tokens/s{ratio}"
