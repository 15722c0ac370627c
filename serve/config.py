"""The application's configuration: the checkpoint, and the resources and limits of each deployment.

In: the arguments of `serve run serve.app:build ...`, `args` of a deploy file, or a YAML file. Out: frozen models with
bounds and units. Only `Live` can change without a restart; Serve calls it `user_config`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prefill_router.config import FrozenModel, renamed_fields
from prefill_router.pool import Endpoint
from prefill_router.prefill.config import Backend, EncoderConfig, VLLMConfig, VLLMServerConfig
from serve.breaker import BreakerConfig
from serve.decision_log import DecisionLogConfig
from serve.keys import ApiKey
from serve.live import Live
from serve.sessions import SessionsConfig

Origin = Annotated[
    str, Field(pattern=r"^(\*|https?://[^/\s]+)$", description="* for every origin, or SCHEME://HOST[:PORT]")
]


class UpstreamConfig(FrozenModel):
    """Deadlines of the upstream servers, in seconds, and their circuit breaker."""

    connect_s: Annotated[float, Field(gt=0, description="maximum time to resolve the name and connect")] = 5.0
    first_byte_s: Annotated[float, Field(gt=0, description="maximum time for the first byte of a stream")] = 60.0
    answer_s: Annotated[float, Field(gt=0, description="maximum time for an answer that is not a stream")] = 600.0
    idle_s: Annotated[float, Field(gt=0, description="maximum time between two parts of an answer")] = 120.0
    max_wait_s: Annotated[
        float, Field(ge=0, description="maximum time that a request waits if every server has to be left alone")
    ] = 10.0
    breaker: BreakerConfig = BreakerConfig()


class GatewayConfig(FrozenModel):
    """Resources and limits of the gateway, which answers HTTP requests."""

    replicas: Annotated[int, Field(ge=1, description="number of replicas")] = 1
    cpus: Annotated[float, Field(gt=0, description="logical CPUs per replica")] = 0.25
    max_ongoing_requests: Annotated[
        int, Field(ge=1, description="maximum number of concurrent requests per replica")
    ] = 256
    max_queued_requests: Annotated[
        int,
        Field(ge=-1, description="maximum number of waiting requests per proxy; 503 if more; -1: no limit"),
    ] = 1024
    max_body_bytes: Annotated[
        int, Field(ge=1, description="maximum size of a request body in bytes; 413 if larger")
    ] = 1_048_576
    timeout_s: Annotated[float, Field(gt=0, description="maximum time for a decision in seconds; 504 if longer")] = 60.0
    default_model: Annotated[
        str | None,
        Field(description="model that answers chats if the encoder or the router does not decide; none: 503"),
    ] = None
    fallbacks: Annotated[
        int, Field(ge=0, description="maximum number of further models that a chat tries if one does not answer")
    ] = 2
    keep_alive_s: Annotated[
        float, Field(gt=0, description="time without data after which a stream gets a comment, in seconds")
    ] = 15.0
    drain_s: Annotated[
        float, Field(ge=0, description="maximum time that answers under way have when a replica stops, in seconds")
    ] = 60.0
    upstream: UpstreamConfig = UpstreamConfig()
    endpoints: Annotated[
        dict[str, Endpoint],
        Field(description="servers of models by name; they replace the endpoints that pool.yaml had in training"),
    ] = {}
    log: DecisionLogConfig = DecisionLogConfig()
    keys: Annotated[
        dict[str, ApiKey],
        Field(
            description="API keys by name: the SHA-256 digest, from `python -m serve.keys NAME`, or an object with "
            "`digest` and limits; none: no key"
        ),
    ] = {}
    cors_origins: Annotated[
        tuple[Origin, ...],
        Field(description="origins of web pages whose scripts may call the application; none: no CORS headers"),
    ] = ()


class EncoderOverride(FrozenModel):
    """Overrides of an encoder's run-time settings when serving. None keeps the checkpoint's setting."""

    backend: Annotated[Backend | None, Field(description="backend that runs the encoder")] = None
    device: Annotated[str | None, Field(description="torch device: auto, cpu, cuda")] = None
    batch_tokens: Annotated[int | None, Field(ge=1, description="token budget of a batch")] = None
    adapter: Annotated[str | None, Field(description="the encoder's adapter folder on this machine")] = None
    vllm: VLLMConfig | None = None
    vllm_server: VLLMServerConfig | None = None

    _old_name = renamed_fields(engine="vllm_server")

    def apply(self, config: EncoderConfig) -> EncoderConfig:
        """`config` with these settings. They do not change the fingerprint."""
        changed = {name: value for name, value in self if value is not None}
        return config.model_copy(update=changed)


class EncoderDeploymentConfig(FrozenModel):
    """Resources and limits of the encoder, which turns prompts into states."""

    replicas: Annotated[int, Field(ge=1, description="number of replicas")] = 1
    cpus: Annotated[
        float, Field(gt=0, description="logical CPUs per replica, and its number of arithmetic threads")
    ] = 1.0
    gpus: Annotated[float, Field(ge=0, description="GPUs per replica; replicas with a fraction share a GPU")] = 0.0
    max_batch_size: Annotated[int, Field(ge=1, description="maximum number of prompts per batch")] = 16
    batch_wait_s: Annotated[
        float, Field(ge=0, description="maximum time that a prompt waits for its batch to fill, in seconds")
    ] = 0.005
    max_queued_requests: Annotated[
        int,
        Field(
            ge=-1,
            description="maximum number of waiting prompts per gateway; 429 if more; -1: no limit",
        ),
    ] = 512
    overrides: Annotated[
        dict[str, EncoderOverride],
        Field(
            description="overrides of an encoder's run-time settings when serving, by the encoder's model name or "
            "fingerprint"
        ),
    ] = {}

    @model_validator(mode="after")
    def _gpus_match_tensor_parallel_size(self) -> Self:
        for name, override in self.overrides.items():
            vllm = override.vllm if override.backend == "vllm" else None
            size = vllm.tensor_parallel_size if vllm else 1
            if size > 1 and self.gpus not in (0, size):  # 0: on CPUs
                raise ValueError(
                    f"gpus: got {self.gpus:g}, but {name} has tensor_parallel_size {size}; set gpus to {size}"
                )
        return self


class RouterDeploymentConfig(FrozenModel):
    """Resources and limits of the router, which turns states into decisions."""

    replicas: Annotated[int, Field(ge=1, description="number of replicas")] = 1
    cpus: Annotated[float, Field(gt=0, description="logical CPUs per replica")] = 0.25
    max_ongoing_requests: Annotated[
        int, Field(ge=1, description="maximum number of concurrent requests per replica")
    ] = 64
    max_queued_requests: Annotated[
        int,
        Field(
            ge=-1,
            description="maximum number of waiting requests per gateway; 429 if more; -1: no limit",
        ),
    ] = 1024
    novelty_above: Annotated[
        float | None,
        Field(ge=0, lt=1, description="queries with a novelty above this value go to fallback_model; none: off"),
    ] = None
    fallback_model: Annotated[str | None, Field(description="model for novel queries; none: off")] = None

    @model_validator(mode="after")
    def _fallback_is_complete(self) -> Self:
        if (self.novelty_above is None) != (self.fallback_model is None):
            missing = "fallback_model" if self.fallback_model is None else "novelty_above"
            raise ValueError(f"{missing}: got none; novelty_above and fallback_model need each other, set both or none")
        return self


class RouterAppConfig(Live):
    """Argument of `serve.app:build`: the checkpoints, and the configuration of each deployment."""

    gateway: GatewayConfig = GatewayConfig()
    encoder: EncoderDeploymentConfig = EncoderDeploymentConfig()
    router: RouterDeploymentConfig = RouterDeploymentConfig()
    sessions: SessionsConfig = SessionsConfig()
