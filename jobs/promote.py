"""Sets the alias `champion` of the registered model, keeps `previous`, and goes back.

In: a version number, or `--undo`. Out: the aliases in the registry. A server that was started from
`models:/prefill-router@champion` keeps its version until it is told of the new one (docs/serving.md).
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel


class PromoteConfig(FrozenModel):
    version: Annotated[int | None, Field(ge=1, description="version to make the champion")] = None
    undo: Annotated[bool, Field(description="make the previous champion the champion again")] = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.version is not None) == self.undo:
            raise ValueError("give either --version N or --undo")
        return self


def promote(config: PromoteConfig) -> str:
    """Makes a version of prefill-router the champion and keeps the one before as previous, or goes back to it."""
    if config.version is None:
        champion, previous = registry.undo()
        return f"champion is version {champion.number} again, previous is {previous.number if previous else 'none'}"
    previous = registry.promote(config.version)
    return f"champion is version {config.version}, previous is {previous.number if previous else 'none'}"


if __name__ == "__main__":
    main(PromoteConfig, promote)
