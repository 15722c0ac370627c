"""What the replicas serve now: followed aliases as versions of the registry, and the canary at the share of its trial.

In: a configuration, and outcomes of conversations from the gateways. Out: a `Target`. One object asks the registry, for
all replicas of all deployments, as long as they ask it; the registry keeps which versions were stopped. If the registry
does not answer, nothing changes. Knows nothing of Ray and of checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefill_router import registry
from prefill_router.errors import InputError
from serve.live import Live
from serve.schemas import RolloutReply
from serve.trial import Outcome, Pair, Trial

TAG = "rollout"  # tag of a version: `stopped: REASON`, without which it may be a canary again, or READY
STOPPED = "stopped: "
READY = "ready"  # a version with this tag is not promoted by a trial again
RECORD_S = 10.0  # between two attempts to record the end of a trial
MOST = 4  # configurations, and pairs of a configuration, that are remembered
IDLE_S = 5.0  # without a question after which a configuration is not in use; replicas ask every second
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Target:
    """The checkpoints to serve, with versions in place of followed aliases, and what became of the last canary."""

    live: Live
    rollout: RolloutReply | None = None


class Targets:
    """The targets of all configurations, for one event loop. `store` is the registry; tests give another one."""

    def __init__(self, store: Any = registry) -> None:
        self._registry = store
        self._stopped: dict[str, RolloutReply] = {}  # by the canary's place
        self._courses: OrderedDict[Live, Course] = OrderedDict()

    async def target(
        self, configured: Live, known: Target | None, outcomes: Sequence[tuple[Pair, Outcome]] = ()
    ) -> Target:
        """The present target of a configuration. `known`: the target before, for a store that has been restarted.

        Raises InputError or UnavailableError if the version of the live checkpoint is unknown, and always has been.
        """
        course = self._courses.get(configured)
        if course is None or (known is None and course.idle):  # a new configuration, or one that comes back
            unrecorded = {} if course is None else course.unrecorded
            course = self._courses[configured] = Course(configured, self._registry, self._stopped, known, unrecorded)
            self._courses.move_to_end(configured)
            if len(self._courses) > MOST:
                self._courses.popitem(last=False)
        return await course.target(outcomes)


class Course:
    """The targets of one configuration, one after another."""

    def __init__(
        self,
        configured: Live,
        store: Any,
        stopped: dict[str, RolloutReply],
        known: Target | None,
        unrecorded: dict[str, tuple[Pair, RolloutReply]],
    ) -> None:
        """`stopped`: canaries that were stopped, by place; shared by all configurations, and changed here.

        `unrecorded`: ends of trials that the registry does not have, by the canary's place.
        """
        self._configured, self._registry, self._stopped, self._last = configured, store, stopped, known
        if known is not None and known.rollout is not None and known.rollout.state == "stopped":
            stopped[known.rollout.canary] = known.rollout
        self._rollout = None if known is None else known.rollout
        self._aliases: dict[str, int] | None = None  # None: not read yet
        self._reading: asyncio.Task[None] | None = None
        self._read_at, self._asked_at = -math.inf, time.monotonic()
        self._silent = False  # the present failure of the registry is logged
        self.unrecorded = unrecorded
        self._trials: OrderedDict[Pair, Trial] = OrderedDict()

    @property
    def idle(self) -> bool:
        """Whether no replica uses this configuration."""
        reads = self._reading is not None and not self._reading.done()
        return not reads and time.monotonic() - self._asked_at > IDLE_S

    async def target(self, outcomes: Sequence[tuple[Pair, Outcome]] = ()) -> Target:
        """The present target, after these outcomes."""
        self._asked_at = time.monotonic()
        await self._look()
        self._count(outcomes)
        self._last = Target(self._pinned(), self._rollout)
        return self._last

    # The registry

    async def _look(self) -> None:
        """Reads the registry if it is time to, and waits for it if it has not been read yet."""
        every_s = min(self._configured.follow_s or math.inf, RECORD_S if self.unrecorded else math.inf)
        if (
            self._configured.asks_registry
            and time.monotonic() - self._read_at >= every_s
            and (self._reading is None or self._reading.done())
        ):
            self._read_at = time.monotonic()
            self._reading = asyncio.ensure_future(self._read())
        if self._aliases is None and self._last is None and self._reading is not None:
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        try:
            self._aliases = await asyncio.to_thread(self._ask)
        except Exception as error:  # of any type: the registry must not end what is served
            if self._last is None and self._configured.follows(self._configured.checkpoint):
                self._read_at = -math.inf  # the next question reads again
                raise
            if not self._silent:
                logger.error("what is served does not change, the registry fails: %s", " ".join(str(error).split()))
            self._silent = True
        else:
            self._silent = False

    def _ask(self) -> dict[str, int]:
        """Records ends of trials, and returns the versions of all aliases. Runs in a thread."""
        for known, ended in list(self.unrecorded.items()):
            self._record(*ended)
            if self.unrecorded.get(known) is ended:  # not stopped meanwhile
                del self.unrecorded[known]
        aliases: dict[str, int] = self._registry.aliases() if self._configured.followed else {}
        canary = self._configured.canary
        place = None if canary is None else self._place(canary.checkpoint, aliases)
        if self._configured.compared and place is not None and (number := _number(place)) is not None:
            said = self._registry.version_tags(number).get(TAG, "")
            if not said.startswith(STOPPED):
                if place not in self.unrecorded:
                    self._stopped.pop(place, None)
            elif place not in self._stopped:
                reason = said.removeprefix(STOPPED)
                assert canary is not None
                self._stopped[place] = RolloutReply(state="stopped", canary=place, share=canary.share, reason=reason)
        return aliases

    def _record(self, pair: Pair, end: RolloutReply) -> None:
        """Tags the version of a canary at the end of its trial, promotes a ready one, and removes its alias."""
        number, canary = _number(pair.canary), self._configured.canary
        if number is None or canary is None:
            return
        alias = canary.checkpoint.partition("@")[2] if self._configured.follows(canary.checkpoint) else None
        if end.state == "stopped":
            self._registry.record_verdict(number, {TAG: f"{STOPPED}{end.reason}"}, TAG, [], TAG)
        elif (reason := self._not_promoted(pair, number, alias)) is not None:
            logger.error("canary %s is ready, but does not become the champion: %s", pair.canary, reason)
            return
        else:
            self._registry.record_verdict(number, {TAG: READY}, TAG, [], TAG)  # first: it is promoted at most once
            self._registry.promote(number)
        if alias in self._registry.TRIAL and self._registry.aliases().get(alias) == number:
            self._registry.remove_alias(alias)

    def _not_promoted(self, pair: Pair, number: int, alias: str | None) -> str | None:
        """Why a ready version does not become the champion; None if it does, or is it. `alias`: the followed one."""
        aliases = self._registry.aliases()
        champion = aliases.get(registry.CHAMPION)
        if champion == number:
            return None
        if champion != _number(pair.live):
            return f"it was compared with {pair.live}, and the champion is {champion}"
        if alias is not None and aliases.get(alias) != number:
            return f"the alias {alias} does not name it any more"
        if self._registry.version_tags(number).get(TAG) == READY:
            return f"it has the tag {TAG} of an earlier trial already; use jobs.promote, or delete the tag"
        return None

    def _place(self, where: str, aliases: dict[str, int]) -> str | None:
        """The version of a followed alias, None if it is not set; another place stays."""
        if not self._configured.follows(where):
            return where
        number = aliases.get(where.partition("@")[2])
        return None if number is None else f"models:/{registry.NAME}/{number}"

    # What follows from it

    def _pinned(self) -> Live:
        configured, before = self._configured, self._last
        if self._aliases is None and before is not None and configured.followed:
            found = before.live  # of a store before this one
        else:
            aliases = self._aliases or {}
            live = self._place(configured.checkpoint, aliases)
            if live is None and before is None:
                raise InputError(
                    f"checkpoint: {registry.NAME} has no version with the alias "
                    f"{configured.checkpoint.partition('@')[2]!r}; set `champion` with jobs.promote"
                )
            live = live or before.live.checkpoint  # type: ignore[union-attr]
            canary = configured.canary and self._place(configured.canary.checkpoint, aliases)
            shadow = configured.shadow and self._place(configured.shadow, aliases)
            arm = configured.canary and canary and configured.canary.model_copy(update={"checkpoint": canary})
            found = configured.model_copy(update={"checkpoint": live, "canary": arm or None, "shadow": shadow})
        if found.canary is None or not found.compared:
            return found
        place = found.canary.checkpoint
        if place in self._stopped or place == found.checkpoint:  # a canary that was promoted is the live one
            self._rollout = self._stopped.get(place)
            return found.model_copy(update={"canary": None})
        trial = self._trial(Pair(found.checkpoint, place))
        self._rollout = trial.reply
        return found.model_copy(update={"canary": found.canary.model_copy(update={"share": trial.share})})

    def _count(self, outcomes: Sequence[tuple[Pair, Outcome]]) -> None:
        by_pair: dict[Pair, list[Outcome]] = {}
        for pair, outcome in outcomes:
            by_pair.setdefault(pair, []).append(outcome)
        for pair, own in by_pair.items():
            if pair.canary in self._stopped or not self._configured.compared:
                continue
            trial = self._trial(pair)
            before, reply = trial.state, trial.judge(own)
            if reply.state == before:
                continue
            logger.warning("canary %s is %s%s", pair.canary, reply.state, f": {reply.reason}" if reply.reason else "")
            if reply.state == "stopped" or (reply.state == "ready" and trial.config.promote):
                self.unrecorded[pair.canary], self._read_at = (pair, reply), -math.inf
            if reply.state == "stopped":
                self._stopped[pair.canary] = reply

    def _trial(self, pair: Pair) -> Trial:
        if pair not in self._trials:
            assert self._configured.canary is not None
            assert self._configured.rollout is not None
            shares = (self._configured.canary.share, *self._configured.rollout.shares)
            self._trials[pair] = Trial(pair, self._configured.rollout, shares)
            if len(self._trials) > MOST:
                self._trials.popitem(last=False)
        return self._trials[pair]


def _number(place: str) -> int | None:
    """The version number of a place in the registry; None for other places."""
    found = re.fullmatch(rf"models:/{re.escape(registry.NAME)}/(\d+)", place)
    return None if found is None else int(found[1])
