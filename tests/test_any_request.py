"""Any request gets a decision or an error in OpenAI's format with a 4xx status: mutated bodies of POST /v1/route.

Without Ray: the same functions as in the gateway, from the bytes of a body to the bytes of the reply. The number of
examples is set as in test_any_input.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_any_input import DOCUMENTS, any_input, mutated
from tiny_router import tiny_router

from prefill_router.controller import LocalRouter, encode_prompts
from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder
from serve.requests import RouteRequest, read_request
from serve.schemas import ErrorReply, RouteReply, Timings, invalid, rejected, route_reply

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
BODIES: list[dict[str, Any]] = [
    {"prompt": "Why is the sky blue?", "lambda": 0.3, "models": ["cheap", "dear"], "max_cost_usd": 0.1},
    {"prompt": "What is 2 + 2?", "require": ["tools"], "max_tokens": 100},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "What is this?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {}}],
            },
        ],
        "tools": [TOOL],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    },
    {"messages": [{"role": "user", "content": "hi"}], "tool_choice": "required", "max_completion_tokens": 5},
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """The bytes of a body: a valid one after mutations of its values, and sometimes of its bytes."""
    value = draw(st.one_of(st.builds(lambda valid: mutated(draw, valid), st.sampled_from(BODIES)), DOCUMENTS))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))  # NaN and Infinity as Python writes them
    body = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 5)):
        return body
    at = draw(st.integers(0, len(body)))
    return (
        body[:at]
        + draw(st.sampled_from([b"", b"\xff", b"\x00", b"{", b"1e999", b'\\ud800"', b"\xef\xbb\xbf"]))
        + (body[at:] if draw(st.booleans()) else b"")
    )


@pytest.fixture(scope="module")
def encoder(minilm: str) -> PrefillEncoder:
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    return TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))


@pytest.fixture(scope="module")
def router(encoder: PrefillEncoder) -> LocalRouter:
    """Over three models with different context windows and capabilities."""
    made = tiny_router(encoder.info.fingerprint)
    models = [model.model_dump(exclude_unset=True) for model in made.pool.models]
    models[0]["context_tokens"], models[1]["capabilities"] = 200, ["tools", "json", "vision"]
    object.__setattr__(made, "pool", Pool.model_validate({"models": models}))
    return LocalRouter(made)


def reply_to(body: bytes, encoder: PrefillEncoder, router: LocalRouter) -> RouteReply | ErrorReply:
    """The reply of the gateway. InputError and ValidationError are a 400; any other exception would be a 500."""
    request: RouteRequest | None = None
    try:
        request = read_request(body)
        text, requirements = request.text, request.requirements
        rows = {encoder.info.fingerprint: encode_prompts(encoder, [text])}
        decision = router.decide(rows, request.lam, requirements)[0]
    except ValidationError as error:
        return ErrorReply(error=invalid(error))
    except InputError as error:
        return ErrorReply(error=rejected(error, request))
    timings = Timings(encode=1.0, route=1.0, total=2.0)
    return route_reply(decision, encoder=["e"], checkpoint="c", timings_ms=timings, decision_id="d")


def test_the_bodies_that_are_mutated_are_valid(encoder: PrefillEncoder, router: LocalRouter):
    for body in BODIES:
        assert isinstance(reply_to(json.dumps(body).encode(), encoder, router), RouteReply)


@any_input
@given(body=bodies())
def test_any_body_gets_a_decision_or_an_error_of_one_line(body: bytes, encoder: PrefillEncoder, router: LocalRouter):
    reply = reply_to(body, encoder, router)
    content = json.loads(reply.model_dump_json())
    if isinstance(reply, ErrorReply):
        assert "\n" not in content["error"]["message"]
        assert content["error"]["type"] == "invalid_request_error"
        assert len(content["error"]["message"]) < 2_000
        return
    names = {one["model"] for one in content["candidates"]} | {one["model"] for one in content["excluded"]}
    assert names == set(router.models)
    assert content["model"] == content["candidates"][0]["model"]
