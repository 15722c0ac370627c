"""The checkpoints that decide: the live one, a canary with a share of the conversations, and a shadow.

In: described checkpoints and the key of a conversation. Out: the arm that decides, and those that are only logged.
Every arm has its own pool, and so its own servers. Knows nothing of Ray and of HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefill_router.errors import InputError
from prefill_router.pool import Endpoint
from serve.live import ArmName as ArmName
from serve.router import Checkpoint
from serve.trial import Pair
from serve.upstream import Upstream, upstreams_of


@dataclass(frozen=True)
class Arm:
    """A checkpoint, the server of each model of its pool, and the reason for each model that has none.

    `share`: the probability that it decides a conversation; 0 for the shadow.
    """

    name: ArmName
    share: float
    checkpoint: Checkpoint
    servers: Mapping[str, Upstream]
    missing: Mapping[str, str]

    def knows(self, models: Iterable[str]) -> bool:
        """Whether all models are in its pool."""
        return set(models) <= set(self.checkpoint.models)

    def answers(self, models: Collection[str]) -> bool:
        """Whether it knows all models and has a server for one of them; for one of its pool if `models` is empty."""
        return self.knows(models) and any(name in self.servers for name in models or self.checkpoint.models)


@dataclass(frozen=True)
class Arms:
    """The live arm first, then the canary and the shadow, if they are configured."""

    arms: tuple[Arm, ...]

    @property
    def live(self) -> Arm:
        """The arm that decides if no other does."""
        return self.arms[0]

    @property
    def canary(self) -> Arm | None:
        """The canary, if there is one."""
        return next((arm for arm in self.arms if arm.name == "canary"), None)

    @property
    def pair(self) -> Pair | None:
        """The canary and the live checkpoint that are compared; None without a canary."""
        return None if self.canary is None else Pair(self.live.checkpoint.place, self.canary.checkpoint.place)

    def drawn(self, key: Callable[[], str], models: Collection[str], asks: bool) -> tuple[Arm, float]:
        """The arm that decides the conversation of `key`, and the probability of this draw.

        The draw is a hash: a conversation keeps its arm, and another canary draws other conversations. The live arm
        decides if the canary's pool lacks one of `models`, which the request names, or, where the chosen model is
        asked, if the canary has no server for any of them.
        """
        canary = self.canary
        if canary is None or not (canary.answers(models) if asks else canary.knows(models)):
            return self.live, 1.0
        digest = hashlib.sha256(f"{canary.checkpoint.id} {key()}".encode()).digest()
        drawn = canary if int.from_bytes(digest[:8]) < canary.share * 2**64 else self.live
        return drawn, drawn.share

    def candidates(self, acting: Arm, order: Sequence[str], most: int) -> tuple[list[Upstream], int]:
        """The servers to ask for the models in `order`, in this order, and the maximum number of attempts.

        Of the live arm, `most` are tried. Of a canary, `most` are tried first, then as many of the live arm that are
        other servers, so that a request is not lost if the canary's servers do not answer.
        """
        own = [acting.servers[name] for name in order]
        if acting is self.live:
            return own, most
        live = [self.live.servers[name] for name in order if name in self.live.servers]
        more = [one for one in live if one not in own]
        return ([*own[:most], *more], most + min(most, len(more))) if more else (own, most)

    def observing(self, acting: Arm, models: Collection[str], asks: bool) -> tuple[Arm, ...]:
        """The arms beside `acting` that could decide: their decisions are logged. Arguments as in `drawn`."""
        able = [arm for arm in self.arms if arm is not acting]
        return tuple(arm for arm in able if (arm.answers(models) if asks else arm.knows(models)))


def arms_of(
    checkpoints: Sequence[tuple[ArmName, float, Checkpoint]],
    environment: Mapping[str, str],
    endpoints: Mapping[str, Endpoint],
    default_model: str | None,
) -> Arms:
    """The arms of checkpoints with their names and shares. `endpoints` replaces endpoints of pool.yaml by model.

    Raises InputError for an endpoint of a model that no pool has, and if an arm that decides has no server for
    `default_model`.
    """
    names = [name for _, _, checkpoint in checkpoints for name in checkpoint.models]
    unknown = sorted(endpoints.keys() - set(names))
    if unknown:
        raise InputError(
            f"gateway.endpoints: {unknown[0]!r} is not in the pool; known: {', '.join(dict.fromkeys(names))}"
        )
    arms = tuple(
        Arm(name, share, checkpoint, *upstreams_of(checkpoint.pool, environment, endpoints))
        for name, share, checkpoint in checkpoints
    )
    for arm in arms:
        if default_model is not None and arm.share and default_model not in arm.servers:
            reason = arm.missing.get(default_model, f"is not in the pool of {arm.checkpoint.where}")
            raise InputError(f"gateway.default_model: {default_model!r} {reason}; name another model")
    return Arms(arms)


def check_models(models: Iterable[str], arm: Arm) -> None:
    """Raises InputError for a model that is not in the pool of `arm`."""
    for name in models:
        if name not in arm.checkpoint.models:
            known = ", ".join(arm.checkpoint.models)
            raise InputError(f"models: {name!r:.80} is not in the pool; known: {known}")
