"""Sessions: a conversation stays with the model that answered its first turn.

In: the session of a request and the model that answered. Out: the model to keep. The store is a deployment of one
replica, shared by all gateways; without it a conversation is decided anew at every turn. It also counts for the limits
of API keys. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from prefill_router.config import FrozenModel
from serve.limits import Limits, Verdict, spent_today


class SessionsConfig(FrozenModel):
    """Resources and limits of the store of sessions, and when a conversation leaves its model."""

    cpus: Annotated[float, Field(gt=0, description="logical CPUs of the store")] = 0.05
    ttl_s: Annotated[float, Field(gt=0, description="time after its last turn that a session is kept, in seconds")] = (
        3600.0
    )
    most: Annotated[
        int, Field(ge=1, description="maximum number of sessions; the least recently used one goes first")
    ] = 100_000
    max_fall: Annotated[
        float,
        Field(ge=0, le=1, description="fall of the model's confidence since the first turn above which it is left"),
    ] = 0.15


@dataclass(frozen=True)
class Kept:
    """The model of a session, and its confidence at the turn that chose it."""

    model: str
    confidence: float


class Sessions:
    """The part of the store (serve/store.py) that keeps sessions and counts for limits."""

    def __init__(self, config: SessionsConfig, spent_log: Path | None = None) -> None:
        """`spent_log`: folder of the decision log from which the spend of API keys is read; None: it starts at 0."""
        self._config = config
        now = time.time()
        self._limits = Limits() if spent_log is None else Limits(spent_today(spent_log, now), until=now)
        self._kept: OrderedDict[str, tuple[float, Kept]] = OrderedDict()  # with the time of the last turn

    async def get(self, key: str) -> Kept | None:
        """The model of a session; None if there is none, or its time is over."""
        found = self._kept.get(key)
        return found[1] if found is not None and time.monotonic() - found[0] <= self._config.ttl_s else None

    async def keep(self, key: str, kept: Kept) -> None:
        """Notes that a model answered a turn. The confidence of a model that is kept already does not change."""
        before = await self.get(key)
        self._kept[key] = time.monotonic(), before if before is not None and before.model == kept.model else kept
        self._kept.move_to_end(key)
        while len(self._kept) > self._config.most:
            self._kept.popitem(last=False)

    async def admit(self, key: str, requests_per_minute: int | None, usd_per_day: float | None) -> Verdict:
        """Whether the limits of an API key allow a request, as `Limits.admit`."""
        return self._limits.admit(key, requests_per_minute, usd_per_day)

    async def spend(self, key: str, usd: float, ended: float) -> None:
        """Adds the cost of an answer to the spend of an API key, as `Limits.spend`."""
        self._limits.spend(key, usd, ended)


def session_key(messages: Sequence[Any], session_id: str | None, preferences: Sequence[Any]) -> str:
    """The key of a conversation: of its id, else of its messages up to the first one of the user.

    Requests with other `preferences`, such as another lambda, belong to another session.
    """
    opening: list[Any] = []
    for message in messages if session_id is None else ():
        opening.append(message)
        if _role(message) == "user":
            break
    identity = json.dumps([session_id, opening, list(preferences)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def has_answer(messages: Sequence[Any]) -> bool:
    """Whether the conversation has an answer: its first turn is over."""
    return any(_role(message) == "assistant" for message in messages)


def awaits_tool(messages: Sequence[Any]) -> bool:
    """Whether the conversation has a result of a tool after its last answer: the model that called it continues."""
    for message in reversed(messages):
        if _role(message) in ("tool", "function"):
            return True
        if _role(message) == "assistant":
            return False
    return False


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
