"""Progress of a dataset that is being written: the rows on disk, and the throughput in tokens per second.

In: the folder of the shards, and the time. Out: counts. Reads each new shard once, without its states. Knows nothing of
the processes that write.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefill_router.locations import readable

RATE_WINDOW_S = 60.0  # minimum seconds over which throughput is measured


class ShardCounter:
    """Counts the rows and encoded tokens of shards that appear in `folder` after construction.

    Each shard is read once, without its states. `now` is in seconds; all calls must use the same clock.
    """

    def __init__(self, folder: Path, now: float) -> None:
        self._folder = folder
        self._counted = {path.name for path in folder.glob("*.parquet")}
        self._marks = deque([(now, 0)])
        self.rows = 0
        self.tokens = 0

    def update(self, now: float) -> None:
        """Counts the shards that were completed since the last call."""
        for path in self._folder.glob("*.parquet"):
            if path.name not in self._counted:
                with suppress(pa.ArrowInvalid, OSError):  # still being written
                    rows, tokens = _rows_and_tokens(path)
                    self._counted.add(path.name)
                    self.rows += rows
                    self.tokens += tokens
        if self.tokens > self._marks[-1][1]:
            self._marks.append((now, self.tokens))
            while now - self._marks[1][0] >= RATE_WINDOW_S:
                self._marks.popleft()

    def tokens_per_s(self, now: float) -> float | None:
        """Tokens per second over the last minute, or over a longer time if shards take longer than a minute.

        A minute averages over actors that finish their shards at the same time. None before the first new shard, and if
        no shard has been completed for twice the measured time.
        """
        (first, before), (last, tokens) = self._marks[0], self._marks[-1]
        return None if last == first or now - last > 2 * (last - first) else (tokens - before) / (last - first)


def _rows_and_tokens(path: Path) -> tuple[int, int]:
    """Rows of a shard, and its tokens after truncation; 0 tokens if the shard has no token counts."""
    with pq.ParquetFile(readable(path)) as shard:
        if not {"n_tokens", "n_dropped"} <= set(shard.schema_arrow.names):
            return shard.metadata.num_rows, 0
        counts = shard.read(["n_tokens", "n_dropped"])
    return counts.num_rows, _total(counts, "n_tokens") - _total(counts, "n_dropped")


def _total(counts: pa.Table, name: str) -> int:
    return int(pc.sum(counts.column(name)).as_py() or 0)
