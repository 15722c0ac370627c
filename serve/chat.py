"""The request of POST /v1/chat/completions: who is asked, the router's options, and the body for an upstream server.

In: the bytes of a body and the request's headers. Out: a `ChatRequest`, the `RouteRequest` that decides, and bodies
that differ from the received one only in `model`, `router` and `stream_options`. Knows nothing of Ray and of decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prefill_router.errors import InputError
from serve.bodies import REMOVED, edited
from serve.requests import MaxCost, ModelNames, RouteRequest

AUTO = "auto"  # the model name for the router's choice
# Fields of OpenAI's chat completions on which the decision depends.
SHARED = (
    "messages",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
    "max_tokens",
    "max_completion_tokens",
)
HEADERS = {
    "x-router-lambda": "lambda",
    "x-router-models": "models",
    "x-router-session-id": "session_id",
    "x-router-debug": "explain",
    "x-router-off": "off",
}
# Of other clients (the last two: Codex); read if the router's own is missing.
SESSION_HEADERS = ("x-litellm-session-id", "x-session-id", "session-id", "session_id")

Lambda = Annotated[
    float,
    Field(ge=0, le=1, allow_inf_nan=False, description="0 (most confident) to 1 (cheapest)"),
]


class RouterOptions(BaseModel):
    """The field `router` of a request; headers set the same options."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_by_name=True)

    lam: Annotated[Lambda | None, Field(alias="lambda", description="default: the checkpoint's value")] = None
    models: ModelNames = None
    max_cost_usd: MaxCost = None
    min_confidence: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="minimum confidence of the candidates")
    ] = None
    session_id: Annotated[
        str | None,
        Field(min_length=1, max_length=200, description="id of the conversation; default: its opening messages"),
    ] = None
    fallbacks: Annotated[
        int | None, Field(ge=0, description="maximum number of further models if one does not answer")
    ] = None
    explain: Annotated[bool, Field(description="add all candidates and excluded models to the reply")] = False
    off: Annotated[bool, Field(description="ask the gateway's default model without a decision")] = False


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Fields that are not listed here pass to the upstream server unread."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, description="auto, auto:LAMBDA or a model of the pool")]
    messages: Annotated[list[Any], Field(min_length=1, description="the conversation")]
    stream: Annotated[bool | None, Field(description="answer as server-sent events")] = None
    stream_options: StreamOptions | None = None
    router: Annotated[RouterOptions | None, Field(description="options of the router")] = None

    @property
    def wants_usage(self) -> bool:
        """Whether the client asks for a chunk with the usage at the end of a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def asked(self) -> str | None:
        """The model of the pool that is asked for; None for the router's choice."""
        return None if self.model == AUTO or self.model.startswith(f"{AUTO}:") else self.model

    def options(self, headers: Mapping[str, str]) -> RouterOptions:
        """The options of `model`, `router` and the headers.

        Raises InputError for an unknown header or value, and for options that contradict each other.
        """
        options = self.router or RouterOptions()
        found = [("router", options.model_dump(exclude_unset=True, by_alias=True)), ("headers", _of_headers(headers))]
        if self.asked is None and self.model != AUTO:
            found.append(("model", {"lambda": _lambda("model", self.model.removeprefix(f"{AUTO}:"))}))
        merged: dict[str, Any] = {}
        for source, given in found:
            for name, value in given.items():
                if name in merged and merged[name] != value:
                    raise InputError(
                        f"{source}: got {name} {value!r}, but another part of the request has {merged[name]!r}; give "
                        "one of them"
                    )
                merged[name] = value
        for name in SESSION_HEADERS:
            if (value := headers.get(name)) and "session_id" not in merged:
                merged["session_id"] = value[:200]
        options = RouterOptions.model_validate(merged)
        used = sorted(name for name, value in merged.items() if value not in (None, False) and name != "session_id")
        if used and self.asked is not None:
            raise InputError(
                f"{used[0]}: got an option of the decision with model {self.asked!r:.80}; ask for the model {AUTO}, "
                "or leave the option out"
            )
        if options.off and used != ["off"]:
            raise InputError(f"off: got it with {', '.join(name for name in used if name != 'off')}; leave one out")
        return options

    def query(self, options: RouterOptions, candidates: list[str]) -> RouteRequest:
        """The request of the decision between `candidates`. Raises ValidationError for an invalid field."""
        given = {"messages": self.messages} | {
            name: value for name, value in (self.model_extra or {}).items() if name in SHARED and value is not None
        }
        return RouteRequest.model_validate(
            given | {"lambda": options.lam, "models": candidates, "max_cost_usd": options.max_cost_usd}
        )


def read_chat(body: bytes) -> ChatRequest:
    """Parses a request body. Raises pydantic's ValidationError, which `schemas.rejected_chat` converts."""
    return ChatRequest.model_validate_json(body)


def upstream_body(text: str, model: str, request: ChatRequest, effort: str | None = None) -> bytes:
    """The received body with the server's model name, without `router`; a stream reports its usage.

    `effort` is the reasoning effort of a request that gives none.
    """
    changes: dict[str, Any] = {"model": model, "router": REMOVED}
    if effort is not None and (request.model_extra or {}).get("reasoning_effort") is None:
        changes["reasoning_effort"] = effort
    if request.stream and not request.wants_usage:
        kept = {} if request.stream_options is None else request.stream_options.model_dump(exclude_unset=True)
        changes["stream_options"] = kept | {"include_usage": True}
    return edited(text, changes).encode()


def _of_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    """Options by name. Raises InputError for an unknown header that begins with x-router-, and for an unknown value."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        name = name.lower()
        if not name.startswith("x-router-"):
            continue
        option, given = HEADERS.get(name), _of_header(name, value)
        if option is None:
            raise InputError(f"headers: {name:.80} is unknown; known are {', '.join(HEADERS)}")
        if found.setdefault(option, given) != given:
            raise InputError(f"{name}: got {value!r:.80} and another value; give one of them")
    return found


def _of_header(name: str, value: str) -> Any:
    if name == "x-router-lambda":
        return _lambda(name, value)
    if name == "x-router-session-id":
        if not 1 <= len(value) <= 200:
            raise InputError(f"{name}: got {len(value)} characters, allowed are 1 to 200")
        return value
    if name == "x-router-models":
        return [one.strip() for one in value.split(",") if one.strip()]
    if value not in ("0", "1") and name in HEADERS:
        raise InputError(f"{name}: got {value!r:.80}, allowed are 0 and 1")
    return value == "1"


def _lambda(field: str, text: str) -> float:
    try:
        return TypeAdapter(Lambda).validate_python(text)
    except ValidationError:
        raise InputError(
            f"{field}: got {text!r:.80}, allowed is a lambda from 0 (most confident) to 1 (cheapest), such as 0.3"
        ) from None
