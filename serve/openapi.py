"""The OpenAPI document: bodies that handlers read as bytes, streams, and errors.

In: the models of bodies. Out: `openapi_extra` of a route, and an application whose document has the models that the
bodies refer to. Knows nothing of requests.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve.schemas import ErrorReply, MessagesErrorReply

REFERENCE = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is at fault"},
    "5XX": {"model": ErrorReply, "description": "The server is at fault; a later request may succeed"},
}
MESSAGES_ERRORS: dict[int | str, dict[str, Any]] = {
    status: reply | {"model": MessagesErrorReply} for status, reply in ERRORS.items()
}
STREAM: dict[str, Any] = {"text/event-stream": {}}
STRING = {"type": "string", "minLength": 1}
TURNS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": STRING},
    },
}
FIELDS = {
    "model": {"type": "string", "minLength": 1, "description": "auto, auto:LAMBDA or a model of the pool"},
    "messages": TURNS,
    "input": {"anyOf": [STRING, TURNS]},
    "max_tokens": {"type": "integer", "minimum": 1},
    "stream": {"type": "boolean"},
    "router": {"$ref": REFERENCE.format(model="RouterOptions")},
}


class Api(FastAPI):
    """A FastAPI application whose OpenAPI document has the schemas of `bodies` and of the models in them."""

    def __init__(self, bodies: tuple[type[BaseModel], ...], **options: Any) -> None:
        super().__init__(**options)
        self.bodies = bodies

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            schemas = super().openapi()["components"]["schemas"]
            for body in self.bodies:
                own = body.model_json_schema(ref_template=REFERENCE)
                schemas |= own.pop("$defs", {}) | {body.__name__: own}
        assert self.openapi_schema is not None
        return self.openapi_schema


def body_of(model: type[BaseModel], example: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a `model`; `streams`: the answer may be server-sent events."""
    return _extra({"$ref": REFERENCE.format(model=model.__name__)}, example, streams)


def object_with(required: dict[str, Any], *, streams: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route of another API: an object with these fields, of which `required` is an example."""
    fields = {name: FIELDS[name] for name in (*required, "stream", "router")}
    return _extra({"type": "object", "required": list(required), "properties": fields}, required, streams)


def _extra(schema: dict[str, Any], example: dict[str, Any], streams: bool) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}
    return {"requestBody": body} | ({"responses": {"200": {"content": STREAM}}} if streams else {})
