"""Circuit breaker of a model's server (Nygard 2007): after failures it is left alone for a while.

In: results of requests and the time in seconds. Out: whether a request may be sent. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Literal

from pydantic import Field

from prefill_router.config import FrozenModel

State = Literal["closed", "open", "testing"]


class BreakerConfig(FrozenModel):
    """When an upstream server is left alone, and for how long."""

    window_s: Annotated[float, Field(gt=0, description="period whose requests count, in seconds")] = 30.0
    failures: Annotated[int, Field(ge=1, description="minimum number of failures in the period")] = 5
    failure_share: Annotated[float, Field(gt=0, le=1, description="minimum share of failures in the period")] = 0.5
    open_s: Annotated[float, Field(gt=0, description="time without requests, in seconds; one test request follows")] = (
        10.0
    )
    max_retry_after_s: Annotated[
        float, Field(ge=0, description="maximum time that a server's Retry-After header is followed, in seconds")
    ] = 60.0


class Breaker:
    """The breaker of one model's server. Times are those of one monotonic clock, in seconds.

    It opens after too many failures in the period. Then one test request is let through: its success closes the
    breaker, its failure opens it again. Results of requests that were sent before do not count as those of the test
    request. A Retry-After only delays the next requests.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._results: deque[tuple[float, bool]] = deque()
        self._not_before = 0.0  # no request before this time
        self._open = self._testing = False

    @property
    def state(self) -> State:
        """`closed`: requests are sent; `open`: none during the wait; `testing`: the test request is under way."""
        if self._testing:
            return "testing"
        return "open" if self._open else "closed"

    def wait(self, now: float) -> float:
        """Seconds until a request may be sent; 0: now, infinite: when the test request has ended."""
        return math.inf if self._testing else max(self._not_before - now, 0.0)

    def sent(self) -> bool:
        """Notes that a request is sent. Returns whether it is the test request; pass this on with its result."""
        self._testing = self._open
        return self._testing

    def succeeded(self, now: float, test: bool) -> None:
        """Notes that the server answered."""
        if test:
            self._results.clear()
            self._open = self._testing = False
        self._note(now, failed=False)

    def failed(self, now: float, test: bool, retry_after_s: float | None = None) -> None:
        """Notes a failure; `retry_after_s` is what the server asked for."""
        self._note(now, failed=True)
        if retry_after_s is not None:
            self._not_before = max(self._not_before, now + min(retry_after_s, self._config.max_retry_after_s))
        if test or (not self._open and self._too_many()):
            self._open = True
            self._not_before = max(self._not_before, now + self._config.open_s)
        if test:
            self._testing = False

    def abandoned(self, test: bool) -> None:
        """Notes that the request ended without a result, because the client left: it says nothing about the server."""
        if test:
            self._testing = False

    def _note(self, now: float, failed: bool) -> None:
        self._results.append((now, failed))
        while self._results and self._results[0][0] < now - self._config.window_s:
            self._results.popleft()

    def _too_many(self) -> bool:
        failures = sum(failed for _, failed in self._results)
        return failures >= self._config.failures and failures >= self._config.failure_share * len(self._results)
