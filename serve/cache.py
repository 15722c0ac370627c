"""The cache of a replica, and the handling of a checkpoint that cannot be loaded.

During a swap, requests for the old and for the new checkpoints arrive at the same time, so a replica caches both.
Values are loaded in a thread: requests for cached values are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

logger = logging.getLogger("ray.serve")


class LoadCache(Generic[Key, Value]):
    """An LRU cache for one event loop. Concurrent requests for a key share one load.

    `capacity` is the maximum number of values; it is exceeded while a further value is loading.
    """

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._loads: OrderedDict[Key, asyncio.Future[Value]] = OrderedDict()

    def __len__(self) -> int:
        """The number of loaded values."""
        return sum(load.done() for load in self._loads.values())

    async def get(self, key: Key, load: Callable[[], Value]) -> Value:
        """Returns the value of `key`. If it is not cached, `load` runs in a thread.

        Raises the exception of a failed load. Failures are not cached: the next call loads the value.
        """
        if key not in self._loads:
            self._loads[key] = asyncio.ensure_future(asyncio.to_thread(load))
        self._loads.move_to_end(key)
        loading = self._loads[key]
        try:
            # Shielded: a cancelled caller must not cancel the load that other callers wait for.
            value = await asyncio.shield(loading)
        except Exception:  # of any type: the failed load is removed, so that the next call loads the value
            if self._loads.get(key) is loading:
                del self._loads[key]
            raise
        while len(self._loads) > self.capacity:  # after the load: the old values serve until the new one is ready
            self._loads.popitem(last=False)
        return value


async def keep_serving(bring_up: Awaitable[object], what: str, serving: bool) -> str | None:
    """Awaits `bring_up`, which makes a new checkpoint live. Returns None, or the reason of a failure.

    `what` names the checkpoint in the reason, `serving` is whether another checkpoint is live. If it is, a failure is
    logged and returned. Otherwise the exception propagates and fails the deployment with its message.

    During a swap the exception must not propagate: Serve would restart every replica with the same bad configuration
    until the application is down.
    """
    try:
        await bring_up
    except Exception as error:
        if not serving:
            raise
        cause = getattr(error, "cause", error)  # Serve wraps an error of another deployment in its traceback
        reason = f"{what}: {' '.join(str(cause).split())}"
        logger.error("new checkpoint refused, the current checkpoint stays live: %s", reason)
        return reason
    return None
