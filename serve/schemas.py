"""HTTP schemas: requests, replies and errors (in OpenAI's format), and the conversion of a conversation to a prompt.

In: the bytes of a request body. Out: pydantic models. Knows nothing of Ray and routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefill_router.errors import InputError, one_line
from prefill_router.routing.router import Decision

AUTO = "auto"  # the model name for the router's choice


class TextPart(BaseModel):
    """A part of a message. Parts other than text are accepted and ignored."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message in the format of chat clients. Fields other than role and content are accepted and ignored."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text" and part.text)
        return self.content or ""


class RouteRequest(BaseModel):
    """Body of POST /v1/route: `prompt` or `messages`, and restrictions of the choice."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str | None, Field(description="text of the query")] = None
    messages: Annotated[list[Message] | None, Field(description="conversation, instead of `prompt`")] = None
    lam: Annotated[
        float | None,
        Field(
            alias="lambda",
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="0 (most confident) to 1 (cheapest); default: the checkpoint's value",
        ),
    ] = None
    models: Annotated[
        list[str] | None, Field(min_length=1, description="candidate models; default: all models of the pool")
    ] = None
    max_cost_usd: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="maximum estimated cost of the answer, USD")
    ] = None

    @property
    def text(self) -> str:
        """The text to route. Raises InputError unless exactly one of prompt and messages is given, and has text."""
        if (self.prompt is None) == (self.messages is None):
            raise InputError(
                f"prompt: got {'neither' if self.prompt is None else 'both'} of prompt and messages, give exactly one"
            )
        field, text = ("prompt", self.prompt) if self.messages is None else ("messages", as_prompt(self.messages))
        if not text or not text.strip():
            raise InputError(f"{field}: got no text; give at least one character that is not white space")
        return text


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


class Timings(Reply):
    """Durations in milliseconds, measured in the gateway; they include queueing, batching and transport."""

    encode: float
    route: float
    total: float


class RouteReply(Reply):
    """Reply of POST /v1/route: the decision."""

    model: Annotated[str, Field(description="chosen model")]
    lam: Annotated[float, Field(alias="lambda", description="lambda of the decision, in [0, 1]")]
    candidates: Annotated[list[CandidateReply], Field(description="candidate models, by decreasing score")]
    encoder: Annotated[list[str], Field(description="fingerprints of the encoders")]
    checkpoint: Annotated[str, Field(description="id of the checkpoint")]
    timings_ms: Timings
    decision_id: Annotated[str, Field(description="unique id of the decision")]


class ModelReply(Reply):
    """A model in OpenAI's format."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0  # required by OpenAI's clients; unknown here
    owned_by: str = "prefill-router"


class ModelsReply(Reply):
    """Reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class Health(Reply):
    """Reply of GET /healthz. `refused`: why the last new checkpoint could not become live; None if it could."""

    status: Literal["ok"] = "ok"
    checkpoint: str
    refused: str | None = None


class ErrorDetail(Reply):
    """An error in OpenAI's format. `param` is the field of the request that is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    """Body of every error reply."""

    error: ErrorDetail


def as_prompt(messages: Sequence[Message]) -> str:
    """The conversation as one text: the texts of the messages joined by newlines, without roles.

    The last user message is moved to the end: long prompts are truncated on the left, and the question must remain.
    """
    ordered = list(messages)
    question = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if question is not None:
        ordered.append(ordered.pop(question))
    return "\n".join(message.text for message in ordered if message.text)


def read_request(body: bytes) -> RouteRequest:
    """Parses a request body. Raises pydantic's ValidationError, which `invalid` converts to an error reply."""
    return RouteRequest.model_validate_json(body)


def invalid(error: ValidationError) -> ErrorDetail:
    """The error of an invalid body: the field, the value received and the allowed values."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(step) for step in first["loc"]) or None
    if first["type"] == "json_invalid":
        return ErrorDetail(
            message=f"body: {first['msg']}; expected a JSON object", type="invalid_request_error", code="invalid_json"
        )
    hint = ""
    if first["type"] == "extra_forbidden":
        fields = ", ".join(info.alias or name for name, info in RouteRequest.model_fields.items())
        hint = f"; allowed fields: {fields}"
    return ErrorDetail(message=one_line(error) + hint, type="invalid_request_error", param=param, code="invalid_value")


def rejected(error: InputError) -> ErrorDetail:
    """The error of a valid body that cannot be answered. `param` is the first word of the message if it is a field."""
    field = str(error).partition(":")[0]
    known = {info.alias or name for name, info in RouteRequest.model_fields.items()}
    return ErrorDetail(
        message=str(error), type="invalid_request_error", param=field if field in known else None, code="invalid_value"
    )


def route_reply(decision: Decision, **rest: Any) -> RouteReply:
    """The reply for a decision; `rest` are the other fields of `RouteReply`."""
    candidates = [
        CandidateReply(
            model=c.model, confidence=c.confidence, uncertainty=c.uncertainty, cost_usd=c.cost_usd, score=c.score
        )
        for c in decision.candidates
    ]
    return RouteReply(model=decision.model, lam=decision.lam, candidates=candidates, **rest)
