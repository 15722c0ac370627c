"""What goes over HTTP: requests, replies, errors in OpenAI's shape, and how a conversation becomes a prompt.

In: the bytes of a request body. Out: pydantic models. Knows nothing of Ray or of how a decision is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefill_router.errors import InputError, one_line
from prefill_router.routing.router import Decision

AUTO = "auto"  # the model name that stands for "let the router choose"


class TextPart(BaseModel):
    """A part of a message. Parts other than text are let through and not read: encoders read text."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message as chat clients send it; fields beyond role and content are let through and not read."""

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
    """POST /v1/route: `prompt` or `messages`, and what restricts the choice."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str | None, Field(description="the text to route")] = None
    messages: Annotated[list[Message] | None, Field(description="a conversation, instead of `prompt`")] = None
    lam: Annotated[
        float | None,
        Field(
            alias="lambda",
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="0 most confident .. 1 cheapest; the checkpoint's own if not given",
        ),
    ] = None
    models: Annotated[list[str] | None, Field(min_length=1, description="the models to choose from")] = None
    max_cost_usd: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="most that the answer may cost by estimate, USD")
    ] = None

    @property
    def text(self) -> str:
        """The prompt meant. Raises InputError for both or neither of prompt and messages, and for empty text."""
        if (self.prompt is None) == (self.messages is None):
            raise InputError(
                f"prompt: got {'neither' if self.prompt is None else 'both'} of prompt and messages, "
                "give exactly one of them"
            )
        field, text = ("prompt", self.prompt) if self.messages is None else ("messages", as_prompt(self.messages))
        if not text or not text.strip():
            raise InputError(f"{field}: got no text, at least one character other than white space is needed")
        return text


class Reply(BaseModel):
    """Base of the replies."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, serialize_by_alias=True)


class CandidateReply(Reply):
    model: str
    confidence: Annotated[float, Field(description="probability of a correct answer")]
    uncertainty: Annotated[float, Field(description="standard deviation of the confidence over the ensemble")]
    cost_usd: Annotated[float, Field(description="estimated cost of this query, USD")]
    score: Annotated[float, Field(description="what the policy ranks by")]


class Timings(Reply):
    """Milliseconds as the gateway saw them: queueing, batching and transport included."""

    encode: float
    route: float
    total: float


class RouteReply(Reply):
    model: Annotated[str, Field(description="the chosen model")]
    lam: Annotated[float, Field(alias="lambda")]
    candidates: Annotated[list[CandidateReply], Field(description="by falling score")]
    encoder: Annotated[list[str], Field(description="fingerprints of the encoders that were read")]
    checkpoint: Annotated[str, Field(description="id of the checkpoint that decided")]
    timings_ms: Timings
    decision_id: str


class ModelReply(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int = 0  # the pool does not know when a model was made; OpenAI's clients want a number
    owned_by: str = "prefill-router"


class ModelsReply(Reply):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class Health(Reply):
    """`refused` tells of a checkpoint that was to go live and could not: the one before is still serving."""

    status: Literal["ok"] = "ok"
    checkpoint: str
    refused: str | None = None


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    error: ErrorDetail


def as_prompt(messages: Sequence[Message]) -> str:
    """The conversation as one text: the messages' texts joined by newlines, roles dropped.

    The last user message is moved to the end: prompts are cut on the left, and what is being asked must survive.
    """
    ordered = list(messages)
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is not None:
        ordered.append(ordered.pop(asked))
    return "\n".join(message.text for message in ordered if message.text)


def read_request(body: bytes) -> RouteRequest:
    """Parses a body. Raises pydantic's ValidationError; `invalid` turns that into the reply."""
    return RouteRequest.model_validate_json(body)


def invalid(error: ValidationError) -> ErrorDetail:
    """What is wrong with a body: field, value and what is allowed."""
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
    """The same for a well-formed request that cannot be served; our messages begin with the field's name."""
    field = str(error).partition(":")[0]
    known = {info.alias or name for name, info in RouteRequest.model_fields.items()}
    return ErrorDetail(
        message=str(error), type="invalid_request_error", param=field if field in known else None, code="invalid_value"
    )


def route_reply(decision: Decision, **rest: Any) -> RouteReply:
    """The reply to a decision; `rest` are the fields that the decision itself does not know."""
    candidates = [
        CandidateReply(
            model=c.model, confidence=c.confidence, uncertainty=c.uncertainty, cost_usd=c.cost_usd, score=c.score
        )
        for c in decision.candidates
    ]
    return RouteReply(model=decision.model, lam=decision.lam, candidates=candidates, **rest)
