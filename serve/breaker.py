"""Circuit breaker of an upstream server (Nygard 2007): after failures it is left alone for a while.

In: results of requests and the time in seconds. Out: whether a request may be sent. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

from pydantic import Field

from prefill_router.config import FrozenModel


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
    """The breaker of one upstream server. Times are those of one monotonic clock, in seconds.

    Open after too many failures in the period, and while a Retry-After lasts. Then one test request is let through: its
    success closes the breaker, its failure opens it again.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._results: deque[tuple[float, bool]] = deque()
        self._opens_at = 0.0  # no request before this time
        self._testing = False  # the breaker was open and its test request is on the way
        self._was_open = False

    def wait(self, now: float) -> float:
        """Seconds until a request may be sent; 0: now."""
        if self._was_open and self._testing:
            return max(self._opens_at - now, self._config.open_s)
        return max(self._opens_at - now, 0.0)

    def sent(self) -> None:
        """Notes that a request is sent. It is the test request if the breaker was open."""
        self._testing = self._was_open

    def succeeded(self, now: float) -> None:
        """Notes that the server answered."""
        if self._was_open:
            self._results.clear()
        self._was_open = self._testing = False
        self._note(now, failed=False)

    def failed(self, now: float, retry_after_s: float | None = None) -> None:
        """Notes a failure; `retry_after_s` is what the server asked for."""
        self._note(now, failed=True)
        if retry_after_s is not None:
            self._open(now + min(retry_after_s, self._config.max_retry_after_s))
        elif self._testing or self._too_many():
            self._open(now + self._config.open_s)
        self._testing = False

    def abandoned(self) -> None:
        """Notes that the client left before the server answered: the request says nothing about the server."""
        self._testing = False

    def _open(self, until: float) -> None:
        self._opens_at, self._was_open = max(until, self._opens_at), True

    def _note(self, now: float, failed: bool) -> None:
        self._results.append((now, failed))
        while self._results and self._results[0][0] < now - self._config.window_s:
            self._results.popleft()

    def _too_many(self) -> bool:
        failures = sum(failed for _, failed in self._results)
        return failures >= self._config.failures and failures >= self._config.failure_share * len(self._results)
