"""Isolation of a prompt that ends or blocks the process of its encoder.

In: prompts, a function that encodes them, and a record of the parts of a shard that were begun and not ended; the
record outlives the process. Out: one row per prompt. A shard that ended its process twice is encoded in halves, down to
the prompt at fault, whose row gets an error. A process that exceeds its deadline ends itself, so a blocked encoder
counts like one that crashed. Knows neither encoders nor clusters.
"""

from __future__ import annotations

import faulthandler
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from prefill_router.files import prompt_digest

TRIES = 2  # of a shard before it is halved, and of a single prompt before it is refused
MARGIN, CONSTANT_S = 20.0, 120.0  # of a deadline: factor on the expected time, and seconds added to it
STDERR = 2


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a shard. `refused`: a single row that is not encoded any more."""

    start: int
    stop: int
    refused: bool = False


@dataclass(frozen=True)
class Deadline:
    """Seconds that a table of prompts may take: 20 times the expected time, plus 120 s; or `fixed` if it is given.

    The expected time is `seconds_per_prompt`, measured on prompts of `characters_per_prompt` characters; it grows with
    the length of the prompts and does not fall below the measured one.
    """

    seconds_per_prompt: float
    characters_per_prompt: float
    fixed: float | None = None

    def seconds(self, prompts: pa.Table) -> float:
        """The deadline of these prompts in seconds."""
        if self.fixed is not None:
            return self.fixed
        longer = max(1.0, characters_per_prompt(prompts) / max(self.characters_per_prompt, 1.0))
        return CONSTANT_S + MARGIN * self.seconds_per_prompt * prompts.num_rows * longer


@runtime_checkable
class Record(Protocol):
    """The parts that were begun; its calls may go to another process."""

    def parts(self, shard: str, rows: int) -> list[Part]: ...

    def begin(self, shard: str, part: Part) -> None: ...

    def end(self, shard: str, part: Part) -> None: ...


class Attempts:
    """The parts of shards that were begun and did not end. Shards are named by their first query.

    It counts the encoded rows too, for the progress within shards; rows of a repeated attempt count again. And the
    encoders whose loading began since the last one was loaded or encoded something.
    """

    def __init__(self) -> None:
        self._open: dict[str, Counter[tuple[int, int]]] = {}
        self._rows = self._starts = 0

    def begin_start(self) -> int:
        """Counts an encoder that is being loaded. Returns the starts that have not ended, with this one."""
        self._starts += 1
        return self._starts

    def end_start(self) -> None:
        """An encoder was loaded: earlier starts count no longer."""
        self._starts = 0

    def add(self, rows: int) -> None:
        """Counts rows that were encoded."""
        self._rows += rows

    def rows(self) -> int:
        """The rows that were encoded so far."""
        return self._rows

    def parts(self, shard: str, rows: int) -> list[Part]:
        """The parts in which a shard of `rows` rows is encoded now."""
        return parts_of(rows, self._open.get(shard, {}))

    def begin(self, shard: str, part: Part) -> None:
        self._open.setdefault(shard, Counter())[part.start, part.stop] += 1

    def end(self, shard: str, part: Part) -> None:
        self._starts = 0
        self._open[shard] -= Counter({(part.start, part.stop): 1})  # drops counts of zero
        if not self._open[shard]:
            del self._open[shard]


def parts_of(rows: int, unfinished: Mapping[tuple[int, int], int]) -> list[Part]:
    """The parts of a shard, in order. `unfinished` counts the attempts per (start, stop) that ended their process.

    The whole shard and a single row have TRIES attempts, a part between them has one.
    """

    def split(start: int, stop: int) -> Iterator[Part]:
        size = stop - start
        spent = unfinished.get((start, stop), 0) >= (TRIES if size in (1, rows) else 1)
        if size == 1 or not spent:
            yield Part(start, stop, refused=spent)
        else:
            middle = (start + stop) // 2
            yield from split(start, middle)
            yield from split(middle, stop)

    return list(split(0, rows))


def encode_in_parts(
    encode: Callable[[pa.Table], pa.Table], prompts: pa.Table, record: Record, limit: Deadline | None
) -> pa.Table:
    """Encodes a shard of (query_id, prompt) in the parts that `record` names, each within its deadline if it has one.

    If the process ends, another one calls this again with the same prompts and the same record.
    """
    shard, tables = prompts.column("query_id")[0].as_py(), []
    for part in record.parts(shard, prompts.num_rows):
        rows = prompts.slice(part.start, part.stop - part.start)
        seconds = None if limit is None else limit.seconds(rows)
        if part.refused:
            tables.append(refused_rows(encode, rows, _reason(seconds)))
            continue
        record.begin(shard, part)
        with ends_after(seconds):
            tables.append(encode(rows))
        record.end(shard, part)
    return pa.concat_tables(tables)


def refused_rows(encode: Callable[[pa.Table], pa.Table], prompts: pa.Table, reason: str) -> pa.Table:
    """Rows with `reason` as error. `encode` gets null prompts, whose rows have the schema and null values."""
    texts = prompts.column("prompt").to_pylist()
    place = prompts.schema.get_field_index("prompt")
    rows = encode(
        prompts.set_column(place, prompts.schema.field(place), pa.nulls(len(texts), prompts.schema[place].type))
    )
    values = {
        "prompt_digest": [prompt_digest(text) if isinstance(text, str) else None for text in texts],
        "error": [reason] * len(texts),
    }
    for name, column in values.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(column, pa.string()))
    return rows


@contextmanager
def ends_after(seconds: float | None) -> Iterator[None]:
    """Ends this process if the block takes longer, with the stack of every thread on stderr. None: no limit.

    A thread in C does so: it needs no lock of the interpreter, so a call that never returns cannot stop it.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def sample_parts(rows: int) -> list[Part]:
    """The parts of a sample to test one after another until one does not end its process: all twice, then its halves
    and its quarters."""
    whole = Part(0, rows)
    pieces = [Part(rows * step // n, rows * (step + 1) // n) for n in (2, 4) for step in range(n)]
    return [whole] * TRIES + [one for one in dict.fromkeys(pieces) if one != whole and one.start < one.stop]


def characters_per_prompt(prompts: pa.Table) -> float:
    """Mean number of characters of the prompts; 0 if they are not text."""
    texts = prompts.column("prompt")
    has_text = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
    return float(pc.mean(pc.fill_null(pc.utf8_length(texts), 0)).as_py() or 0.0) if has_text else 0.0


def _reason(seconds: float | None) -> str:
    slow = "" if seconds is None else f", or took longer than {seconds:.0f} s"
    return f"the encoder's process crashed on this prompt{slow}, twice"
