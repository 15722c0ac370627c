"""The trial of a canary: outcomes of both arms, bands, and the canary's share.

In: outcomes of conversations as losses in [0, 1]. Out: whether the canary goes on, at which share, is ready or stopped.
Each band is tested by `prefill_router.metrics.sequential` after every batch; alpha is split over bands and shares, so
that a canary within all its margins is stopped with a probability of at most alpha. A conversation counts once per
band: its turns and retries are not independent. Outcomes count for the share at which their arm was drawn: each share
is a comparison of its own, because the mix of queries may have changed with time. Knows nothing of Ray and registries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from prefill_router.metrics.sequential import Sample, verdict
from serve.live import Rollout
from serve.schemas import BandReply, RolloutReply

NOVEL = 0.95  # novelty above which a query counts as novel: 5 % of the queries that resemble those of training
MOST = 1_000_000  # outcomes whose repetition is noticed
_verdict = lru_cache(256)(verdict)  # most counts have not changed since the batch before


@dataclass(frozen=True)
class Pair:
    """The live checkpoint and the canary, by their places."""

    live: str
    canary: str


@dataclass(frozen=True)
class Outcome:
    """One outcome of a conversation: its `loss` in `band`, at the canary's `share`; `canary`: whose outcome it is."""

    conversation: str
    band: str
    canary: bool
    share: float
    loss: float

    @property
    def draw(self) -> float:
        """The share, equal for both arms: that of the live arm is 1 less it, with a rounding error."""
        return round(self.share, 9)


@dataclass
class Trial:
    """The trial of one canary against one live checkpoint, for one event loop."""

    pair: Pair
    config: Rollout
    shares: tuple[float, ...]  # the canary's, in order
    step: int = 0
    state: Literal["testing", "ready", "stopped"] = "testing"
    reply: RolloutReply = field(init=False)  # after the last outcomes
    _samples: dict[tuple[float, str, bool], Sample] = field(default_factory=dict)
    _seen: dict[tuple[str, str], None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reply = self._reply(self._bands(self.share), self.share)

    @property
    def share(self) -> float:
        """The canary's present share."""
        return self.shares[self.step]

    def judge(self, outcomes: Iterable[Outcome]) -> RolloutReply:
        """Counts outcomes, tests all bands, and stops the canary or goes to its next share if they say so.

        Outcomes of conversations that have counted, and of unknown shares or bands, do not count.
        """
        self._add(outcomes)
        self.reply = self._judged()
        return self.reply

    def _add(self, outcomes: Iterable[Outcome]) -> None:
        shares = {round(share, 9) for share in self.shares}
        for one in outcomes:
            known = one.conversation, one.band
            if one.draw not in shares or one.band not in self.config.margins or known in self._seen:
                continue
            self._seen[known] = None
            if len(self._seen) > MOST:
                del self._seen[next(iter(self._seen))]
            key = one.draw, one.band, one.canary
            before = self._samples.get(key, Sample())
            self._samples[key] = Sample(before.n + 1, before.total + one.loss)

    def _judged(self) -> RolloutReply:
        found = {share: self._bands(share) for share in self.shares[: self.step + 1]}
        all_bands = [(name, share, band) for share in found for name, band in found[share].items()]
        broken = next((one for one in all_bands if one[2].verdict == "broken"), None)
        if broken is not None:
            self.state = "stopped"
            name, share, band = broken
            reason = f"{name}: mean {band.canary:.3g} over {band.canary_n:,} conversations of the canary, "
            reason += f"{band.live:.3g} over {band.live_n:,} of the live checkpoint, margin {band.margin:g}"
            return self._reply(found[share], share, reason)
        if self.state == "testing" and self._passed(found[self.share]):
            if self.step + 1 < len(self.shares):
                self.step += 1
            else:
                self.state = "ready"
        return self._reply(self._bands(self.share), self.share)

    def _passed(self, bands: dict[str, BandReply]) -> bool:
        """Whether the present share is over."""
        known = [band for band in bands.values() if band.canary_n]
        if self.config.hold is not None:
            return max((band.canary_n for band in known), default=0) >= self.config.hold
        return bool(known) and all(band.verdict == "healthy" for band in known)

    def _bands(self, share: float) -> dict[str, BandReply]:
        margins = self.config.margins
        alpha = self.config.alpha / (len(self.shares) * max(len(margins), 1))
        found = {}
        for name, margin in margins.items():
            live, canary = (
                self._samples.get((round(share, 9), name, of_canary), Sample()) for of_canary in (False, True)
            )
            found[name] = BandReply(
                verdict=_verdict(live, canary, margin, alpha),
                margin=margin,
                live=live.mean,
                canary=canary.mean,
                live_n=live.n,
                canary_n=canary.n,
            )
        return found

    def _reply(self, bands: dict[str, BandReply], share: float, reason: str | None = None) -> RolloutReply:
        return RolloutReply(state=self.state, canary=self.pair.canary, share=share, bands=bands, reason=reason)
