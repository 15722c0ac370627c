"""Registers a checkpoint as a version of the model `prefill-router`, with its lineage.

In: a checkpoint folder and, optionally, its evaluation. Out: the number of the version. jobs.promote makes it the
champion.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.locations import Location


class RegisterConfig(FrozenModel):
    """The checkpoint and its evaluation."""

    checkpoint: Annotated[Location, Field(description="checkpoint folder of jobs.train")]
    evaluation: Annotated[
        Location | None, Field(description="output folder of jobs.evaluate, whose headline figures become tags")
    ] = None


def register(config: RegisterConfig) -> str:
    """Register a checkpoint as a version of the model prefill-router, with its lineage."""
    version = registry.register(config.checkpoint, config.evaluation)
    done = "registered as" if version.created else "is already registered as"
    return f"checkpoint {version.checkpoint} {done} version {version.number} of {registry.NAME}"


if __name__ == "__main__":
    main(RegisterConfig, register)
