"""The router deployment: activations rows in, a decision out.

Each request names the checkpoint it began with; a replica holds the two used last and loads another when asked.
Knows nothing of HTTP or of encoders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import Decision, Router
from serve.cache import LoadCache, keep_serving
from serve.config import Live


@dataclass(frozen=True)
class Checkpoint:
    """What a request carries through the graph: `id` says which checkpoint, `where` from which to load it."""

    id: str
    where: str
    models: tuple[str, ...]
    encoders: Mapping[str, EncoderConfig]


class RouterHead:
    """The deployment's class; `serve.app.build` gives it its resources."""

    def __init__(self) -> None:
        self._cache: LoadCache[str, Router] = LoadCache()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads a checkpoint before it goes live."""
        where = Live.model_validate(user_config).checkpoint
        await keep_serving(self.describe(where), where, serving=len(self._cache) > 0)

    async def describe(self, where: str) -> Checkpoint:
        """The checkpoint that `where` means now, loaded and validated. Raises InputError."""
        where = await asyncio.to_thread(registry.pin, where)
        router = await asyncio.to_thread(lambda: load_checkpoint(registry.resolve(where)))
        await self._cache.get(router.id, lambda: router)
        return Checkpoint(router.id, where, router.pool.names, dict(router.encoders))

    async def decide(
        self,
        checkpoint: Checkpoint,
        rows: Mapping[str, pa.Table],
        lam: float | None,
        models: Sequence[str] | None,
        max_cost_usd: float | None,
    ) -> Decision:
        """The decision for one query. Raises InputError as `Router.decide` does."""
        router = await self._cache.get(checkpoint.id, lambda: load_same(checkpoint))
        return router.decide(rows, lam, models, max_cost_usd)[0]


def load_same(checkpoint: Checkpoint) -> Router:
    """The router of `checkpoint`. Raises RuntimeError where it cannot be loaded any more, or the folder holds another:
    whoever sent the prompt can do nothing about either."""
    try:
        router = load_checkpoint(registry.resolve(checkpoint.where))
    except InputError as error:
        raise RuntimeError(str(error)) from None
    if router.id != checkpoint.id:
        raise RuntimeError(
            f"{checkpoint.where} now holds checkpoint {router.id}, {checkpoint.id} is live; "
            "write every checkpoint into a folder of its own"
        )
    return router
