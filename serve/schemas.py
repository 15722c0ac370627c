"""HTTP schemas: replies, and errors in OpenAI's format. `serve/requests.py` has the request.

In: decisions and exceptions. Out: pydantic models. Knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from prefill_router.errors import InputError
from prefill_router.pool import Capability, TargetModel
from prefill_router.routing.router import Decision, Reason
from serve.chat import SHARED, RouterOptions
from serve.requests import RouteRequest, field_path

FIELDS = tuple(info.alias or name for name, info in RouteRequest.model_fields.items())
MAX_ERRORS = 20  # of an invalid body that are described one by one


class Reply(BaseModel):
    """Base of the replies."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, serialize_by_alias=True)


class CandidateReply(Reply):
    """A candidate model of a decision."""

    model: str
    confidence: Annotated[float, Field(description="probability of a correct answer")]
    uncertainty: Annotated[float, Field(description="standard deviation of the confidence over the ensemble")]
    cost_usd: Annotated[float, Field(description="estimated cost of this query, USD")]
    score: Annotated[float, Field(description="score by which the policy ranks; higher is better")]
    expected_output_tokens: Annotated[float, Field(description="expected length of the answer, tokens")]


class ExcludedReply(Reply):
    """A model of the pool that is not a candidate."""

    model: str
    reason: Annotated[str, Field(description="the first requirement that the model does not meet")]


class Timings(Reply):
    """Durations in milliseconds, measured in the gateway; they include queueing, batching and transport."""

    encode: float
    route: float
    total: float


class RouteReply(Reply):
    """Reply of POST /v1/route: the decision."""

    model: Annotated[str, Field(description="chosen model")]
    lam: Annotated[float, Field(alias="lambda", description="lambda of the decision, in [0, 1]")]
    candidates: Annotated[
        list[CandidateReply], Field(description="candidate models: the chosen one, then the others by decreasing score")
    ]
    excluded: Annotated[list[ExcludedReply], Field(description="the other models of the pool, with the reason")]
    reason: Annotated[
        Reason,
        Field(
            description="score: the highest score; margin: the best static choice, because no score is higher by its "
            "margin; novelty: the fallback model, because the query is novel"
        ),
    ]
    novelty: Annotated[
        float | None,
        Field(
            description="share of held-out training queries that are closer to the training queries, in [0, 1]; "
            "null if the checkpoint has no novelty"
        ),
    ]
    unknown_share: Annotated[
        float | None,
        Field(
            description="share of the prompt's text that the encoder's tokenizer does not know, in [0, 1]; null if not "
            "recorded"
        ),
    ]
    cost_extrapolated: Annotated[
        bool, Field(description="whether the cost of a candidate exceeds every cost in training")
    ]
    encoder: Annotated[list[str], Field(description="fingerprints of the encoders")]
    checkpoint: Annotated[str, Field(description="id of the checkpoint")]
    timings_ms: Timings
    decision_id: Annotated[str, Field(description="unique id of the decision")]


class ModelMetadata(Reply):
    """Limits and prices of a model of the pool."""

    context_tokens: Annotated[int | None, Field(description="context window in tokens; null: no limit is declared")]
    capabilities: Annotated[tuple[Capability, ...], Field(description="declared capabilities")]
    input_usd_per_mtok: Annotated[float | None, Field(description="price of input, USD per million tokens")]
    output_usd_per_mtok: Annotated[float | None, Field(description="price of output, USD per million tokens")]
    can_answer: Annotated[bool, Field(description="whether the gateway has a server of the model, for chats")]


class ModelReply(Reply):
    """A model in OpenAI's format. `metadata` is null for `auto`."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0  # required by OpenAI's clients; unknown here
    owned_by: str = "prefill-router"
    metadata: ModelMetadata | None = None


class ModelsReply(Reply):
    """Reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class FeedbackRequest(BaseModel):
    """Body of POST /v1/feedback: `correct` or `score` of the answer of a decision."""

    model_config = ConfigDict(extra="forbid", strict=True)

    decision_id: Annotated[str, Field(min_length=1, max_length=100, description="id of the decision, from its reply")]
    correct: Annotated[bool | None, Field(description="whether the answer was right")] = None
    score: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="quality of the answer, 0 to 1")
    ] = None
    source: Annotated[str | None, Field(max_length=200, description="who says so, such as a user or a judge")] = None

    @model_validator(mode="after")
    def _one_value(self) -> FeedbackRequest:
        if (self.correct is None) == (self.score is None):
            raise ValueError("give exactly one of correct and score")
        return self

    @property
    def value(self) -> float:
        """The score; 1 for a right and 0 for a wrong answer."""
        return float(bool(self.correct)) if self.score is None else self.score


class FeedbackReply(Reply):
    """Reply of POST /v1/feedback."""

    decision_id: str
    recorded: Literal[True] = True


class TokenCount(Reply):
    """Reply of POST /v1/messages/count_tokens, an estimate."""

    input_tokens: int


class BandReply(Reply):
    """The comparison of canary and live checkpoint in one band, from which less is better."""

    verdict: Annotated[
        Literal["healthy", "broken", "undecided"],
        Field(description="healthy: shown to be within the margin; broken: shown to be outside"),
    ]
    margin: Annotated[float, Field(description="largest accepted difference")]
    live: Annotated[float | None, Field(description="mean of the live checkpoint; null without outcomes")]
    canary: Annotated[float | None, Field(description="mean of the canary; null without outcomes")]
    live_n: Annotated[int, Field(description="conversations of the live checkpoint that count")]
    canary_n: Annotated[int, Field(description="conversations of the canary that count")]


class RolloutReply(Reply):
    """What became of a canary: `testing`, `ready` to become the champion, or `stopped` for a `reason`."""

    state: Literal["testing", "ready", "stopped"]
    canary: Annotated[str, Field(description="the canary's place, or its version in the registry")]
    share: Annotated[float, Field(description="the canary's share of the conversations, also that at its stop")]
    bands: Annotated[dict[str, BandReply], Field(description="comparison by band, at this share")] = {}
    reason: Annotated[str | None, Field(description="why it was stopped")] = None


class Health(Reply):
    """Reply of GET /healthz: ids of the live checkpoint, canary and shadow.

    `refused`: why the last new checkpoints could not become live; None if they could. `rollout`: what became of the
    last canary; None if there was none.
    """

    status: Literal["ok"] = "ok"
    checkpoint: str
    canary: str | None = None
    shadow: str | None = None
    refused: str | None = None
    rollout: RolloutReply | None = None


class SeenDecision(Reply):
    """One of the latest decisions of a replica."""

    decision_id: str
    time: Annotated[float, Field(description="time of the decision, Unix seconds")]
    model: Annotated[str, Field(description="chosen model")]
    reason: Annotated[str, Field(description="reason for the chosen model")]
    confidence: Annotated[float | None, Field(description="confidence of the chosen model; null without a decision")]
    estimated_usd: Annotated[float | None, Field(description="cost of the chosen model before the answer, USD")]
    served: Annotated[str | None, Field(description="model that answered; null: none, or none yet")]
    failed: Annotated[bool | None, Field(description="whether the answer ended with an error; null: no answer yet")]
    cost_usd: Annotated[float | None, Field(description="cost of the answer by its reported tokens, USD")]
    latency_s: Annotated[float | None, Field(description="duration until the end of the answer, seconds")]


class ServerState(Reply):
    """Whether a model's server is asked, by the circuit breaker of one replica."""

    state: Annotated[
        Literal["closed", "open", "testing", "missing"],
        Field(
            description="closed: requests are sent; open: none are, until a test request; testing: the test request is "
            "under way; missing: the gateway has no server of the model"
        ),
    ]
    wait_s: Annotated[
        float | None,
        Field(description="seconds until a request may be sent; null if that is unknown (testing, missing)"),
    ] = None
    reason: Annotated[str | None, Field(description="why the server is missing")] = None


class ReplicaTraffic(Reply):
    """What one gateway replica has counted since its start."""

    id: str
    started: Annotated[float, Field(description="start of the replica, Unix seconds")]
    requests_60_s: Annotated[int, Field(description="decisions of the last 60 seconds")]
    requests_10_min: Annotated[int, Field(description="decisions of the last 10 minutes")]
    requests_per_10_s: Annotated[list[int], Field(description="the same by 10 seconds, the oldest first")]
    decisions: Annotated[dict[str, dict[str, int]], Field(description="decisions by chosen model and reason")]
    answers: Annotated[dict[str, int], Field(description="complete answers by model")]
    errors: Annotated[dict[str, int], Field(description="chats that ended with an error, by the last model asked")]
    fallbacks: Annotated[dict[str, dict[str, int]], Field(description="failed attempts by model and reason")]
    spent_usd: Annotated[dict[str, float], Field(description="cost of the answers by model, USD")]
    reference_usd: Annotated[
        dict[str, float],
        Field(
            description="cost of the same answers by policy, USD, had the most expensive candidate (most_expensive) or "
            "the best model on the training queries (best_single) given them all"
        ),
    ]


class StatusReply(Health):
    """Reply of GET /v1/status: the fields of /healthz, and what one gateway replica has seen."""

    time: Annotated[float, Field(description="time of the reply, Unix seconds")]
    replica: ReplicaTraffic
    servers: Annotated[dict[str, ServerState], Field(description="state of the server of each model of the pool")]
    latest: Annotated[list[SeenDecision], Field(description="latest decisions of the replica, the newest first")]


class ErrorDetail(Reply):
    """An error in OpenAI's format. `param` is the field of the request that is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    """Body of every error reply."""

    error: ErrorDetail


class MessagesError(Reply):
    """An error in Anthropic's format."""

    type: str
    message: str


class MessagesErrorReply(Reply):
    """Body of every error reply under /v1/messages."""

    type: Literal["error"]
    error: MessagesError


def invalid(error: ValidationError, fields: Sequence[str] = FIELDS) -> ErrorDetail:
    """The error of an invalid body: the field, the value received and the allowed values.

    `fields` are the allowed fields of the object in which other fields are refused.
    """
    if error.error_count() > MAX_ERRORS:  # pydantic takes seconds to list a hundred thousand errors
        allowed = f"allowed fields: {', '.join(fields)}"
        return ErrorDetail(
            message=f"body: {error.error_count():,} fields are unknown or invalid; {allowed}",
            type="invalid_request_error",
            code="invalid_value",
        )
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return ErrorDetail(
            message=f"body: {first['msg']}; expected a JSON object", type="invalid_request_error", code="invalid_json"
        )
    hint = f"; allowed fields: {', '.join(fields)}" if first["type"] == "extra_forbidden" else ""
    return ErrorDetail(
        message="; ".join(map(_described, errors)) + hint,
        type="invalid_request_error",
        param=field_path(first["loc"]) or None,
        code="invalid_value",
    )


def _described(error: ErrorDetails) -> str:
    """One error as `field: message (got VALUE)`."""
    silent = error["type"] in ("missing", "extra_forbidden", "value_error")  # messages of value errors name the value
    got = "" if silent else f" (got {error['input']!r:.80})"
    return f"{field_path(error['loc']) or 'body'}: {error['msg'].removeprefix('Value error, ')}{got}"


def rejected(error: InputError, request: RouteRequest | None = None) -> ErrorDetail:
    """The error of a valid body that cannot be answered.

    The first word of the library's message is the field at fault. The reply names the fields of `request` that set it,
    and `param` is the field if there is exactly one.
    """
    message = str(error)
    field, colon, rest = message.partition(":")
    sent = request.sent_as(field) if request else ()
    if sent:
        message = ", ".join(sent) + colon + rest
    named = sent or (field,)
    param = named[0] if len(named) == 1 and named[0] in FIELDS else None
    return ErrorDetail(message=message, type="invalid_request_error", param=param, code="invalid_value")


def rejected_chat(error: ValidationError | InputError) -> ErrorDetail:
    """The error of a chat that cannot be answered. Options of the router are named by their path, `router.NAME`."""
    names = tuple(info.alias or name for name, info in RouterOptions.model_fields.items())
    if isinstance(error, ValidationError):
        return invalid(error, names)
    field, colon, rest = str(error).partition(":")
    path = f"router.{field}" if field in names else field
    known = path if path != field or field in ("model", *SHARED) else None
    return ErrorDetail(message=path + colon + rest, type="invalid_request_error", param=known, code="invalid_value")


def model_reply(model: TargetModel, can_answer: bool) -> ModelReply:
    """The reply for a model of the pool."""
    metadata = ModelMetadata(
        context_tokens=model.context_tokens,
        capabilities=model.capabilities,
        input_usd_per_mtok=model.input_usd_per_mtok,
        output_usd_per_mtok=model.output_usd_per_mtok,
        can_answer=can_answer,
    )
    return ModelReply(id=model.name, metadata=metadata)


def candidate_replies(decision: Decision) -> tuple[list[CandidateReply], list[ExcludedReply]]:
    """The candidates and the excluded models of a decision."""
    candidates = [
        CandidateReply(
            model=c.model,
            confidence=c.confidence,
            uncertainty=c.uncertainty,
            cost_usd=c.cost_usd,
            score=c.score,
            expected_output_tokens=c.expected_output_tokens,
        )
        for c in decision.candidates
    ]
    return candidates, [ExcludedReply(model=one.model, reason=one.reason) for one in decision.excluded]


def route_reply(decision: Decision, **rest: Any) -> RouteReply:
    """The reply for a decision; `rest` are the other fields of `RouteReply`."""
    candidates, excluded = candidate_replies(decision)
    return RouteReply(
        model=decision.model,
        lam=decision.lam,
        candidates=candidates,
        excluded=excluded,
        reason=decision.reason,
        novelty=decision.novelty,
        unknown_share=decision.unknown_share,
        cost_extrapolated=decision.extrapolated,
        **rest,
    )
