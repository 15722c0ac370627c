"""API keys: which headers have one, and the command that makes one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from prefill_router.errors import InputError
from serve.config import GatewayConfig
from serve.keys import digest_of, key_name, make

KEYS = {"first": digest_of("one"), "second": digest_of("zwei-\u00e9")}


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer one"}, "first"),
        ({"authorization": "bearer  zwei-\u00e9 "}, "second"),
        ({"x-api-key": "one"}, "first"),
        ({"authorization": "Basic x", "x-api-key": "one"}, "first"),
        ({"authorization": "Bearer two", "x-api-key": "one"}, None),
        ({"authorization": f"Bearer {digest_of('one')}"}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "one"}, None),
        ({}, None),
    ],
)
def test_a_request_is_known_by_its_key(headers: dict[str, str], name: str | None) -> None:
    assert key_name(KEYS, headers) == name


def test_the_command_makes_a_key_and_its_line_of_the_configuration() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serve.keys", "team-a"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.fullmatch(r"key, shown only now: (\S+)\ngateway.keys: +team-a: ([0-9a-f]{64})\n", made)
    assert match is not None
    assert key_name(GatewayConfig(keys={"team-a": match[2]}).keys, {"x-api-key": match[1]}) == "team-a"
    assert make("team-a") != make("team-a")
    with pytest.raises(InputError, match="allowed are letters"):
        make("a b")


def test_a_key_in_place_of_its_digest_is_refused() -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        GatewayConfig(keys={"team-a": "pr-secret"})
