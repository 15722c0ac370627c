"""Limits of API keys: requests per minute, and USD per UTC day.

In: the requests of a key, and the cost of its answers in USD. Out: a `Verdict` for each request. The counts are in
memory: one object counts for all gateways. Knows nothing of Ray and HTTP.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from prefill_router.decisions.log import read_log

DAY_S = 86_400
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Verdict:
    """What the limits of a key say about a request.

    `refused`: the limit that refuses it, None if it may go on; `retry_after_s`: seconds until this limit allows it;
    `remaining`: further requests that the rate allows now, None if no rate was checked.
    """

    refused: Literal["rate", "budget"] | None = None
    retry_after_s: int = 0
    remaining: int | None = None


class Limits:
    """The requests of the last 60 seconds and the spend of the UTC day, by the name of the key."""

    def __init__(self, spent_usd: Mapping[str, float] | None = None, until: float = 0.0) -> None:
        """`spent_usd`: the spend of the present day, in USD, of the answers that ended until the Unix time `until`."""
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._until = until
        self._day = time.time() // DAY_S
        self._spent_usd = defaultdict(float, spent_usd or {})

    def admit(self, key: str, requests_per_minute: int | None, usd_per_day: float | None) -> Verdict:
        """Whether a request may go on. It counts for the rate if it may. None: this limit does not apply."""
        now = time.time()
        if usd_per_day is not None and self._spent_today(now)[key] >= usd_per_day:
            return Verdict("budget", _seconds(DAY_S - now % DAY_S))
        if requests_per_minute is None:
            return Verdict()
        rate = RateLimitItemPerMinute(requests_per_minute)
        admitted = self._rates.hit(rate, key)
        window = self._rates.get_window_stats(rate, key)
        return (
            Verdict(remaining=window.remaining) if admitted else Verdict("rate", _seconds(window.reset_time - now), 0)
        )

    def spend(self, key: str, usd: float, ended: float) -> None:
        """Adds the cost of an answer to the spend of the present day. `ended`: Unix time of the end of the answer.

        An answer that ended before `until` is in the initial spend and does not count again: its call may have waited
        for this object.
        """
        if ended > self._until:
            self._spent_today(time.time())[key] += usd

    def _spent_today(self, now: float) -> defaultdict[str, float]:
        if now // DAY_S != self._day:
            self._day = now // DAY_S
            self._spent_usd.clear()
        return self._spent_usd


def spent_today(folder: Path, now: float) -> dict[str, float]:
    """The spend in USD by key, from the answers of a decision log that were logged on the UTC day of `now` until `now`.

    `now` is a Unix time. The spend is empty if the log is unreadable.
    """
    since, spent = now - now % DAY_S, defaultdict[str, float](float)
    try:
        for record in read_log(folder, '"charged_usd"', since):
            if record["kind"] == "answer" and since <= record["time"] <= now:
                spent[record["key"]] += record["charged_usd"]
    except OSError as error:
        logger.error("limits of keys: the spend of today starts at 0, the decision log is unreadable: %s", error)
    return spent


def _seconds(wait: float) -> int:
    """Whole seconds that are longer than `wait`."""
    return int(wait) + 1
