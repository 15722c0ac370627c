"""The encoder deployment: prompts in, activations rows out, with dynamic batching.

It holds the encoder classes that jobs.prefill maps over datasets (prefill/backends.py), so batch and online states come
from one code path. A request names its encoder by fingerprint and configuration; the loaded encoder must have this
fingerprint. Knows nothing of decisions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from prefill_router import registry
from prefill_router.controller import encode_prompts, load_encoder
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder
from prefill_router.routing.checkpoint import load_checkpoint
from serve.cache import LoadCache, keep_serving
from serve.config import EncoderDeploymentConfig
from serve.follow import Follower
from serve.live import Live
from serve.targets import Target
from serve.transport import packed

logger = logging.getLogger("ray.serve")


class Encoder:
    """Class of the deployment; `serve.app.build` sets its resources."""

    def __init__(self, config: EncoderDeploymentConfig, store: DeploymentHandle | None = None) -> None:
        """`store`: the deployment that resolves aliases; None: none is followed."""
        self._overrides, self._gpus = config.overrides, config.gpus
        self._cache: LoadCache[tuple[str, EncoderConfig], PrefillEncoder] = LoadCache()
        self._before, self._wanted = 0, 0  # encoders of the configuration before, and of the present one
        self._follower = Follower(store, self._load)
        # One batch at a time: encoders are not thread-safe, and two batches would share the same cores.
        self._encode_batched = ray_serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s, max_concurrent_batches=1
        )(self._encode_batch)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads the encoders of checkpoints before they become live."""
        await self._follower.start(Live.model_validate(user_config))

    async def _load(self, target: Target) -> None:
        self._before, self._wanted = self._wanted or self._before, 0  # 0: no checkpoint of it could be loaded
        for where in target.live.sources:
            await keep_serving(self._warm_up(where), where, serving=len(self._cache) > 0)

    async def encode(self, prompt: str, fingerprint: str, config: EncoderConfig) -> bytes:
        """The activations row of a prompt, packed. It is encoded in one batch with other waiting prompts.

        Raises RuntimeError if the encoder cannot be loaded or has another fingerprint: the request is not at fault.
        """
        # Loaded before the prompt joins a batch: a failed load must not fail the other requests of the batch.
        try:
            encoder = await self._encoder(fingerprint, config)
        except InputError as error:
            raise RuntimeError(str(error)) from None
        return await self._encode_batched((encoder, prompt))

    async def _encode_batch(self, requests: list[tuple[PrefillEncoder, str]]) -> list[bytes]:
        rows: dict[int, bytes] = {}
        for encoder in dict.fromkeys(
            encoder for encoder, _ in requests
        ):  # several during a swap, or if the checkpoint has several
            members = [i for i, (other, _) in enumerate(requests) if other is encoder]
            states = await asyncio.to_thread(encode_prompts, encoder, [requests[i][1] for i in members])
            # `take`, not `slice`: a packed slice of a list column may contain the complete batch.
            rows |= {i: packed(states.take([row])) for row, i in enumerate(members)}
        return [rows[i] for i in range(len(requests))]

    async def _warm_up(self, where: str) -> None:
        router = await asyncio.to_thread(lambda: load_checkpoint(registry.resolve(where)))
        self._wanted += len(router.encoders)
        self._cache.capacity = self._before + self._wanted
        known = {*router.encoders, *(config.model for config in router.encoders.values())}
        for name in self._overrides.keys() - known:
            logger.warning(
                "encoder.overrides: %s is not an encoder of %s; its encoders are %s", name, where, ", ".join(known)
            )
        for fingerprint, config in router.encoders.items():
            await self._encoder(fingerprint, config)

    async def _encoder(self, fingerprint: str, config: EncoderConfig) -> PrefillEncoder:
        override = self._overrides.get(fingerprint) or self._overrides.get(config.model)
        config = override.apply(config) if override else config
        if not self._gpus and config.device == "auto":
            config = config.model_copy(update={"device": "cpu"})  # visible GPUs belong to other processes
        return await self._cache.get((fingerprint, config), lambda: load_encoder(fingerprint, config))
