"""Encoder configuration: the model, how it reads prompts, and how its backend runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from prefill_router.config import FrozenModel, renamed_fields

Pooling = Literal["last", "mean"]
TruncationSide = Literal["left", "middle", "right"]
Backend = Annotated[
    Literal["transformers", "vllm", "vllm_server"],
    BeforeValidator(lambda name: "vllm_server" if name == "engine" else name),  # name before format 2
]
SMOLLM2 = "smollm2"  # the bundled SmolLM2-135M-Instruct, the default encoder
MINILM = "minilm"  # the bundled all-MiniLM-L6-v2
EncoderName = Annotated[str, BeforeValidator(lambda name: MINILM if name == "embedded" else name)]


class VLLMConfig(FrozenModel):
    """Settings of the `vllm` backend. They change the states by rounding only."""

    tensor_parallel_size: Annotated[int, Field(ge=1, description="GPUs that share one encoder's weights")] = 1
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="fraction of a GPU's memory that one encoder uses")
    ] = 0.9
    cpu_cache_gib: Annotated[int, Field(ge=1, description="GiB of KV and state cache if there is no GPU")] = 1
    enforce_eager: Annotated[
        bool, Field(description="no torch.compile and no CUDA graphs: faster start, slower prefill")
    ] = False


class VLLMServerConfig(FrozenModel):
    """Address and request settings of the vLLM server that the `vllm_server` backend uses."""

    base_url: Annotated[str, Field(pattern="^https?://", description="URL of the server, including /v1")] = (
        "http://127.0.0.1:8001/v1"
    )
    served_model: Annotated[
        str | None, Field(description="name of the model on the server; None: the only served model")
    ] = None
    api_key_env: Annotated[str | None, Field(description="environment variable with the server's API key")] = None
    timeout_s: Annotated[float, Field(gt=0, description="seconds allowed per prompt; a timeout fails the batch")] = 60.0
    concurrency: Annotated[int, Field(ge=1, description="concurrent requests of one prompt each")] = 32


class EncoderConfig(FrozenModel):
    """The encoder's model, how it reads prompts, the layers and poolings to store, and the backend."""

    backend: Annotated[
        Backend,
        Field(description="transformers, vllm (starts vLLM processes) or vllm_server (uses a running vLLM server)"),
    ] = "transformers"

    model: Annotated[
        EncoderName,
        Field(description="bundled encoder (smollm2, minilm), model folder, .gguf file, or hub id; hub id/FILE.gguf"),
    ] = SMOLLM2
    revision: Annotated[str | None, Field(description="hub revision; None: the default branch")] = None
    adapter: Annotated[
        str | None,
        Field(
            description="folder of probe tokens from jobs.adapt, for backend transformers; the poolings then read "
            "these tokens; None: no probe tokens",
            exclude_if=lambda folder: folder is None,  # written configurations without adapter are as before
        ),
    ] = None
    layers: Annotated[
        tuple[int, ...] | Literal["upper", "all"],
        Field(description="hidden-state indices; `upper`: ceil(L/2)..L, `all`: 0..L, for L transformer blocks"),
    ] = "upper"
    poolings: Annotated[
        tuple[Pooling, ...], Field(min_length=1, description="poolings of the token states: last, mean")
    ] = ("last", "mean")
    max_length: Annotated[
        int | None,
        Field(ge=2, description="maximum tokens per prompt; None: the model's limit, at most 8,192"),
    ] = None
    truncation_side: Annotated[
        TruncationSide,
        Field(
            description="part of a longer prompt that is cut off; `middle` keeps the first and the last half of the "
            "available tokens; prompts usually end with the question"
        ),
    ] = "left"
    chat_template: Annotated[
        bool,
        Field(description="format the prompt as one user turn with the tokenizer's chat template"),
    ] = False
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="dtype of weights and arithmetic")] = "float32"
    states_dtype: Annotated[Literal["float16", "float32"], Field(description="dtype of the stored states")] = "float16"
    batch_tokens: Annotated[
        int, Field(ge=1, description="token budget of a padded batch, or of one vLLM scheduler step")
    ] = 8192
    device: Annotated[
        str, Field(description="torch device of the transformers backend; `auto`: cuda if available, else cpu")
    ] = "auto"
    vllm: VLLMConfig = VLLMConfig()
    vllm_server: VLLMServerConfig = VLLMServerConfig()

    _old_name = renamed_fields(engine="vllm_server")
