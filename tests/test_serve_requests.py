"""Requests: the text that is read from a body, what it requires of a model, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from prefill_router.errors import InputError
from serve.requests import Message, RouteRequest, as_prompt, read_request
from serve.schemas import ErrorDetail, invalid, rejected

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def read(**body: Any) -> RouteRequest:
    return read_request(json.dumps(body).encode())


def said(*parts: Any, **message: Any) -> list[dict[str, Any]]:
    """A conversation of a system prompt and a user message with these parts."""
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": list(parts), **message}]


def refused(**body: Any) -> ErrorDetail:
    """The error of a body that is refused."""
    request = None
    try:
        request = read(**body)
        accepted = (request.text, request.requirements)
    except ValidationError as error:
        return invalid(error)
    except InputError as error:
        return rejected(error, request)
    raise AssertionError(f"accepted: {accepted}")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "Why?"},
        {"type": "input_text", "text": "Why?"},
        {"type": "output_text", "text": "Why?", "annotations": []},
        {"type": "something_new", "text": "Why?"},
        {"type": "refusal", "refusal": "Why?"},
    ],
)
def test_every_part_with_text_is_read(part: dict[str, Any]) -> None:
    assert read(messages=said(part)).text == "Why?"


@pytest.mark.parametrize(
    ("part", "param", "says"),
    [
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "", "got a part of type 'input_audio' without text"),
        (
            {"type": "file", "file": {"file_id": "f"}},
            "",
            "allowed types are text, input_text, output_text, refusal, im",
        ),
        ({"type": "something_new", "text": ""}, "", "got a part of type 'something_new' without text"),
        ({"type": "text"}, "", "needs a string in `text`"),
        ({"type": "text", "text": None}, "", "needs a string in `text`"),
        ({"type": "text", "text": {"value": "hi"}}, ".text", "should be a valid string"),
        ({"type": "refusal"}, "", "needs a string in `refusal`"),
        ({"text": "hi"}, ".type", "Field required"),
        ("hi", "", "should be an object (got 'hi')"),
        ([{"type": "text", "text": "hi"}], "", "should be an object"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_with_its_position(part: Any, param: str, says: str) -> None:
    error = refused(messages=said({"type": "text", "text": "Why?"}, part))
    assert error.param == f"messages.1.content.1{param}"
    assert error.message.startswith(f"{error.param}: ")
    assert says in error.message


@pytest.mark.parametrize("content", [7, True, {"type": "text", "text": "hi"}])
def test_content_is_a_string_or_a_list_of_parts(content: Any) -> None:
    error = refused(messages=[{"role": "user", "content": content}])
    assert error.param == "messages.0.content"
    assert "Input should be a string, a list of parts or null" in error.message


@pytest.mark.parametrize("content", ["", " \n", None, [], [IMAGE], [{"type": "text", "text": ""}]])
def test_a_system_prompt_is_not_routed_in_place_of_a_user_without_text(content: Any) -> None:
    error = refused(messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": content}])
    assert (error.param, error.code) == ("messages", "invalid_value")
    assert error.message.startswith("messages: got no text in any user message")


def test_a_last_user_message_without_text_leaves_the_question_before_it() -> None:
    messages = [*said({"type": "text", "text": "Who?"}), {"role": "assistant", "content": "Whom?"}]
    request = read(messages=[*messages, {"role": "user", "content": [IMAGE], "name": "bob"}])
    assert request.text == "Whom?\nWho?"
    assert request.requirements.capabilities == {"vision"}


def test_the_refusal_of_an_assistant_is_text() -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "No."}]
    assert read(messages=[*conversation, {"role": "user", "content": "b"}]).text == "a\nNo.\nb"


TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("body", "capabilities"),
    [
        ({}, set()),
        ({"require": ["json", "vision"]}, {"json", "vision"}),
        ({"require": []}, set()),
        ({"tools": [TOOL]}, {"tools"}),
        ({"tools": [], "tool_choice": "auto"}, set()),
        ({"tools": [TOOL], "tool_choice": "none"}, {"tools"}),
        ({"tool_choice": "required"}, {"tools"}),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, {"tools"}),
        ({"functions": [{"name": "weather"}], "function_call": "auto"}, {"tools"}),
        ({"function_call": {"name": "weather"}}, {"tools"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"response_format": {"type": "json_object"}}, {"json"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}, "tools": [TOOL]}, {"json", "tools"}),
    ],
)
def test_the_fields_of_a_request_require_capabilities(body: dict[str, Any], capabilities: set[str]) -> None:
    assert read(prompt="hi", **body).requirements.capabilities == capabilities


@pytest.mark.parametrize("part", [IMAGE, {"type": "input_image"}, {"type": "image", "source": {}}])
def test_an_image_in_any_message_requires_vision(part: dict[str, Any]) -> None:
    shown = [{"role": "tool", "content": [part]}, {"role": "user", "content": "What is it?"}]
    assert read(messages=shown).requirements.capabilities == {"vision"}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"require": ["sight"]}, "require.0", "'tools', 'vision' or 'json' (got 'sight')"),
        ({"require": "tools"}, "require", "valid array"),
        ({"tools": {"a": 1}}, "tools", "valid array"),
        ({"tools": ["weather"]}, "tools.0", "valid dictionary|object"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required' (got 'any')"),
        ({"tool_choice": 7}, "tool_choice", "'none', 'auto', 'required' or an object (got 7)"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": "json_object"}, "response_format", "object"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1 (got 0)"),
        ({"max_completion_tokens": 10**400}, "max_completion_tokens", "less than or equal to 2147483647"),
        ({"max_tokens": 5, "max_output_tokens": 6}, "max_tokens", "max_tokens 5, max_output_tokens 6"),
        ({"temperature": 1.0}, "temperature", "allowed fields: prompt, messages"),
    ],
)
def test_a_value_that_openai_would_not_send_is_refused(body: dict[str, Any], param: str, says: str) -> None:
    error = refused(prompt="hi", **body)
    assert error.param == param
    assert any(option in error.message for option in says.split("|"))


def test_every_name_of_the_limit_of_an_answer_is_read() -> None:
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        assert read(prompt="hi", **{name: 7}).requirements.max_output_tokens == 7
    assert read(prompt="hi", max_tokens=7, max_output_tokens=7).requirements.max_output_tokens == 7
    assert read(prompt="hi").requirements.max_output_tokens is None


def test_json_that_no_encoder_reads_counts_as_input_tokens() -> None:
    tool = {"n": "é"}  # {"n":"é"}: 10 bytes
    assert read(prompt="hi", tools=[tool]).requirements.added_tokens == 3  # 12 bytes
    assert read(prompt="hi", tools=[tool], functions=[tool]).requirements.added_tokens == 6
    assert read(prompt="hi", response_format={"type": "text"}).requirements.added_tokens == 0
    assert read(prompt="hi", response_format={"type": "json_object"}).requirements.added_tokens == 6  # 22 bytes
    called = [{"role": "assistant", "tool_calls": [tool]}, {"role": "user", "content": "hi"}]
    assert read(messages=called).requirements.added_tokens == 3
    schema = {"type": "json_schema", "json_schema": {"a" * 400: 1}}
    assert read(prompt="hi", response_format=schema).requirements.added_tokens > 100


def test_an_error_names_a_field_that_the_client_sent() -> None:
    nobody = InputError("require: no model is left for this query (a: does not declare tools); add one")
    for body, param in (
        ({"prompt": "hi", "require": ["tools"]}, "require"),
        ({"prompt": "hi", "tools": [TOOL]}, "tools"),
        ({"prompt": "hi", "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": said({"type": "text", "text": "What?"}, IMAGE)}, "messages"),
    ):
        error = rejected(nobody, read(**body))
        assert error.param == param
        assert error.message.startswith(f"{param}: no model is left")
    several = rejected(nobody, read(prompt="hi", tools=[TOOL], response_format={"type": "json_object"}))
    assert several.param is None
    assert several.message.startswith("tools, response_format: no model is left")
    too_long = InputError("prompt: no model is left for this query")
    assert rejected(too_long, read(messages=said({"type": "text", "text": "a"}))).param == "messages"
    assert rejected(too_long, read(prompt="a")).param == "prompt"


def test_the_name_of_an_unknown_field_is_shortened_to_one_printable_line() -> None:
    error = refused(**{"a\n\x1b[31m" + "b" * 100_000: 1})
    assert error.param == "a??[31m" + "b" * 73
    assert error.message.startswith(f"{error.param}: Extra inputs are not permitted")


def test_of_a_field_that_occurs_twice_the_last_value_counts() -> None:
    assert read_request(b'{"prompt": 7, "prompt": "b"}').text == "b"


def test_numbers_beyond_floating_point_do_not_stop_the_estimate_of_tokens() -> None:
    body = b'{"prompt": "hi", "tools": [{"a": 1e999, "b": NaN, "c": 1' + b"0" * 4_000 + b"}]}"
    assert read_request(body).requirements.added_tokens > 1_000


def turn(role: str, content: str) -> Message:
    return Message.model_validate({"role": role, "content": content})


def test_the_prompt_of_a_conversation_ends_with_the_question() -> None:
    messages = [turn("user", "Weather?"), Message(role="assistant", content=None), turn("tool", "rain")]
    assert as_prompt(messages) == "rain\nWeather?"
    assert as_prompt([turn("user", "a"), turn("assistant", "b"), turn("user", "c")]) == "a\nb\nc"


def test_instructions_are_not_routed_beside_a_question() -> None:
    for role in ("system", "developer"):
        assert as_prompt([turn(role, "Be short."), turn("user", "Weather?"), turn(role, "Be kind.")]) == "Weather?"
        assert as_prompt([turn(role, "Be short."), turn("tool", "rain")]) == "Be short.\nrain"  # there is no question


def test_blocks_of_agents_are_not_routed() -> None:
    reminder = "<system-reminder>\nUse tools.\n</system-reminder>"
    assert as_prompt([turn("user", f"{reminder}\nWhy? {reminder} How?\n{reminder}")]) == "Why?  How?"
    environment = turn("user", "<environment_context><cwd>/src</cwd></environment_context>")
    assert as_prompt([environment, turn("user", "Fix it.")]) == "Fix it."
    assert as_prompt([turn("user", "Fix it."), environment]) == "Fix it."
    assert as_prompt([turn("system", "Be short."), environment]) == environment.content  # the user has no other text
    assert as_prompt([turn("user", "Is <system-reminder> a tag?<system-reminder>x</system-reminder>")]) == (
        "Is <system-reminder> a tag?"
    )
    assert as_prompt([turn("user", " What is <system-reminder>? ")]) == " What is <system-reminder>? "
    assert as_prompt([turn("user", "a </system-reminder> b <system-reminder> c")]) == (
        "a </system-reminder> b <system-reminder> c"
    )


def test_many_open_blocks_take_no_long_time() -> None:
    text = "<system-reminder>" * 60_000  # a search from each of them to the end would take minutes
    assert as_prompt([turn("user", text)]) == text


def test_the_question_is_complete_and_the_rest_is_no_longer_than_it() -> None:
    turns = [turn("user", f"{n}" * 300) for n in (1, 2)]
    tool, why = turn("tool", "t" * 5000), turn("user", "Why?")
    assert as_prompt([turns[0], tool, turns[1], why]) == "1" * 100 + "\n" + "2" * 300 + "\nWhy?"  # 400, latest first
    assert as_prompt([turns[0], tool, turn("user", "q" * 1000)]) == "1" * 300 + "\n" + "t" * 700 + "\n" + "q" * 1000
    assert as_prompt([turn("assistant", "ab" * 400), why]) == "ab" * 200 + "\nWhy?"
    assert as_prompt([tool, why]) == "t" * 400 + "\nWhy?"
    assert as_prompt([turn("system", "s" * 5000), tool]) == "s" * 5000 + "\n" + "t" * 5000


def test_what_is_cut_counts_as_input_tokens() -> None:
    def added(*messages: dict[str, str]) -> int:
        return read(messages=list(messages)).requirements.added_tokens

    question = {"role": "user", "content": "Why?"}
    assert added(question) == 0
    assert added({"role": "assistant", "content": "short"}, question) == 0
    assert added({"role": "assistant", "content": "s" * 5000}, question) == (5000 - 400) // 4
    assert added({"role": "assistant", "content": "\u00fc" * 5000}, question) == 2 * (5000 - 400) // 4
    assert added({"role": "system", "content": "s" * 5000}, question) == 5000 // 4


def test_invalid_json_has_its_own_code() -> None:
    with pytest.raises(ValidationError) as error:
        read_request(b"{")
    assert invalid(error.value).code == "invalid_json"


def test_the_text_before_the_question_may_be_in_a_prompt_cache() -> None:
    tool = {"type": "f"}  # 12 bytes
    turns = [
        {"role": "system", "content": "x" * 40},
        {"role": "user", "content": "y" * 40},
        {"role": "assistant", "content": "z" * 40},
        {"role": "user", "content": "and now?"},
    ]
    assert read(messages=turns).earlier_tokens == 30
    assert read(messages=turns, tools=[tool]).earlier_tokens == 33
    assert read(messages=turns[:1]).earlier_tokens == read(prompt="hi", tools=[tool]).earlier_tokens == 0
