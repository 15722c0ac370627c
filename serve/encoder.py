"""The encoder deployment: prompts in, activations rows out, batched as they arrive.

Holds the class that Ray Data maps (prefill/backends.py), so that batch and online states come from one
code path. Each request names the encoder it wants by fingerprint and configuration; what is loaded must have that
fingerprint. Knows nothing of decisions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pyarrow as pa
from ray import serve as ray_serve

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder
from prefill_router.routing.checkpoint import load_checkpoint
from serve.cache import LoadCache, keep_serving
from serve.config import EncoderDeploymentConfig, Live

logger = logging.getLogger("ray.serve")


class Encoder:
    """The deployment's class; `serve.app.build` gives it its resources."""

    def __init__(self, config: EncoderDeploymentConfig) -> None:
        self._overrides, self._gpus = config.overrides, config.gpus
        self._cache: LoadCache[tuple[str, EncoderConfig], PrefillEncoder] = LoadCache()
        # One batch at a time: an encoder's call is not thread-safe, and two would only share the same cores.
        self._together = ray_serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s, max_concurrent_batches=1
        )(self._encode_batch)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads the encoders of a checkpoint before it goes live."""
        where = Live.model_validate(user_config).checkpoint
        await keep_serving(self._warm_up(where), where, serving=len(self._cache) > 0)

    async def encode(self, prompt: str, fingerprint: str, config: EncoderConfig) -> pa.Table:
        """One activations row, read together with other prompts that are waiting.

        Raises RuntimeError for an encoder that cannot be loaded or is another one than the checkpoint's: whoever sent
        the prompt can do nothing about it.
        """
        # Loaded before the batch is joined: a load that fails must not fail the requests beside it.
        try:
            encoder = await self._encoder(fingerprint, config)
        except InputError as error:
            raise RuntimeError(str(error)) from None
        return await self._together((encoder, prompt))

    async def _encode_batch(self, requests: list[tuple[PrefillEncoder, str]]) -> list[pa.Table]:
        rows: dict[int, pa.Table] = {}
        for encoder in dict.fromkeys(encoder for encoder, _ in requests):  # two only while encoders are swapped
            members = [i for i, (other, _) in enumerate(requests) if other is encoder]
            table = pa.table({"query_id": [str(i) for i in members], "prompt": [requests[i][1] for i in members]})
            states = await asyncio.to_thread(encoder, table)
            # `take`, not `slice`: pickling a slice of a list column sends the whole batch along
            rows |= {i: states.take([row]) for row, i in enumerate(members)}
        return [rows[i] for i in range(len(requests))]

    async def _warm_up(self, where: str) -> None:
        router = await asyncio.to_thread(lambda: load_checkpoint(registry.resolve(where)))
        self._cache.capacity = max(self._cache.capacity, 2 * len(router.encoders))  # two checkpoints' encoders
        known = {*router.encoders, *(config.model for config in router.encoders.values())}
        for name in self._overrides.keys() - known:
            logger.warning("encoder.overrides: %s is no encoder of %s; there are %s", name, where, ", ".join(known))
        for fingerprint, config in router.encoders.items():
            await self._encoder(fingerprint, config)

    async def _encoder(self, fingerprint: str, config: EncoderConfig) -> PrefillEncoder:
        override = self._overrides.get(fingerprint) or self._overrides.get(config.model)
        config = override.apply(config) if override else config
        if not self._gpus and config.device == "auto":
            config = config.model_copy(update={"device": "cpu"})  # a GPU that it sees is not its own
        return await self._cache.get((fingerprint, config), lambda: load_encoder(fingerprint, config))


def load_encoder(fingerprint: str, config: EncoderConfig) -> PrefillEncoder:
    """The encoder, if it is the one that the checkpoint was trained on; InputError if not."""
    # Imported here: builder and driver import this module, and need no torch.
    from prefill_router.prefill import backends

    encoder = backends.load_encoder(config)
    if encoder.info.fingerprint != fingerprint:
        encoder.close()
        raise InputError(
            f"encoder: {config.model!r} has the fingerprint {encoder.info.fingerprint}, the checkpoint "
            f"was trained on {fingerprint}; its weights, tokenizer or settings differ: serve with the "
            "same encoder files, or prefill and train again"
        )
    logger.info("encoder %s, %s: %s", config.model, fingerprint, encoder.loaded)
    return encoder
