"""Which class is which encoder backend. Imports a backend, and what it stands on, only when it is asked for."""

from __future__ import annotations

from contextlib import closing

from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder

# How fast an encoder reads, not what: these fields may differ between runs into one dataset.
NOT_IDENTITY = {"backend", "batch_tokens", "device", "vllm", "vllm_server"}


def encoder_class(config: EncoderConfig) -> type:
    """The backend's class; calling it with the configuration loads the encoder."""
    if config.backend == "vllm":
        from prefill_router.prefill.vllm.backend import VLLMEncoder

        return VLLMEncoder
    if config.backend == "vllm_server":
        from prefill_router.prefill.vllm_server_backend import VLLMServerEncoder

        return VLLMServerEncoder
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    return TransformersEncoder


def load_encoder(config: EncoderConfig) -> PrefillEncoder:
    """The configured encoder, ready to read. Raises InputError for whatever the configuration gets wrong."""
    encoder: PrefillEncoder = encoder_class(config)(config)
    return encoder


def current_digest(config: EncoderConfig) -> str:
    """The digest of the weights that the encoder would run now: of the files here, or as the engine says.

    Raises InputError as loading the encoder does.
    """
    if config.backend == "vllm_server":
        with closing(load_encoder(config)) as encoder:
            return encoder.info.weights_digest
    from prefill_router.prefill.loading import locate, weights_digest

    return weights_digest(locate(config), config)
