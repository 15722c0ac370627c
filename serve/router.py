"""The router deployment: activations rows in, a decision out.

Each request names its checkpoint. A replica caches the two most recently used checkpoints and loads others on request.
Knows nothing of HTTP and encoders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prefill_router import registry
from prefill_router.controller import LocalRouter
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import Decision
from serve.cache import LoadCache, keep_serving
from serve.config import Live


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a request.

    `id`: the checkpoint's id; `where`: its folder or registry URI; `models`: names of the target models; `encoders`:
    configurations by fingerprint.
    """

    id: str
    where: str
    models: tuple[str, ...]
    encoders: Mapping[str, EncoderConfig]


class RouterHead:
    """Class of the deployment; `serve.app.build` sets its resources."""

    def __init__(self) -> None:
        self._cache: LoadCache[str, LocalRouter] = LoadCache()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads a checkpoint before it becomes live."""
        where = Live.model_validate(user_config).checkpoint
        await keep_serving(self.describe(where), where, serving=len(self._cache) > 0)

    async def describe(self, where: str) -> Checkpoint:
        """Loads and checks the checkpoint at `where`; an alias is resolved to its present version.

        Raises InputError as `registry.resolve` and `load_checkpoint` do.
        """
        where = await asyncio.to_thread(registry.pin_version, where)
        router = await asyncio.to_thread(lambda: load_checkpoint(registry.resolve(where)))
        await self._cache.get(router.id, lambda: LocalRouter(router))
        return Checkpoint(router.id, where, router.pool.names, dict(router.encoders))

    async def decide(
        self,
        checkpoint: Checkpoint,
        rows: Mapping[str, pa.Table],
        lam: float | None,
        models: Sequence[str] | None,
        max_cost_usd: float | None,
    ) -> Decision:
        """The decision for one query, from its activations row by encoder fingerprint.

        Other arguments as in `LocalRouter.route_batch`. Raises InputError as `Router.decide` does.
        """
        router = await self._cache.get(checkpoint.id, lambda: load_same(checkpoint))
        return router.decide(rows, lam, models, max_cost_usd)[0]


def load_same(checkpoint: Checkpoint) -> LocalRouter:
    """Loads the router of `checkpoint`.

    Raises RuntimeError if it can no longer be loaded, or if the folder holds another checkpoint now: the request is not
    at fault.
    """
    try:
        router = load_checkpoint(registry.resolve(checkpoint.where))
    except InputError as error:
        raise RuntimeError(str(error)) from None
    if router.id != checkpoint.id:
        raise RuntimeError(
            f"{checkpoint.where} now holds checkpoint {router.id}, but {checkpoint.id} is live; "
            "write each checkpoint to a separate folder"
        )
    return LocalRouter(router)
