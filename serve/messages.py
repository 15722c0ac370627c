"""Anthropic's Messages API by translation: a request becomes a chat, and the answer of the chat becomes a message.

In: a body of POST /v1/messages, and the reply of the chat. Out: the body of a chat, and a message, its stream of
events, or an error in Anthropic's format. The translation is that of any-llm-sdk, the extra `providers`; without it
every request is refused. `router` in the body and the router's headers are those of a chat.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import ValidationError

from prefill_router.errors import InputError
from serve.answers import token_counts
from serve.events import DONE, EventSplitter, closable, data_of
from serve.schemas import invalid

try:
    from any_llm.exceptions import AnyLLMError
    from any_llm.types.completion import ChatCompletion, ChatCompletionChunk
    from any_llm.types.messages import MessagesParams
    from any_llm.utils.messages_compat import (
        StreamingState,
        chat_completion_chunk_to_message_stream_events,
        chat_completion_to_message_response,
        close_open_blocks,
        messages_params_to_completion_params,
        split_cached_input_tokens,
    )

    INSTALLED = True
except ImportError:
    INSTALLED = False

INSTALL = "pip install 'prefill-router[providers]'"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BYTES_PER_TOKEN = 4  # of a request, for the estimate of its tokens
DATA_URL = re.compile(r'"data:[^"]*(?=")')
UNREADABLE = (ValueError, AttributeError, TypeError, LookupError, RecursionError)  # an answer that is none
logger = logging.getLogger("ray.serve")
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def chat_body(body: bytes) -> bytes:
    """The body of the chat. Raises InputError for an invalid request, or if any-llm-sdk is not installed."""
    given = _request(body)
    router = given.pop("router", None)
    params = _completion_params(given)
    params["model"] = params.pop("model_id")
    if router is not None:
        params["router"] = router
    return json.dumps(params).encode()


def estimated_tokens(body: bytes) -> int:
    """The estimated input tokens of a request: a token per BYTES_PER_TOKEN bytes of its chat, files aside.

    Raises InputError as `chat_body`.
    """
    given = _request(body)
    given.pop("router", None)
    params = _completion_params(given | {"max_tokens": given.get("max_tokens", 1)})
    read = {name: params[name] for name in ("messages", "tools", "response_format") if name in params}
    text = DATA_URL.sub('"', json.dumps(read, ensure_ascii=False))
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def message_of(body: bytes) -> bytes:
    """The message of a complete answer, with its `router`. Raises InputError if it is no chat completion."""
    try:
        given = json.loads(body)
        router = given.get("router")
        completed = ChatCompletion.model_validate(_completed(given, "message"))
        answer = chat_completion_to_message_response(completed)
    except UNREADABLE as error:
        raise InputError(f"the answer is no chat completion ({' '.join(str(error).split())[:300]})") from None
    message = answer.model_dump(mode="json")
    return json.dumps(message if router is None else message | {"router": router}).encode()


async def events_of(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The events of a message from those of a streamed chat, which are read to their end.

    A broken answer, and a chunk that cannot be translated, end the message with an error event. Closes `chunks`.
    """
    state, split, router, ended = StreamingState(), EventSplitter(), None, False
    async with aclosing(closable(chunks)) as received:
        async for part in received:
            for event in split(part):
                data = data_of(event)
                if data is None:
                    yield PING
                    continue
                if ended:  # read to the end: the chat notes how its answer ended
                    continue
                if data == DONE:
                    ended = True
                    for closing in close_open_blocks(state):
                        yield _event(closing.model_dump(mode="json"))
                    for last in _last_events(state, router):
                        yield _event(last)
                    continue
                try:
                    chunk = json.loads(data)
                    router = chunk.pop("router", router)
                    if chunk.get("error") is not None:
                        ended = True
                        yield _event(error_of(502, error_message(data)))
                        continue
                    translated = chat_completion_chunk_to_message_stream_events(
                        ChatCompletionChunk.model_validate(_completed(chunk, "delta")), state
                    )
                except UNREADABLE as error:
                    reason = " ".join(str(error).split())[:300]
                    logger.error("a chunk of an answer cannot be translated to a message: %s", reason)
                    yield _event(error_of(502, f"a chunk of the answer is no chat completion ({reason})"))
                    return
                for one in translated:
                    yield _event(one.model_dump(mode="json"))


def error_of(status: int, message: str) -> dict[str, Any]:
    """The body of an error in Anthropic's format."""
    return {"type": "error", "error": {"type": ERROR_TYPES.get(status, "api_error"), "message": message}}


def error_message(body: bytes) -> str:
    """The message of an error in OpenAI's format; the beginning of another body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:300].decode("utf-8", "replace")


def read_object(body: bytes) -> dict[str, Any]:
    """The fields of a body. Raises InputError if it is no JSON object."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: no JSON ({error}); expected an object") from None
    if not isinstance(given, dict):
        raise InputError(f"body: got {type(given).__name__}, expected a JSON object")
    return given


def _request(body: bytes) -> dict[str, Any]:
    given = read_object(body)
    if (output := given.pop("output_config", None)) is not None:
        if not isinstance(output, dict):
            raise InputError(f"output_config: got {type(output).__name__}, expected a JSON object")
        given["output_format"] = output  # the name of any-llm-sdk
    return given


def _completion_params(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the chat. Raises InputError for an invalid request, or if any-llm-sdk is not installed."""
    if not INSTALLED:
        raise InputError(f"model: the Messages API needs any-llm-sdk on the server; {INSTALL}")
    try:
        return messages_params_to_completion_params(MessagesParams.model_validate(given))
    except ValidationError as error:
        raise InputError(invalid(error, tuple(MessagesParams.model_fields)).message) from None
    except (AnyLLMError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"messages: cannot be translated ({' '.join(str(error).split())[:300]})") from None


def _completed(answer: dict[str, Any], part: Literal["message", "delta"]) -> dict[str, Any]:
    """An answer or chunk with the fields that any-llm-sdk requires and some servers leave out."""
    if token_counts(answer.get("usage")) is None:
        answer.pop("usage", None)
    answer |= {name: answer.get(name) or value for name, value in (("id", "chatcmpl"), ("created", 0))}
    for position, choice in enumerate(answer.get("choices") or ()):
        choice.setdefault("index", position)
        message = choice.get(part)
        if not isinstance(message, dict):
            continue
        if "role" in message:
            message["role"] = message["role"] or "assistant"
        if isinstance(content := message.get("content"), list):
            message["content"] = "".join(str(one.get("text") or "") for one in content if isinstance(one, dict))
        for index, call in enumerate(message.get("tool_calls") or ()):
            if part == "delta":
                call.setdefault("index", index)
        reasoning = message.pop("reasoning", None) or message.pop("reasoning_content", None)
        if reasoning:
            message["reasoning"] = {"content": reasoning} if isinstance(reasoning, str) else reasoning
    return answer


def _last_events(state: StreamingState, router: Any) -> list[dict[str, Any]]:
    if not state.started:
        return [error_of(502, "the answer has no chunk")]
    read, cached = split_cached_input_tokens(
        state.input_tokens, state.cache_read_input_tokens, state.cache_creation_input_tokens
    )
    usage = {"input_tokens": read, "output_tokens": state.output_tokens, "cache_read_input_tokens": cached}
    delta = {"stop_reason": state.stop_reason or "end_turn", "stop_sequence": None}
    last: dict[str, Any] = {"type": "message_delta", "delta": delta, "usage": usage}
    return [last if router is None else last | {"router": router}, {"type": "message_stop"}]


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
