"""The loop of a replica that follows the store: what it has to serve now, and the outcomes that it reports.

In: a configuration, and `serve.targets.Target`s from the store. Out: calls of `apply`, one after another. The store
resolves aliases for all replicas, so that they serve the same versions. Knows nothing of checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from serve.live import Live
from serve.targets import Target
from serve.trial import Outcome, Pair

EVERY_S = 1.0  # between two questions to the store
ASK_S = 30.0  # maximum time of an answer
RETRY_S = 60.0  # after which a refused target is applied again
BATCH = 5_000  # outcomes per question
MOST_WAITING = 20_000  # outcomes
logger = logging.getLogger("ray.serve")


class Follower:
    """The loop of one replica. `target`: what it has to serve; None before the first one.

    `store`: handle of the deployment `Sessions`. `apply` makes a target live, and returns why it was refused, or None.
    """

    def __init__(self, store: Any, apply: Callable[[Target], Awaitable[str | None]]) -> None:
        self._store, self._apply = store, apply
        self._configured: Live | None = None
        self._before: tuple[Live | None, Target | None] = None, None  # the last `ask`
        self._task: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Pair, Outcome]] = []
        self.target: Target | None = None

    async def start(self, configured: Live) -> None:
        """Applies the target of a configuration, and follows its aliases from then on.

        If the store does not know a target, what is served stays. Raises its exception if nothing is served yet.
        """
        refused = False
        try:
            target = await self.ask(configured, configured.followed)
        except Exception as error:  # of any type: see serve.cache.keep_serving
            if self.target is None:
                raise
            logger.error("the current checkpoints stay, the store has no others: %s", " ".join(str(error).split()))
            target, refused = self.target, True
        await self._apply(target)
        if configured.followed:
            self.run(configured, refused)

    async def ask(self, configured: Live, follows: bool) -> Target:
        """The target of a configuration, without versions of aliases unless it `follows`. Ends the loop.

        Raises what the store raises; the target before then stays.
        """
        self.stop()
        self._before = self._configured, self.target
        known = self.target if configured == self._configured else None
        self.target = await self._ask(configured, known, ()) if follows else Target(configured)
        self._configured = configured
        return self.target

    def restore(self) -> Live | None:
        """Takes back the last `ask`, whose target was refused. Returns the configuration before; None if none was."""
        self._configured, self.target = self._before
        return self._configured

    def run(self, configured: Live, refused: bool = False) -> None:
        """Follows the store from now on. The present target is live, unless it was refused."""
        self.stop()
        self._task = asyncio.ensure_future(self._run(configured, refused))

    def stop(self) -> None:
        """Ends the loop."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def report(self, pair: Pair, outcome: Outcome) -> None:
        """Sends an outcome with the next question; it is dropped if too many wait, or if nothing is followed."""
        if self._task is not None and len(self._waiting) < MOST_WAITING:
            self._waiting.append((pair, outcome))

    async def _run(self, configured: Live, refused: bool) -> None:
        applied, silent = None if self.target is None else self.target.live, False
        retry_at = time.monotonic() + RETRY_S if refused else math.inf
        while True:
            await asyncio.sleep(EVERY_S)
            sent = self._waiting[:BATCH]
            try:
                self.target = await self._ask(configured, self.target, sent)
                del self._waiting[: len(sent)]
                if self.target.live != applied or time.monotonic() >= retry_at:
                    reason = await self._apply(self.target)
                    applied = self.target.live
                    retry_at = math.inf if reason is None else time.monotonic() + RETRY_S
            except Exception as error:  # noqa: BLE001  of any type: nothing here may end what is served
                if not silent:
                    logger.error("what is served does not change: %s", " ".join(str(error).split()))
                silent = True
            else:
                silent = False

    async def _ask(self, configured: Live, known: Target | None, outcomes: Sequence[tuple[Pair, Outcome]]) -> Target:
        async with asyncio.timeout(ASK_S):
            return await self._store.target.remote(configured, known, outcomes)
