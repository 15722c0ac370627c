"""OpenAI's Responses API: a request becomes a chat. `serve/response_events.py` makes the answer a response.

In: a body of POST /v1/responses. Out: the body of a chat. The server stores nothing, so that `input` is the whole
conversation. `router` in the body and the router's headers are those of a chat.
"""

from __future__ import annotations

import json
import re
from typing import Any

from prefill_router.errors import InputError
from serve.messages import read_object
from serve.schemas import ErrorDetail

WHOLE = "the server stores nothing; send the whole conversation in `input`"
REFUSED = {
    "previous_response_id": WHOLE,
    "conversation": WHOLE,
    "background": "the server stores nothing; wait for the answer, or set `stream`",
    "prompt": "the server has no templates; send the text in `instructions` and `input`",
    "top_logprobs": "responses have no log probabilities; leave it out",
}
REQUEST_NAMES = {  # of the fields of a chat
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
_CHAT_FIELD = re.compile(rf"(^|; )({'|'.join(REQUEST_NAMES)})(?=[.:]|$)")
TYPES = {"instructions": str, "tools": list, "text": dict, "reasoning": dict}
TRANSLATED = ("input", "instructions", "max_output_tokens", "reasoning", "text", "tool_choice", "tools")
NO_EFFECT = (
    *("client_metadata", "context_management", "include", "max_tool_calls", "metadata", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "store", "stream_options", "truncation"),
)
LEFT_OUT = ("web_search", "image_generation", "tool_search")  # tools that Codex sends on its own account
Functions = dict[str, tuple[str | None, dict[str, Any]]]


def chat_body(body: bytes) -> bytes:
    """The body of the chat. Raises InputError for an invalid request."""
    given = {name: value for name, value in read_object(body).items() if value is not None}
    for name, way_out in REFUSED.items():
        if value := given.pop(name, None):
            raise InputError(f"{name}: got {value!r:.80}, which is not supported: {way_out}")
    for name, request_name in REQUEST_NAMES.items():
        if name in given:
            raise InputError(f"{name}: got {given[name]!r:.80}, which is a field of a chat; send `{request_name}`")
    if given.get("n", 1) != 1:
        raise InputError(f"n: got {given['n']!r:.80}, but a response has one answer; leave it out")
    for name, kind in TYPES.items():
        if not isinstance(given.get(name, kind()), kind):
            raise InputError(f"{name}: got {given[name]!r:.80}, expected {kind.__name__}")
    functions, choice, text = functions_of(given.get("tools", ())), given.get("tool_choice"), given.get("text", {})
    if given.get("tools") and not functions:
        types = ", ".join(dict.fromkeys(tool["type"] for tool in given["tools"]))
        raise InputError(f"tools: got only {types}, and no function that a model can call; add a function")
    chat = {name: value for name, value in given.items() if name not in (*TRANSLATED, *NO_EFFECT)} | {
        "messages": _messages(given.get("instructions"), given.get("input")),
        "max_completion_tokens": given.get("max_output_tokens"),
        "reasoning_effort": given.get("reasoning", {}).get("effort"),
        "response_format": _response_format(text.get("format")),
        "verbosity": text.get("verbosity"),
        "tools": [_function(name, tool) for name, (_, tool) in functions.items()] or None,
        "tool_choice": _tool_choice(choice) if functions or choice not in ("auto", "none") else None,
        "parallel_tool_calls": given.get("parallel_tool_calls") if functions else None,
    }
    return json.dumps({name: value for name, value in chat.items() if value is not None}).encode()


def error_of(detail: ErrorDetail) -> ErrorDetail:
    """The error of a chat, its fields with their names in the request: in the message and in `param`."""

    def renamed(text: str) -> str:
        return _CHAT_FIELD.sub(lambda found: found[1] + REQUEST_NAMES[found[2]], text)

    param = None if detail.param is None else renamed(detail.param)
    return detail.model_copy(update={"message": renamed(detail.message), "param": param})


def functions_of(tools: Any, path: str = "tools") -> Functions:
    """The namespace and the definition of tools, by their names in the chat. Raises InputError for an unknown type."""
    found: Functions = {}
    for index, tool in enumerate(tools):
        match tool:
            case {"type": "function" | "custom", "name": str(name)}:
                found[name] = (None, tool)
            case {"type": "namespace", "name": str(namespace), "tools": list(own)}:
                for name, (_, one) in functions_of(own, f"{path}.{index}.tools").items():
                    found[_chat_name(namespace, name)] = (namespace, one)
            case {"type": kind} if kind in LEFT_OUT:
                pass
            case _:
                got = tool.get("type") if isinstance(tool, dict) else tool
                raise InputError(
                    f"{path}.{index}: got {got!r:.80}; tools that OpenAI's servers run do not exist here, allowed are "
                    "function and custom with a name, and namespace with name and tools"
                )
    return found


def _messages(instructions: str | None, items: Any) -> list[dict[str, Any]]:
    """The messages of the chat.

    Developers become the system, which every server knows. Neighbouring items of the system or of the assistant become
    one message, because many servers allow only one of the system, and want all calls of a turn in one.
    """
    if not isinstance(items, str | list):
        raise InputError(f"input: got {items!r:.80}, expected a string or a list of items")
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": _parts("instructions", instructions)})
    for index, item in enumerate([{"role": "user", "content": items}] if isinstance(items, str) else items):
        if (made := _message(f"input.{index}", item)) is None:
            continue
        if messages and made["role"] == messages[-1]["role"] and made["role"] in ("system", "assistant"):
            last = messages.pop()
            for name in {"content", "tool_calls"} & (last.keys() | made.keys()):
                made[name] = last.get(name, []) + made.get(name, [])
        messages.append(made)
    for message in messages:  # text as a string: not every server takes parts
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "\n".join(part["text"] for part in message["content"])
        if "tool_calls" in message:
            message["content"] = message["content"] or None
    return messages


def _message(path: str, item: Any) -> dict[str, Any] | None:
    """The message of an item, its content in parts; None for reasoning, which no field of a chat takes."""
    match item:
        case {"type": "reasoning"}:
            return None
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
            return _call(call_id, _chat_name(item.get("namespace"), name), arguments)
        case {"type": "custom_tool_call", "call_id": str(call_id), "name": str(name), "input": str(text)}:
            return _call(call_id, _chat_name(item.get("namespace"), name), json.dumps({"input": text}))
        case {
            "type": "function_call_output" | "custom_tool_call_output",
            "call_id": str(call_id),
            "output": str() | list() as output,
        }:
            return {"role": "tool", "tool_call_id": call_id, "content": _parts(f"{path}.output", output)}
        case {"role": "user" | "assistant" | "system" | "developer" as role, "content": str() | list() as content}:
            role = "system" if role == "developer" else role
            return {"role": role, "content": _parts(f"{path}.content", content)}
        case {"type": "item_reference"}:
            raise InputError(f"{path}: got an item_reference, but {WHOLE}")
    raise InputError(
        f"{path}: got {item!r:.200}; allowed are a message with role and content, a function_call with call_id, name "
        "and arguments, a custom_tool_call with call_id, name and input, a function_call_output or "
        "custom_tool_call_output with call_id and output, and reasoning"
    )


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": [], "tool_calls": [call]}


def _parts(path: str, content: str | list[Any]) -> list[dict[str, Any]]:
    """The parts of a message of the chat."""
    made: list[dict[str, Any]] = []
    for index, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                made.append({"type": "text", "text": text})
            case {"type": "refusal", "refusal": str(text)}:
                made.append({"type": "text", "text": text})
            case {"type": "input_image", "image_url": str(url)}:
                detail = {"detail": part["detail"]} if part.get("detail") else {}
                made.append({"type": "image_url", "image_url": {"url": url} | detail})
            case _:
                raise InputError(
                    f"{path}.{index}: got {part!r:.80}; allowed are input_text and output_text with text, refusal with "
                    "refusal, and input_image with image_url"
                )
    return made


def _chat_name(namespace: str | None, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _function(name: str, tool: dict[str, Any]) -> dict[str, Any]:
    """The definition of a tool in the chat. A custom tool becomes a function of one string."""
    made = {"name": name} | {key: tool[key] for key in ("description", "parameters", "strict") if tool.get(key)}
    if tool["type"] == "custom":
        made["parameters"] = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        match tool.get("format"):
            case {"definition": str(grammar)}:
                made["description"] = f"{tool.get('description') or ''}\nThe input has this grammar:\n{grammar}".strip()
    return {"type": "function", "function": made}


def _tool_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function" | "custom", "name": str(name)}:
            return {"type": "function", "function": {"name": _chat_name(choice.get("namespace"), name)}}
        case dict():
            raise InputError(
                f"tool_choice: got {choice!r:.80}; allowed are auto, none, required, and an object with the type "
                "function or custom and a name"
            )
    return choice  # the chat checks it


def _response_format(given: Any) -> Any:
    match given:
        case {"type": "text"}:
            return None
        case {"type": "json_schema"}:
            return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}
    return given  # the chat checks it
