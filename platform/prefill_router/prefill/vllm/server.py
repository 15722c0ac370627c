"""Starts vLLM's OpenAI-compatible server so that the `engine` backend can read states from it.

    python -m prefill_router.prefill.vllm.server MODEL --layers '[14, 21, 28]' --port 8001 [vLLM's own options]

A request gets states only if its `kv_transfer_params` ask for them. Others are served as they would be without, but for
`min_p`, `logit_bias` and custom logits processors, which vLLM refuses beside the reading of states. Prefix caching is
on, so that a prompt whose states were read is not prefilled again when it is sent to be answered. Options that are not
ours are handed to vLLM; if they change states, the engine refuses to start (connector.py). vLLM has to be able to hand
out the model's states (ways.py): hooks are not for serving.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys

import yaml
from pydantic import ValidationError

from prefill_router.errors import InputError, one_line
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import parse_column
from prefill_router.prefill.loading import base_class, columns, locate, read_config
from prefill_router.prefill.vllm.extraction_methods import allowed_methods, require_vllm, states_arguments

SERVER = "vllm.entrypoints.openai.api_server"
# Options of vLLM that we set, or that change states under the same weights: those that can be told before it starts.
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
}


def server_options(config: EncoderConfig) -> list[str]:
    """The server's command line for a model whose states of `config.layers` and `config.poolings` may be asked for.

    Raises InputError for a model that vLLM cannot hand out the states of.
    """
    folder = locate(config)
    model_config = read_config(folder)
    base_class(model_config)
    asked = columns(config, model_config.get_text_config().num_hidden_layers)
    way, why = allowed_methods(model_config, [parse_column(column)[1] for column in asked])[0]
    if way == "hooks":
        raise InputError(f"model: {config.model}: {why}; use backend: transformers or vllm")
    arguments = states_arguments(asked, on_request=True, identify=True)
    if way == "transformers":
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


def main() -> None:
    """Exit codes as the jobs': the server's own, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m prefill_router.prefill.vllm.server",
        allow_abbrev=False,
        description="vLLM's OpenAI-compatible server, with prefill states on request. Further options are vLLM's.",
    )
    parser.add_argument("model", help="model folder or hub id; first of all")
    parser.add_argument("--layers", default="upper", help="hidden-state indices, `upper` or `all` (default: upper)")
    parser.add_argument("--poolings", default="[last, mean]", help="default: [last, mean]")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: bfloat16")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--cpu-cache-gib", type=int, default=4, help="GiB of cache where there is no GPU (default: 4)")
    parser.add_argument("--revision", help="hub revision (default: the default branch)")
    options, rest = parser.parse_known_args()
    try:
        for option in rest:
            if option.partition("=")[0].partition(".")[0].replace("_", "-") in OURS:
                raise InputError(
                    f"{option}: the states would not be those that the weights' digest stands for, or not "
                    "be handed out; leave it out"
                )
        config = EncoderConfig(
            model=options.model,
            revision=options.revision,
            dtype=options.dtype,
            layers=yaml.safe_load(options.layers),
            poolings=yaml.safe_load(options.poolings),
        )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # of a server one wants to see what it does
        require_vllm(options.cpu_cache_gib)
        arguments = server_options(config)
    except (InputError, ValidationError, yaml.YAMLError) as error:
        says = one_line(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        print(f"server: error: {says}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [SERVER, *arguments, "--host", options.host, *rest]
    runpy.run_module(SERVER, run_name="__main__")


if __name__ == "__main__":
    main()
