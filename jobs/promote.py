"""Sets the aliases `champion` and `previous` of the registered model.

In: a version number, or `--undo`. Out: the aliases in the registry. A server that was started with
`models:/prefill-router@champion` keeps its version until the new version is deployed (docs/serving.md).
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel


class PromoteConfig(FrozenModel):
    """The registered version that becomes the champion: by its number, or with `undo` the champion before this one."""

    version: Annotated[int | None, Field(ge=1, description="number of the version that becomes the champion")] = None
    undo: Annotated[bool, Field(description="restore the previous champion")] = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.version is not None) == self.undo:
            raise ValueError("give either --version N or --undo")
        return self


def promote(config: PromoteConfig) -> str:
    """Make a version of prefill-router the champion, or restore the previous champion."""
    if config.version is None:
        champion, previous = registry.undo()
        return f"champion is version {champion.number}, previous is {previous.number if previous else 'none'}"
    previous = registry.promote(config.version)
    return f"champion is version {config.version}, previous is {previous.number if previous else 'none'}"


if __name__ == "__main__":
    main(PromoteConfig, promote)
