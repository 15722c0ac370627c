"""Starts vLLM's OpenAI-compatible server with prefill states on request, for the `vllm_server` backend.

    python -m prefill_router.prefill.vllm.server MODEL --layers '[14, 21, 28]' --port 8001 [options of vLLM]

A response has states only if the `kv_transfer_params` of its request ask for them. Other requests are served as usual,
except that vLLM refuses `min_p`, `logit_bias` and custom logits processors together with the extraction of states.
Prefix caching is on: if the router sends a prompt to the same model, its prefill is not computed twice. Further options
are passed to vLLM; the engine does not start with an option that changes the states (connector.py). The model must
support the extraction method `native` or `transformers` (extraction_methods.py); `hooks` do not work in a server.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Annotated, Literal

from pydantic import Field

from prefill_router.cli import main_known
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig, Pooling
from prefill_router.prefill.encoder import parse_column
from prefill_router.prefill.loading import base_class, columns, read_config
from prefill_router.prefill.locating import locate
from prefill_router.prefill.vllm.extraction_methods import allowed_methods, require_vllm, states_arguments

SERVER = "vllm.entrypoints.openai.api_server"
# Options of vLLM that this module sets, that change the states or that run code of the model's repository; checked
# before vLLM starts.
OURS = {
    "--model",
    "--quantization",
    "-q",
    "--hf-overrides",
    "--load-format",
    "--kv-cache-dtype",
    "--enable-lora",
    "--lora-modules",
    "--kv-transfer-config",
    "--speculative-config",
    "--model-impl",
    "--no-enable-prefix-caching",
    "--trust-remote-code",
}


def server_options(config: EncoderConfig) -> list[str]:
    """vLLM's command line for a server that pools `config.layers` and `config.poolings` on request.

    Raises InputError if vLLM supports neither `native` nor `transformers` extraction for the model.
    """
    folder = locate(config)
    model_config = read_config(folder)
    base_class(model_config)
    pooled = columns(config, model_config.get_text_config().num_hidden_layers)
    method, reason = allowed_methods(model_config, [parse_column(column)[1] for column in pooled])[0]
    if method == "hooks":
        raise InputError(f"model: {config.model} needs hooks: {reason}; use backend: transformers or vllm")
    arguments = states_arguments(pooled, on_request=True, identify=True)
    if method == "transformers":
        arguments["hf_overrides"] = {"architectures": ["TransformersForCausalLM"]}
    return [
        "--model",
        str(folder),
        "--served-model-name",
        config.model,
        "--dtype",
        config.dtype,
        "--enable-prefix-caching",
        *(part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", json.dumps(value))),
    ]


class ServerConfig(FrozenModel):
    """The model, its states that requests may ask for, and the address. Further options are vLLM's."""

    model: Annotated[str, Field(description="model folder or hub id", json_schema_extra={"positional": True})]
    layers: Annotated[
        tuple[int, ...] | Literal["upper", "all"],
        Field(description="hidden-state indices; `upper` is the upper half, `all` is every one"),
    ] = "upper"
    poolings: Annotated[tuple[Pooling, ...], Field(min_length=1, description="poolings of the token states")] = (
        "last",
        "mean",
    )
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="of weights and arithmetic")] = "bfloat16"
    host: Annotated[str, Field(description="address that the server binds")] = "127.0.0.1"
    cpu_cache_gib: Annotated[int, Field(ge=1, description="GiB of KV cache if there is no GPU")] = 4
    revision: Annotated[str | None, Field(description="hub revision; null is the default branch")] = None


def run(config: ServerConfig, rest: list[str]) -> str:
    """Serve a model with vLLM's OpenAI-compatible server, with prefill states on request."""
    for option in rest:
        if option.partition("=")[0].partition(".")[0].replace("_", "-") in OURS:
            raise InputError(
                f"{option}: with this option the states would not match the digest of the weights or could not be "
                "read, or code of the model's repository would run; leave it out"
            )
    encoder = EncoderConfig(**config.model_dump(include={"model", "revision", "dtype", "layers", "poolings"}))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    require_vllm(config.cpu_cache_gib)
    sys.argv = [SERVER, *server_options(encoder), "--host", config.host, *rest]
    runpy.run_module(SERVER, run_name="__main__")
    return "stopped"


if __name__ == "__main__":
    main_known(ServerConfig, run)
