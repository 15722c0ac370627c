"""The router deployment: activations rows in, a decision out.

Each request names its checkpoint. A replica caches the checkpoints of its configuration and of the one before, and
loads others on request. Knows nothing of HTTP and encoders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from prefill_router import registry
from prefill_router.controller import LocalRouter
from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Decision, NoveltyFallback
from serve.cache import LoadCache, keep_serving
from serve.config import RouterDeploymentConfig
from serve.follow import Follower
from serve.live import Live
from serve.targets import Target
from serve.transport import unpacked


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a request.

    `id`: the checkpoint's id; `where`: its folder or registry URI; `pool`: the target models; `encoders`:
    configurations by fingerprint; `best_single`: the model with the highest accuracy on the training queries, None if
    the checkpoint does not record it; `place`: `where` as the configuration or the store gives it.
    """

    id: str
    where: str
    pool: Pool
    encoders: Mapping[str, EncoderConfig]
    best_single: str | None = None
    place: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the target models."""
        return self.pool.names


class RouterHead:
    """Class of the deployment; `serve.app.build` sets its resources."""

    def __init__(self, config: RouterDeploymentConfig, store: DeploymentHandle | None = None) -> None:
        """`store`: the deployment that resolves aliases; None: none is followed."""
        self._fallback = novelty_fallback(config)
        self._cache: LoadCache[str, LocalRouter] = LoadCache()
        self._checkpoints = 0
        self._follower = Follower(store, self._load)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads checkpoints before they become live."""
        await self._follower.start(Live.model_validate(user_config))

    async def _load(self, target: Target) -> None:
        live = target.live
        self._cache.capacity = self._checkpoints + len(live.sources)  # of the old and of the new configuration
        self._checkpoints = len(live.sources)
        for where in live.sources:
            await keep_serving(self.describe(where), where, serving=len(self._cache) > 0)

    async def describe(self, where: str) -> Checkpoint:
        """Loads and checks the checkpoint at `where`; an alias is resolved to its present version.

        Raises InputError as `registry.resolve`, `load_checkpoint` and `Router.check_fallback` do.
        """
        place, where = where, await asyncio.to_thread(registry.pin_version, where)
        router = await asyncio.to_thread(lambda: load_checkpoint(registry.resolve(where)))
        await self._cache.get(router.id, lambda: LocalRouter(router, fallback=self._fallback))
        best = None if router.margin is None else router.pool.names[router.margin.means.best_static(0.0)]
        return Checkpoint(router.id, where, router.pool, dict(router.encoders), best, place)

    async def probe(self, checkpoint: Checkpoint, rows: Mapping[str, bytes]) -> None:
        """Decides one query, to test a checkpoint. Context windows do not count: the probe is no request."""
        router = (await self._router(checkpoint.id, checkpoint.where)).router
        models = tuple(model.model_copy(update={"context_tokens": None}) for model in router.pool.models)
        replace(router, pool=Pool(models=models)).decide(unpacked(rows))

    async def decide(
        self,
        checkpoint_id: str,
        where: str,
        rows: Mapping[str, bytes],
        lam: float | None,
        requirements: Requirements,
    ) -> Decision | InputError:
        """The decision for one query, from its packed activations row by encoder fingerprint.

        `checkpoint_id` and `where` name the checkpoint; a whole `Checkpoint` takes longer to send. Other arguments as
        in `Router.decide`. Returns its InputError, because Serve logs the traceback of every exception, also if the
        request is at fault.
        """
        router = await self._router(checkpoint_id, where)
        try:
            return router.decide(unpacked(rows), lam, requirements)[0]
        except InputError as error:
            return error

    async def _router(self, checkpoint_id: str, where: str) -> LocalRouter:
        return await self._cache.get(checkpoint_id, lambda: load_same(checkpoint_id, where, self._fallback))


def novelty_fallback(config: RouterDeploymentConfig) -> NoveltyFallback | None:
    """The configured fallback for novel queries; None if there is none."""
    if config.novelty_above is None or config.fallback_model is None:
        return None
    return NoveltyFallback(config.novelty_above, config.fallback_model)


def load_same(checkpoint_id: str, where: str, fallback: NoveltyFallback | None = None) -> LocalRouter:
    """Loads the router of the checkpoint at `where`, which has to have this id.

    Raises RuntimeError if it can no longer be loaded, or if the folder holds another checkpoint now: the request is not
    at fault.
    """
    try:
        router = load_checkpoint(registry.resolve(where))
        if router.id == checkpoint_id:
            return LocalRouter(router, fallback=fallback)
    except InputError as error:
        raise RuntimeError(str(error)) from None
    raise RuntimeError(
        f"{where} now holds checkpoint {router.id}, but {checkpoint_id} is live; "
        "write each checkpoint to a separate folder"
    )
