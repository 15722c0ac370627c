"""Shared by the prefill and features jobs: maps a class over prompts with Ray Data and writes Parquet shards.

In: prompts. Out: shards with one row per prompt, also for a prompt that ends or blocks the process that encodes it
(prefill/isolation.py). The library defines the class and the dataset (prefill/shards.py).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import ray
from pydantic import Field
from ray.data import ActorPoolStrategy, DataContext

from jobs.placement import on_this_node
from prefill_router.cluster import answer
from prefill_router.errors import InputError, UnavailableError
from prefill_router.files import disk_full, free_bytes, is_full
from prefill_router.locations import ObjectPath
from prefill_router.outcomes.table import read_outcomes, unique_prompts
from prefill_router.prefill.isolation import Attempts, Deadline, Part, encode_in_parts, ends_after, sample_parts
from prefill_router.prefill.prompts import read_prompts
from prefill_router.prefill.shard_counter import ShardCounter
from prefill_router.prefill.shards import PARQUET, remove_damaged
from prefill_router.progress import tqdm, waiting
from prefill_router.text_columns import column_names

RowsPerShard = Annotated[
    int | None,
    Field(
        ge=1,
        description="prompts per task and per Parquet shard; None: 64 to 1,024, about 30 seconds of an actor's work",
    ),
]
ShardTimeout = Annotated[
    float | None,
    Field(
        gt=0,
        le=1e9,
        description="seconds after which the process that encodes a shard ends and the shard is tried again; None: "
        "20 times the time expected from the test, plus 120 s; 30 minutes for the test itself",
    ),
]
TEST_TIMEOUT_S = 1800.0
LOAD_TIMEOUT_S = 1800.0  # at least; shard_timeout_s if it is larger
TIMEOUTS = 3  # of a test: a prompt that blocks its encoder costs two, of the sample and of the half that has it
SPARE_STARTS = 3  # encoders that may end their process while they load, besides one per actor
POLL_S = 1.0  # seconds between two looks at the rows within shards
ROUNDS = 3  # runs over what is missing: tasks of a killed run may damage or delete shards
Result = TypeVar("Result")


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
    limit: Deadline | None = None,
    needed: int | None = None,
) -> None:
    """Maps `extractor(config)` over the prompts and writes one shard per `rows` prompts into `folder`.

    `label` is the label of the progress bar. `bare_tokens_per_s` is the throughput of one actor's forward pass alone;
    the bar shows the measured throughput relative to it. Ray Data replaces an actor whose process or node fails and
    repeats its tasks; a prompt that ends its process or exceeds `limit` twice gets an error row. `needed`: estimated
    bytes to write, for the UnavailableError of a full disk.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False  # they count Ray Data blocks, not prompts
    shards = [prompts.slice(start, rows) for start in range(0, prompts.num_rows, rows)]
    record = ray.remote(**on_this_node())(Attempts).remote()
    mapped = ray.data.from_arrow(shards).map_batches(
        _Isolated,
        fn_constructor_args=(extractor, config, record, limit, actors + SPARE_STARTS),
        batch_size=rows,
        batch_format="pyarrow",  # Ray Data refuses None together with GPUs
        compute=ActorPoolStrategy(size=actors),
        **resources,
    )
    with _progress(label, folder, prompts.num_rows, actors, bare_tokens_per_s, record):
        # Writers request no CPU, because the actors may occupy all CPUs.
        path, store = str(folder.resolve()), {}
        if isinstance(folder, ObjectPath):
            path, store = folder.key, {"filesystem": folder.filesystem, "try_create_dir": False}
        try:
            mapped.write_parquet(path, concurrency=actors, ray_remote_args={"num_cpus": 0}, **store, **PARQUET)
        except Exception as error:
            if (reason := _STARTS.format(actors + SPARE_STARTS)) in str(error):  # within Ray's text
                raise InputError(f"{label}: {reason}") from None
            if isinstance(folder, ObjectPath) or not is_full(error):
                raise
            remove_damaged(folder)
            raise disk_full(folder, needed) from None


_STARTS = (
    "{} processes in a row ended while they loaded the encoder; the logs of Ray's workers have their last words; try "
    "another device, backend or dtype, fewer actors, or a larger shard_timeout_s"
)


def load_limit(limit_s: float | None) -> float:
    """Seconds after which a process that loads an encoder ends. `limit_s`: the given shard_timeout_s."""
    return max(LOAD_TIMEOUT_S, limit_s or 0.0)


class _Isolated:
    """Encodes shards in an actor. `record` is the actor of the run's `Attempts`.

    Raises InputError if `starts` processes in a row ended while they loaded the encoder; Ray would go on for ever.
    """

    def __init__(self, extractor: type, config: Any, record: Any, limit: Deadline | None, starts: int) -> None:
        self.record, self.limit = _RemoteRecord(record), limit
        if ray.get(record.begin_start.remote()) > starts:
            raise InputError(_STARTS.format(starts))
        try:
            with ends_after(load_limit(limit.fixed if limit else None)):
                self.encode = extractor(config)
        finally:  # the process has not ended: Ray Data counts exceptions itself
            ray.get(record.end_start.remote())
        if hasattr(self.encode, "on_rows"):
            self.encode.on_rows = _RowCount(record)

    def __call__(self, prompts: pa.Table) -> pa.Table:
        return encode_in_parts(self.encode, prompts, self.record, self.limit)


class _RowCount:
    """Sends the number of encoded rows to the actor of the run's `Attempts`, at most once per second."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.rows, self.due = actor, 0, 0.0

    def __call__(self, rows: int) -> None:
        self.rows += rows
        if time.monotonic() >= self.due:
            self.actor.add.remote(self.rows)
            self.rows, self.due = 0, time.monotonic() + 1


class _RemoteRecord:
    """`isolation.Record` by an actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def parts(self, shard: str, rows: int) -> list[Part]:
        parts: list[Part] = ray.get(self.actor.parts.remote(shard, rows))
        return parts

    def begin(self, shard: str, part: Part) -> None:
        ray.get(self.actor.begin.remote(shard, part))

    def end(self, shard: str, part: Part) -> None:
        ray.get(self.actor.end.remote(shard, part))


def run_on_sample(
    label: str, test: Callable[..., Result], argument: Any, sample: pa.Table, resources: dict[str, Any], limit_s: float
) -> Result:
    """`test(argument, sample, limit_s)` in a task. If the task's process ends, on smaller parts of the sample.

    A process that ends after `limit_s` has hung: the sample is not tried again, but its halves are. Raises InputError
    if it ends on every part, or hangs TIMEOUTS times.
    """
    task = ray.remote(max_retries=0, **resources)(test)
    ended = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    reason, hung = "", list[Part]()
    for part in sample_parts(sample.num_rows):
        if part in hung:
            continue
        if len(hung) == TIMEOUTS:
            break
        rows, began = sample.slice(part.start, part.stop - part.start), time.monotonic()
        try:
            with waiting(f"{label}: testing"):
                result: Result = answer(task.remote(argument, rows, limit_s))
        except ended as error:
            reason = " ".join(str(error).split())[:200]
            if time.monotonic() - began >= limit_s:
                hung.append(part)
            print(f"{label}: the process that tests {rows.num_rows} prompts ended; trying again", flush=True)
        else:
            return result
    where = "parts of them after the time limit" if len(hung) == TIMEOUTS else "each part of them"
    raise InputError(
        f"{label}: the process that tests {sample.num_rows} prompts ended on {where} ({reason}); the logs "
        "of Ray's workers have its last words; try another device, backend or dtype, or a larger shard_timeout_s"
    )


def check_space(folders: dict[Path, int]) -> None:
    """Raises UnavailableError if the disk of a folder has less space than the bytes to be written to all of them."""
    needed: dict[int, int] = {}
    for folder, size in folders.items():
        if not isinstance(folder, ObjectPath):
            device = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()).stat().st_dev
            needed[device] = needed.get(device, 0) + size
            if free_bytes(folder) < needed[device]:
                raise disk_full(folder, needed[device])


@contextmanager
def _progress(
    label: str, folder: Path, rows: int, actors: int, bare_tokens_per_s: float | None, record: Any
) -> Iterator[None]:
    """A progress bar of the encoded prompts, with the throughput in tokens per second.

    An encoder that counts rows within a shard tells `record`, the actor of the run's `Attempts`; of others, the bar
    shows the prompts whose rows are on disk.
    """
    counter, done = ShardCounter(folder, time.monotonic()), Event()
    interval = 1 if sys.stderr.isatty() else 10

    def watch() -> None:
        with tqdm(total=rows, desc=label, unit=" prompts", mininterval=interval) as bar:
            running, due, encoded = True, 0.0, 0
            while running:
                running = not done.wait(POLL_S)
                now = time.monotonic()
                if now >= due or not running:
                    due = now + interval
                    with suppress(UnavailableError):
                        counter.update(now)
                with suppress(ray.exceptions.RayError):
                    encoded = ray.get(record.rows.remote(), timeout=POLL_S)
                on_disk = f"{counter.rows:,} on disk" if counter.rows < encoded else ""
                speed = throughput(counter.tokens_per_s(now), actors, bare_tokens_per_s)
                bar.set_postfix_str(", ".join(filter(None, (on_disk, speed))), refresh=False)
                bar.update(max(0, min(rows, max(counter.rows, encoded)) - bar.n))

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
