"""Encoder backends by name. A backend and its dependencies are imported only when it is requested."""

from __future__ import annotations

from contextlib import closing

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder

# Fields that change an encoder's speed but not its states: runs into one dataset may differ in them.
RUNTIME_FIELDS = {"backend", "batch_tokens", "device", "vllm", "vllm_server"}


def encoder_class(config: EncoderConfig) -> type:
    """The backend's class. Its constructor takes the configuration and loads the encoder.

    Raises InputError for an adapter with a backend that cannot run it.
    """
    if config.adapter is not None and config.backend != "transformers":
        raise InputError(
            f"adapter: got {config.adapter!r} with backend {config.backend}; probe tokens need backend transformers"
        )
    if config.backend == "vllm":
        from prefill_router.prefill.vllm.backend import VLLMEncoder

        return VLLMEncoder
    if config.backend == "vllm_server":
        from prefill_router.prefill.vllm_server_backend import VLLMServerEncoder

        return VLLMServerEncoder
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    return TransformersEncoder


def load_encoder(config: EncoderConfig) -> PrefillEncoder:
    """Loads the configured encoder. Raises InputError if the configuration does not fit the model or the machine."""
    encoder: PrefillEncoder = encoder_class(config)(config)
    return encoder


def current_digest(config: EncoderConfig) -> str:
    """Digest of the weights that the encoder would run now: from the local files, or as reported by the vLLM server.

    Raises InputError as `load_encoder` does.
    """
    if config.backend == "vllm_server":
        with closing(load_encoder(config)) as encoder:
            return encoder.info.weights_digest
    from prefill_router.prefill.loading import weights_digest
    from prefill_router.prefill.locating import locate

    return weights_digest(locate(config), config)
