"""Which encoder to load, how it reads prompts, and how its backend runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from prefill_router.config import FrozenModel, renamed_fields

Pooling = Literal["last", "mean"]
Backend = Annotated[
    Literal["transformers", "vllm", "vllm_server"],
    BeforeValidator(lambda name: "vllm_server" if name == "engine" else name),  # its name before format 2
]
MINILM = "minilm"  # the bundled all-MiniLM-L6-v2, the default encoder
EncoderName = Annotated[str, BeforeValidator(lambda name: MINILM if name == "embedded" else name)]


class VLLMConfig(FrozenModel):
    """How the `vllm` backend runs. Nothing here changes a state beyond the last bits of its arithmetic."""

    tensor_parallel_size: Annotated[int, Field(ge=1, description="GPUs that share one encoder's weights")] = 1
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="share of a GPU's memory that an encoder takes")
    ] = 0.9
    cpu_cache_gib: Annotated[int, Field(ge=1, description="GiB for keys, values and states where there is no GPU")] = 1
    enforce_eager: Annotated[
        bool, Field(description="no torch.compile and no CUDA graphs: starts sooner, reads slower")
    ] = False


class VLLMServerConfig(FrozenModel):
    """Where the `vllm_server` backend finds the vLLM server that it reads its states from."""

    base_url: Annotated[str, Field(pattern="^https?://", description="of the server, up to and with /v1")] = (
        "http://127.0.0.1:8001/v1"
    )
    served_model: Annotated[str | None, Field(description="the model's name there; None: the only one served")] = None
    api_key_env: Annotated[str | None, Field(description="environment variable with the server's key")] = None
    timeout_s: Annotated[float, Field(gt=0, description="seconds that a prompt may take; longer ends the call")] = 60.0
    concurrency: Annotated[int, Field(ge=1, description="prompts sent at once; the server batches them")] = 32


class EncoderConfig(FrozenModel):
    """Which encoder to load and how it reads."""

    backend: Annotated[
        Backend,
        Field(
            description="what runs the model: transformers; vLLM in processes of its own; or a vLLM "
            "server that is there"
        ),
    ] = "transformers"

    model: Annotated[EncoderName, Field(description="path, hub id, or `minilm` for the bundled all-MiniLM-L6-v2")] = (
        MINILM
    )
    revision: Annotated[str | None, Field(description="hub revision; None is the default branch")] = None
    layers: Annotated[
        tuple[int, ...] | Literal["upper", "all"],
        Field(description="hidden-state indices; `upper` is ceil(L/2)..L, `all` is 0..L"),
    ] = "upper"
    poolings: Annotated[tuple[Pooling, ...], Field(min_length=1)] = ("last", "mean")
    max_length: Annotated[
        int | None, Field(ge=2, description="tokens kept of a prompt; None: what the model takes, 4,096 at most")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"], Field(description="the side cut off; the question tends to stand last")
    ] = "left"
    chat_template: Annotated[
        bool,
        Field(
            description="wrap the prompt as one user turn, with the tokenizer's own template and the generation prompt"
        ),
    ] = False
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="of weights and arithmetic")] = "float32"
    states_dtype: Annotated[Literal["float16", "float32"], Field(description="of the states that are kept")] = "float16"
    batch_tokens: Annotated[int, Field(ge=1, description="tokens read in one step: of a padded batch, or by vLLM")] = (
        8192
    )
    device: Annotated[
        str, Field(description="torch device of the transformers backend; `auto` is cuda where there is one, else cpu")
    ] = "auto"
    vllm: VLLMConfig = VLLMConfig()
    vllm_server: VLLMServerConfig = VLLMServerConfig()

    _old_name = renamed_fields(engine="vllm_server")
