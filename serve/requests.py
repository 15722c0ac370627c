"""The body of POST /v1/route: a prompt or a conversation, the features that it uses, and restrictions of the choice.

In: the bytes of a request body. Out: the text to route and the `Requirements` of the candidates. The field names are
those of OpenAI's chat completions. Knows nothing of Ray, HTTP and the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import to_json

from prefill_router.errors import InputError
from prefill_router.pool import Capability
from prefill_router.routing.eligibility import Requirements

TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image_url", "input_image", "image")
BYTES_PER_TOKEN = 4  # of JSON and of text, for input tokens that no encoder counts
MIN_CONTEXT = 400  # characters of earlier turns that are routed in any case
INSTRUCTIONS = ("system", "developer")  # roles whose texts are not routed
RESULTS = ("tool", "function")  # roles of results of tools
HARNESS_TAGS = ("system-reminder", "environment_context", "user_instructions")  # of Claude Code, Codex
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def _kind(value: Any) -> str | None:
    """The branch of a union. Errors name only this branch; `field_path` leaves it out of the path."""
    kinds: dict[type, str] = {str: "(string)", list: "(list)", dict: "(object)"}
    return kinds.get(type(value))


def _either(allowed: str) -> Discriminator:
    message = f"Input should be {allowed}"
    return Discriminator(_kind, custom_error_type="type", custom_error_message=message)


def field_path(location: Sequence[str | int]) -> str:
    """The path of a field in the request, such as `messages.0.content`: 80 printable characters of each name."""
    steps = ["".join(c if c.isprintable() else "?" for c in str(step)[:80]) for step in location]
    return ".".join(step for place, step in enumerate(steps) if not (place and step.startswith("(")))


# `fail_fast`: a body with a hundred thousand wrong elements is refused at the first one.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
MaxTokens = Annotated[
    int | None, Field(ge=1, le=2**31 - 1, description="maximum number of tokens of the answer; default: an estimate")
]
ModelNames = Annotated[
    Annotated[list[str], Field(min_length=1, fail_fast=True)] | None,
    Field(description="candidate models; default: all models of the pool"),
]
MaxCost = Annotated[
    float | None, Field(ge=0, allow_inf_nan=False, description="maximum estimated cost of the answer, USD")
]


class Part(BaseModel):
    """A part of a message: text or an image. Raises ValueError for a part of another type, unless it has text."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.type in TEXT_TYPES and self.text is None:
            raise ValueError(f"a part of type {self.type!r} needs a string in `text`")
        if self.type == "refusal" and self.refusal is None:
            raise ValueError("a part of type 'refusal' needs a string in `refusal`")
        if self.type not in (*TEXT_TYPES, *IMAGE_TYPES, "refusal") and not self.text:
            allowed = ", ".join((*TEXT_TYPES, "refusal", *IMAGE_TYPES))
            raise ValueError(f"got a part of type {self.type[:80]!r} without text, allowed types are {allowed}")
        return self

    @property
    def words(self) -> str:
        """The text of the part; empty for an image."""
        return "\n".join(text for text in (self.text, self.refusal) if text)


class Message(BaseModel):
    """A message in the format of chat clients. Other fields, such as `name`, are accepted and not read."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag("(string)")] | Annotated[list[Part], Field(fail_fast=True), Tag("(list)")],
            _either("a string, a list of parts or null"),
        ]
        | None
    ) = None
    refusal: str | None = None
    tool_calls: Objects | None = None
    function_call: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The text of the content, parts joined by newlines, and the refusal of an assistant."""
        content = self.content or ""
        texts = [content] if isinstance(content, str) else [part.words for part in content]
        return "\n".join(text for text in (*texts, self.refusal) if text)

    @property
    def has_image(self) -> bool:
        """Whether a part of the content is an image."""
        return isinstance(self.content, list) and any(part.type in IMAGE_TYPES for part in self.content)


class ResponseFormat(BaseModel):
    """Format of the answer: text, any JSON object, or JSON with a schema."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]


class RouteRequest(BaseModel):
    """Body of POST /v1/route: `prompt` or `messages`, features that the answer uses, and restrictions of the choice."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str | None, Field(description="text of the query")] = None
    messages: Annotated[
        Annotated[list[Message], Field(fail_fast=True)] | None,
        Field(description="conversation, instead of `prompt`; image parts require vision"),
    ] = None
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
    models: ModelNames = None
    max_cost_usd: MaxCost = None
    require: Annotated[
        Annotated[list[Capability], Field(fail_fast=True)] | None,
        Field(description="capabilities that the model must declare, in addition to those that other fields require"),
    ] = None
    tools: Annotated[Objects | None, Field(description="tool definitions; they require tools")] = None
    functions: Annotated[Objects | None, Field(description="earlier name of `tools`")] = None
    tool_choice: Annotated[
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("(string)")]
            | Annotated[dict[str, Any], Tag("(object)")],
            _either("'none', 'auto', 'required' or an object"),
        ]
        | None,
        Field(description="`required` or an object requires tools"),
    ] = None
    function_call: Annotated[
        Annotated[
            Annotated[Literal["none", "auto"], Tag("(string)")] | Annotated[dict[str, Any], Tag("(object)")],
            _either("'none', 'auto' or an object"),
        ]
        | None,
        Field(description="earlier name of `tool_choice`"),
    ] = None
    response_format: Annotated[ResponseFormat | None, Field(description="json_object and json_schema require json")] = (
        None
    )
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    max_output_tokens: MaxTokens = None

    @property
    def text(self) -> str:
        """The text to route. Raises InputError unless exactly one of prompt and messages is given, and has text."""
        if (self.prompt is None) == (self.messages is None):
            raise InputError(
                f"prompt: got {'neither' if self.prompt is None else 'both'} of prompt and messages, give exactly one"
            )
        if self.messages is None:
            field, text = "prompt", self.prompt or ""
        else:
            field, text = "messages", as_prompt(self.messages)
            users = [message for message in self.messages if message.role == "user"]
            if users and not any(message.text.strip() for message in users):
                raise InputError("messages: got no text in any user message; give one of them a text part")
        if not text.strip():
            raise InputError(f"{field}: got no text; give at least one character that is not white space")
        return text

    @property
    def requirements(self) -> Requirements:
        """The requirements of the candidates. Raises InputError if two limits of the answer differ."""
        limits = {name: getattr(self, name) for name in MAX_TOKENS_FIELDS if getattr(self, name) is not None}
        if len(set(limits.values())) > 1:
            got = ", ".join(f"{name} {value}" for name, value in limits.items())
            raise InputError(f"{next(iter(limits))}: got different limits of the answer ({got}); give one of them")
        return Requirements(
            models=None if self.models is None else tuple(self.models),
            capabilities=frozenset(capability for found in self._capabilities().values() for capability in found),
            max_cost_usd=self.max_cost_usd,
            max_output_tokens=next(iter(limits.values()), None),
            added_tokens=self._added_tokens(),
        )

    @property
    def earlier_tokens(self) -> int:
        """Estimated tokens before the question, the last user message: a server that answered before may cache them."""
        messages = self.messages or []
        asked = [index for index, message in enumerate(messages) if message.role == "user" and message.text.strip()]
        earlier = messages[: asked[-1]] if asked else []
        n_bytes = sum(_bytes(message.text) + _json_bytes(message.tool_calls) for message in earlier)
        return (n_bytes + (_json_bytes(self.tools) if earlier else 0)) // BYTES_PER_TOKEN

    def sent_as(self, field: str) -> tuple[str, ...]:
        """The fields of this request that set `field` of `Requirements`; () if it has no such field."""
        if field == "prompt":
            return ("messages",) if self.prompt is None and self.messages is not None else ("prompt",)
        return tuple(self._capabilities()) if field == "require" else ()

    def _capabilities(self) -> dict[str, list[Capability]]:
        """The required capabilities by the field that requires them."""
        found: dict[str, list[Capability]] = {
            "require": list(self.require or ()),
            "tools": ["tools"] if self.tools else [],
            "functions": ["tools"] if self.functions else [],
            "tool_choice": ["tools"] if self.tool_choice not in (None, "none", "auto") else [],
            "function_call": ["tools"] if self.function_call not in (None, "none", "auto") else [],
            "response_format": ["json"] if self.response_format and self.response_format.type != "text" else [],
            "messages": ["vision"] if any(message.has_image for message in self.messages or ()) else [],
        }
        return {field: capabilities for field, capabilities in found.items() if capabilities}

    def _added_tokens(self) -> int:
        """Estimated tokens that the model reads and the encoder does not: tool definitions, and text that is cut."""
        values: list[Any] = [self.tools, self.functions]
        if self.response_format and self.response_format.type != "text":
            values.append(self.response_format)
        for message in self.messages or ():
            values += [message.tool_calls, message.function_call]
        n_bytes = sum(map(_json_bytes, values))
        if self.messages is not None:
            n_bytes += sum(_bytes(message.text) for message in self.messages) - _bytes(as_prompt(self.messages))
        return -(-n_bytes // BYTES_PER_TOKEN)


def as_prompt(messages: Sequence[Message]) -> str:
    """The conversation as one text: the texts of the messages joined by newlines, without roles.

    The last user message with text is the question. It is complete and moved to the end: long prompts are truncated on
    the left. System and developer messages, and the blocks of HARNESS_TAGS in other messages, are left out: they are
    the same for all questions of an application. The other messages together have at most as many characters as the
    question, and at least MIN_CONTEXT: the latest turns of user and assistant first, then results of tools. The end of
    a turn and the beginning of a result remain. Without a question all texts are complete.
    """
    spoken = [message for message in messages if message.role not in INSTRUCTIONS]
    texts = [_without_blocks(message.text) for message in spoken]
    asked = [i for i, message in enumerate(spoken) if message.role == "user" and texts[i].strip()]
    if not asked:
        users = any(message.role == "user" and message.text.strip() for message in messages)
        return "\n".join(message.text for message in (spoken if users else messages) if message.text)
    question = texts.pop(asked[-1])
    del spoken[asked[-1]]
    left = max(MIN_CONTEXT, len(question))
    for i in sorted(range(len(spoken)), key=lambda i: (spoken[i].role in RESULTS, -i)):
        texts[i] = texts[i][:left] if spoken[i].role in RESULTS else texts[i][max(0, len(texts[i]) - left) :]
        left -= len(texts[i])
    return "\n".join(text for text in (*texts, question) if text)


def _without_blocks(text: str) -> str:
    """The text without the blocks `<TAG>...</TAG>` of HARNESS_TAGS. Takes time in proportion to its length."""
    whole = text
    for tag in HARNESS_TAGS:
        *blocks, rest = text.split(f"</{tag}>")
        if blocks:
            cut = [(block, *block.rpartition(f"<{tag}>")) for block in blocks]
            text = "".join(before if opening else f"{block}</{tag}>" for block, before, opening, _ in cut) + rest
    return text if text == whole else text.strip()


def _bytes(text: str) -> int:
    return len(text.replace("\n", "").encode("utf-8", "surrogatepass"))


def _json_bytes(value: Any) -> int:
    return len(to_json(value)) if value else 0


def read_request(body: bytes) -> RouteRequest:
    """Parses a request body. Raises pydantic's ValidationError, which `schemas.invalid` converts to an error reply.

    `RouteRequest.text` and `RouteRequest.requirements` raise InputError, which `schemas.rejected` converts. If a field
    occurs twice, the last value counts, as in other JSON parsers.
    """
    return RouteRequest.model_validate_json(body)
