"""Prompts in, Parquet shards of one row per prompt out, by a class that Ray Data maps: what prefill and features share.

Resources and plumbing only: what the class does is the library's, and so are the shards (prefill/shards.py).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from prefill_router.outcomes.table import read_outcomes, unique_prompts
from prefill_router.prefill.shards import PARQUET, ShardCounter, read_prompts


def input_prompts(path: Path) -> pa.Table:
    """(query_id, prompt) of an outcomes table or a plain prompts file. Raises InputError as their readers do."""
    try:
        names = pq.read_schema(path).names
    except (FileNotFoundError, pa.ArrowInvalid, OSError):
        names = []  # the readers below say what is wrong
    return unique_prompts(read_outcomes(path)) if {"model", "correct"} <= set(names) else read_prompts(path)


def write_shards(
    name: str,
    folder: Path,
    prompts: pa.Table,
    kind: type,
    config: Any,
    rows: int,
    actors: int,
    resources: dict[str, Any],
    bare_tokens_per_s: float | None = None,
) -> None:
    """Maps `kind(config)` over the prompts, `rows` of them a task and a shard, with a progress bar called `name`.

    The bar's throughput is set against `bare_tokens_per_s` of one actor where that is known. An actor that dies, with
    its node or without, is started anew and its tasks done again: Ray Data does so unless told otherwise.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False  # they count blocks; ours counts prompts
    shards = [prompts.slice(start, rows) for start in range(0, prompts.num_rows, rows)]
    mapped = ray.data.from_arrow(shards).map_batches(
        kind,
        fn_constructor_args=(config,),
        batch_size=rows,
        batch_format="pyarrow",  # None is refused beside GPUs
        compute=ActorPoolStrategy(size=actors),
        **resources,
    )
    with _progress(name, folder, prompts.num_rows, actors, bare_tokens_per_s):
        # Writers ask for no CPU, or actors that fill the cluster would leave them none.
        mapped.write_parquet(str(folder.resolve()), concurrency=actors, ray_remote_args={"num_cpus": 0}, **PARQUET)


@contextmanager
def _progress(name: str, folder: Path, rows: int, actors: int, bare_tokens_per_s: float | None) -> Iterator[None]:
    """A bar that counts the prompts whose rows are on disk, and the tokens of these."""
    counter, done = ShardCounter(folder, time.monotonic()), Event()
    interval = 1 if sys.stderr.isatty() else 10

    def watch() -> None:
        with tqdm(total=rows, desc=name, unit=" prompts", mininterval=interval) as bar:
            going = True
            while going:
                going = not done.wait(interval)
                now = time.monotonic()
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
    """Of all actors together, and as a share of what as many forward passes alone would do if none slowed another."""
    if tokens_per_s is None:
        return ""
    share = f", {tokens_per_s / actors / bare_tokens_per_s:.2f} of the bare forward" if bare_tokens_per_s else ""
    return f"{tokens_per_s:,.0f} tokens/s{share}"
