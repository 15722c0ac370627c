"""What can change without a restart: the checkpoints of the arms, and how a canary is compared.

In: a mapping, which Serve calls `user_config`. Out: frozen models with bounds and units. Knows nothing of deployments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from prefill_router.config import FrozenModel
from prefill_router.locations import location


def _checked(checkpoint: str) -> str:
    location(checkpoint)  # refuses an unsupported scheme
    return checkpoint


ArmName = Literal["live", "canary", "shadow"]
CheckpointSource = Annotated[
    str,
    Field(
        min_length=1,
        description="checkpoint folder or URI, models:/prefill-router@ALIAS or models:/prefill-router/VERSION",
    ),
    AfterValidator(_checked),
]


class Canary(FrozenModel):
    """A second checkpoint that decides a share of the conversations."""

    checkpoint: CheckpointSource
    share: Annotated[float, Field(gt=0, lt=1, description="share of the conversations that it decides")]


Margin = Annotated[float | None, Field(gt=0, lt=1)]


class Rollout(FrozenModel):
    """When a canary is stopped, and how its share grows.

    Each margin is the largest difference between canary and live checkpoint that is accepted; none: not compared.
    """

    alpha: Annotated[
        float, Field(gt=0, lt=0.5, description="probability that a canary within all margins is ever stopped")
    ] = 0.05
    errors: Annotated[
        Margin, Field(description="excess of the share of chats whose chosen model did not answer properly")
    ] = 0.02
    no_decision: Annotated[Margin, Field(description="excess of the share of requests without a decision")] = 0.02
    feedback: Annotated[Margin, Field(description="loss of the mean score of feedback")] = 0.05
    novelty: Annotated[
        Margin, Field(description="excess of the share of queries with a novelty above serve.trial.NOVEL")
    ] = 0.1
    shares: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(description="further shares of the canary, in this order; none: it keeps its share"),
    ] = ()
    hold: Annotated[
        int | None,
        Field(
            ge=1,
            description="conversations of the canary after which the next share begins without a broken band; none: "
            "when every band with outcomes is healthy",
        ),
    ] = None
    promote: Annotated[
        bool, Field(description="whether a canary that has passed its last share becomes the champion, without gates")
    ] = False

    @model_validator(mode="after")
    def _shares_grow(self) -> Self:
        if any(after <= before for before, after in zip(self.shares, self.shares[1:], strict=False)):
            raise ValueError(f"shares: got {list(self.shares)}; give growing shares")
        return self

    @property
    def margins(self) -> dict[str, float]:
        """The margins of the bands that are compared."""
        found = {name: getattr(self, name) for name in ("errors", "no_decision", "feedback", "novelty")}
        return {name: margin for name, margin in found.items() if margin is not None}


class Live(FrozenModel):
    """`user_config` of gateway, encoder and router: their checkpoints, which can change without a restart."""

    checkpoint: CheckpointSource
    canary: Annotated[Canary | None, Field(description="checkpoint that decides a share of the conversations")] = None
    shadow: Annotated[
        CheckpointSource | None, Field(description="checkpoint whose decisions are logged and have no effect")
    ] = None
    follow_s: Annotated[
        float | None,
        Field(
            ge=0,
            description="time between two looks at the registry for versions that aliases name now, in seconds; 0 or "
            "none: an alias is resolved once",
        ),
    ] = 10.0
    rollout: Annotated[
        Rollout | None, Field(description="when the canary is stopped, and how its share grows; none: never")
    ] = Rollout()

    @model_validator(mode="after")
    def _shares_grow(self) -> Self:
        further = () if self.canary is None or self.rollout is None else self.rollout.shares
        if self.canary is not None and further and further[0] <= self.canary.share:
            raise ValueError(
                f"rollout.shares: got {list(further)}, but the canary has {self.canary.share:g} already; give larger "
                "shares"
            )
        return self

    def follows(self, where: str) -> bool:
        """Whether the version at `where`, an alias, is followed."""
        return bool(self.follow_s) and where.startswith("models:") and "@" in where

    @property
    def followed(self) -> bool:
        """Whether any checkpoint is followed."""
        return any(map(self.follows, self.sources))

    @property
    def asks_registry(self) -> bool:
        """Whether the store asks the registry: for versions of aliases, or whether the canary's version was stopped."""
        canary = None if self.canary is None else self.canary.checkpoint
        return self.followed or (self.compared and canary is not None and canary.startswith("models:"))

    @property
    def compared(self) -> bool:
        """Whether the canary is compared with the live checkpoint."""
        return self.canary is not None and self.rollout is not None

    @property
    def beside(self) -> bool:
        """Whether other checkpoints decide beside the live one."""
        return self.canary is not None or self.shadow is not None

    @property
    def arms(self) -> tuple[tuple[ArmName, str], ...]:
        """The arms (serve/arms.py) and their checkpoints: live, canary, shadow."""
        canary = None if self.canary is None else self.canary.checkpoint
        found: tuple[tuple[ArmName, str | None], ...]
        found = ("live", self.checkpoint), ("canary", canary), ("shadow", self.shadow)
        return tuple((name, where) for name, where in found if where is not None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The checkpoints: live, canary, shadow."""
        return tuple(where for _, where in self.arms)

    def moved(self, place: Callable[[str], str]) -> Self:
        """A copy whose checkpoints are replaced by `place(checkpoint)`."""
        canary = self.canary and self.canary.model_copy(update={"checkpoint": place(self.canary.checkpoint)})
        shadow = self.shadow and place(self.shadow)
        return self.model_copy(update={"checkpoint": place(self.checkpoint), "canary": canary, "shadow": shadow})
