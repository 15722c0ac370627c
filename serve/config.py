"""The application's configuration: the checkpoint, and the resources and limits of each deployment.

In: the arguments of `serve run serve.app:build ...`, `args` of a deploy file, or a YAML file. Out: frozen models with
bounds and units. Only `Live` can change without a restart; Serve calls it `user_config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from prefill_router.config import FrozenModel, renamed_fields
from prefill_router.locations import location
from prefill_router.pool import Endpoint
from prefill_router.prefill.config import Backend, EncoderConfig, VLLMConfig, VLLMServerConfig
from serve.breaker import BreakerConfig
from serve.decision_log import DecisionLogConfig
from serve.keys import ApiKey
from serve.sessions import SessionsConfig


def _checked(checkpoint: str) -> str:
    location(checkpoint)  # refuses an unsupported scheme
    return checkpoint


CheckpointSource = Annotated[
    str,
    Field(
        min_length=1,
        description="checkpoint folder or URI, models:/prefill-router@ALIAS or models:/prefill-router/VERSION",
    ),
    AfterValidator(_checked),
]


Origin = Annotated[
    str, Field(pattern=r"^(\*|https?://[^/\s]+)$", description="* for every origin, or SCHEME://HOST[:PORT]")
]


class Canary(FrozenModel):
    """A second checkpoint that decides a share of the conversations."""

    checkpoint: CheckpointSource
    share: Annotated[float, Field(gt=0, lt=1, description="share of the conversations that it decides")]


ArmName = Literal["live", "canary", "shadow"]
Margin = Annotated[float | None, Field(gt=0, lt=1)]


class Rollout(FrozenModel):
    """When a canary is stopped, and how its share grows.

    Each margin is the largest difference between canary and live checkpoint that is accepted; none: not compared.
    """

    alpha: Annotated[
        float, Field(gt=0, lt=0.5, description="probability that a canary within all margins is ever stopped")
    ] = 0.05
    errors: Annotated[
        Margin, Field(description="excess of the share of chats whose chosen model did not answer properly")
    ] = 0.02
    no_decision: Annotated[Margin, Field(description="excess of the share of requests without a decision")] = 0.02
    feedback: Annotated[Margin, Field(description="loss of the mean score of feedback")] = 0.05
    novelty: Annotated[
        Margin, Field(description="excess of the share of queries with a novelty above serve.trial.NOVEL")
    ] = 0.1
    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(description="further shares of the canary, in this order; none: it keeps its share"),
    ] = ()
    hold: Annotated[
        int | None,
        Field(
            ge=1,
            description="conversations of the canary after which the next share begins without a broken band; none: "
            "when every band with outcomes is healthy",
        ),
    ] = None
    promote: Annotated[
        bool, Field(description="whether a canary that has passed its last share becomes the champion, without gates")
    ] = False

    @model_validator(mode="after")
    def _shares_grow(self) -> Self:
        if any(after <= before for before, after in zip(self.shares, self.shares[1:], strict=False)):
            raise ValueError(f"shares: got {list(self.shares)}; give growing shares")
        return self

    @property
    def margins(self) -> dict[str, float]:
        """The margins of the bands that are compared."""
        found = {name: getattr(self, name) for name in ("errors", "no_decision", "feedback", "novelty")}
        return {name: margin for name, margin in found.items() if margin is not None}


class Live(FrozenModel):
    """`user_config` of gateway, encoder and router: their checkpoints, which can change without a restart."""

    checkpoint: CheckpointSource
    canary: Annotated[Canary | None, Field(description="checkpoint that decides a share of the conversations")] = None
    shadow: Annotated[
        CheckpointSource | None, Field(description="checkpoint whose decisions are logged and have no effect")
    ] = None
    follow_s: Annotated[
        float | None,
        Field(
            ge=0,
            description="time between two looks at the registry for versions that aliases name now, in seconds; 0 or "
            "none: an alias is resolved once",
        ),
    ] = 10.0
    rollout: Annotated[
        Rollout | None, Field(description="when the canary is stopped, and how its share grows; none: never")
    ] = Rollout()

    @model_validator(mode="after")
    def _shares_grow(self) -> Self:
        further = () if self.canary is None or self.rollout is None else self.rollout.shares
        if self.canary is not None and further and further[0] <= self.canary.share:
            raise ValueError(
                f"rollout.shares: got {list(further)}, but the canary has {self.canary.share:g} already; give larger "
                "shares"
            )
        return self

    def follows(self, where: str) -> bool:
        """Whether the version at `where`, an alias, is followed."""
        return bool(self.follow_s) and where.startswith("models:") and "@" in where

    @property
    def followed(self) -> bool:
        """Whether any checkpoint is followed."""
        return any(map(self.follows, self.sources))

    @property
    def compared(self) -> bool:
        """Whether the canary is compared with the live checkpoint."""
        return self.canary is not None and self.rollout is not None

    @property
    def beside(self) -> bool:
        """Whether other checkpoints decide beside the live one."""
        return self.canary is not None or self.shadow is not None

    @property
    def arms(self) -> tuple[tuple[ArmName, str], ...]:
        """The arms (serve/arms.py) and their checkpoints: live, canary, shadow."""
        canary = None if self.canary is None else self.canary.checkpoint
        found: tuple[tuple[ArmName, str | None], ...]
        found = ("live", self.checkpoint), ("canary", canary), ("shadow", self.shadow)
        return tuple((name, where) for name, where in found if where is not None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The checkpoints: live, canary, shadow."""
        return tuple(where for _, where in self.arms)

    def moved(self, place: Callable[[str], str]) -> Self:
        """A copy whose checkpoints are replaced by `place(checkpoint)`."""
        canary = self.canary and self.canary.model_copy(update={"checkpoint": place(self.canary.checkpoint)})
        shadow = self.shadow and place(self.shadow)
        return self.model_copy(update={"checkpoint": place(self.checkpoint), "canary": canary, "shadow": shadow})


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
