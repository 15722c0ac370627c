"""The application's configuration: which checkpoint, and the resources of each deployment.

In: the arguments of `serve run serve.app:build ...`, `args` of a deploy file, or a YAML file. Out: frozen models with
bounds and units. `Live` is the part that can change while requests are served (`user_config`).
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prefill_router.config import FrozenModel, renamed_fields
from prefill_router.prefill.config import Backend, EncoderConfig, VLLMConfig, VLLMServerConfig

CheckpointSource = Annotated[
    str,
    Field(
        min_length=1, description="checkpoint folder, models:/prefill-router@ALIAS or models:/prefill-router/VERSION"
    ),
]


class Live(FrozenModel):
    """`user_config` of all three deployments: the checkpoint that decides. Changed without a restart."""

    checkpoint: CheckpointSource


class GatewayConfig(FrozenModel):
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0, description="logical CPUs per replica")] = 0.25
    max_ongoing_requests: Annotated[int, Field(ge=1, description="requests in flight per replica")] = 256
    max_queued_requests: Annotated[
        int, Field(ge=-1, description="waiting requests per proxy before it answers 503; -1 is no limit")
    ] = 1024
    max_body_bytes: Annotated[int, Field(ge=1, description="larger request bodies are refused with 413")] = 1_048_576
    timeout_s: Annotated[float, Field(gt=0, description="seconds until a decision is given up with 504")] = 60.0


class EncoderOverride(FrozenModel):
    """How an encoder is run here, where that is not how its states were made for training. What is None stays."""

    backend: Backend | None = None
    device: str | None = None
    batch_tokens: Annotated[int | None, Field(ge=1)] = None
    vllm: VLLMConfig | None = None
    vllm_server: VLLMServerConfig | None = None

    _old_name = renamed_fields(engine="vllm_server")

    def apply(self, config: EncoderConfig) -> EncoderConfig:
        """The configuration, run as wanted here. Its states are the same."""
        changed = {name: value for name, value in self if value is not None}
        return config.model_copy(update=changed)


class EncoderDeploymentConfig(FrozenModel):
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0, description="logical CPUs per replica; also its arithmetic threads")] = 1.0
    gpus: Annotated[float, Field(ge=0, description="GPUs per replica; a fraction shares one")] = 0.0
    max_batch_size: Annotated[int, Field(ge=1, description="prompts encoded together")] = 16
    batch_wait_s: Annotated[float, Field(ge=0, description="seconds that a prompt waits for others")] = 0.005
    max_queued_requests: Annotated[
        int, Field(ge=-1, description="waiting prompts per gateway before it answers 503; -1 is no limit")
    ] = 512
    overrides: Annotated[
        dict[str, EncoderOverride],
        Field(
            description="by encoder, as the checkpoint names it (`model` or fingerprint): on which backend it runs here"
        ),
    ] = {}

    @model_validator(mode="after")
    def _gpus_of_engines(self) -> Self:
        for name, one in self.overrides.items():
            together = one.vllm.tensor_parallel_size if one.vllm and one.backend == "vllm" else 1
            if together > 1 and self.gpus not in (0, together):  # 0: on CPUs
                raise ValueError(
                    f"gpus: got {self.gpus:g}, but {name} has tensor_parallel_size {together}; set gpus to {together}"
                )
        return self


class RouterDeploymentConfig(FrozenModel):
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0, description="logical CPUs per replica")] = 0.25
    max_ongoing_requests: Annotated[int, Field(ge=1, description="requests in flight per replica")] = 64
    max_queued_requests: Annotated[
        int, Field(ge=-1, description="waiting requests per gateway before it answers 503; -1 is no limit")
    ] = 1024


class RouterAppConfig(FrozenModel):
    """Argument of `serve.app:build`."""

    checkpoint: CheckpointSource
    gateway: GatewayConfig = GatewayConfig()
    encoder: EncoderDeploymentConfig = EncoderDeploymentConfig()
    router: RouterDeploymentConfig = RouterDeploymentConfig()
