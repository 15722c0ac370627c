"""What a replica keeps loaded, and what it does when something new cannot be loaded.

During a swap requests of the old and of the new checkpoint arrive side by side, so a replica holds the two used
last. Loading happens off the event loop: requests for what is held go on meanwhile.
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
    """The `capacity` values used last. Requests for one that is loading wait for that one load."""

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._loads: OrderedDict[Key, asyncio.Future[Value]] = OrderedDict()

    def __len__(self) -> int:
        return sum(load.done() for load in self._loads.values())

    async def get(self, key: Key, load: Callable[[], Value]) -> Value:
        """The value of `key`, loaded in a thread where it is not held. A load that fails is tried again next time."""
        if key not in self._loads:
            self._loads[key] = asyncio.ensure_future(asyncio.to_thread(load))
        self._loads.move_to_end(key)
        loading = self._loads[key]
        try:
            # Shielded: a caller that gives up must not cancel the load that others wait for.
            value = await asyncio.shield(loading)
        except Exception:  # of whatever kind: the failed load is forgotten, to be tried again, and the error goes on
            if self._loads.get(key) is loading:
                del self._loads[key]
            raise
        while len(self._loads) > self.capacity:  # only now: until the new value is there, the old ones serve
            self._loads.popitem(last=False)
        return value


async def keep_serving(bring_up: Awaitable[object], what: str, serving: bool) -> str | None:
    """Awaits `bring_up`; when it fails and something else is `serving`, logs that and returns the reason.

    An exception from `reconfigure` makes Serve stop the replica and start another with the same bad configuration:
    with every replica gone the application is down. So a failure is raised only where nothing is being served, at
    the first start, where it fails the deployment with its message.
    """
    try:
        await bring_up
    except Exception as error:
        if not serving:
            raise
        cause = getattr(error, "cause", error)  # an error from another deployment comes wrapped in its traceback
        reason = f"{what}: {' '.join(str(cause).split())}"
        logger.error("refused, the checkpoint before is still serving: %s", reason)
        return reason
    return None
