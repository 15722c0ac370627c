"""API keys of the gateway: who may call it, and how much. The configuration has their SHA-256 digests, not the keys.

In: the headers of a request. Out: the name of the key. `python -m serve.keys NAME` makes a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, 64 hex digits")]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ApiKey(FrozenModel):
    """The digest of an API key, and its limits. A string is the digest of a key without limits."""

    digest: Digest
    requests_per_minute: Annotated[
        int | None, Field(ge=1, le=100_000, description="maximum number of requests in 60 seconds; none: no limit")
    ] = None
    usd_per_day: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="cost of the answers of a UTC day from which requests are refused, in USD; none: no limit",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _digest_alone(cls, value: Any) -> Any:
        return {"digest": value} if isinstance(value, str) else value


def key_name(keys: Mapping[str, ApiKey], headers: Mapping[str, str]) -> str | None:
    """The name of the key in `Authorization: Bearer KEY` or `x-api-key`; None if it is not one of `keys`.

    Every digest is compared, in constant time.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")
    digest = digest_of(key.strip())
    found = [name for name, own in keys.items() if hmac.compare_digest(own.digest, digest)]
    return found[0] if found else None


def digest_of(key: str) -> str:
    """The digest that the configuration has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def make(name: str) -> str:
    """A new key, and the line of the configuration. Raises InputError for a name with other characters."""
    if not NAME.fullmatch(name):
        raise InputError(f"NAME: got {name!r:.80}, allowed are letters, digits, `.`, `_` and `-`")
    key = f"pr-{secrets.token_urlsafe(32)}"
    return f"key, shown only now: {key}\ngateway.keys:        {name}: {digest_of(key)}"


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise InputError("usage: python -m serve.keys NAME")
        print(make(sys.argv[1]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
