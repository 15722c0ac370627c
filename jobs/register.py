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
from prefill_router.files import read_json
from prefill_router.locations import Location
from prefill_router.registry.store import registry_uri, shown
from prefill_router.registry.versions import at_hand
from prefill_router.routing.checkpoint import load_checkpoint


class RegisterConfig(FrozenModel):
    """The checkpoint and its evaluation."""

    checkpoint: Annotated[Location, Field(description="checkpoint folder of jobs.train")]
    evaluation: Annotated[
        Location | None, Field(description="output folder of jobs.evaluate, whose headline figures become tags")
    ] = None


def plan(config: RegisterConfig) -> list[str]:
    """What a dry run says. Raises InputError as `register` does for the checkpoint. Asks no registry."""
    folder = at_hand(str(config.checkpoint))
    checkpoint = config.checkpoint if folder is None else f"checkpoint {load_checkpoint(folder).id}"
    if config.evaluation is not None:
        read_json(config.evaluation / "metrics.json")
    return [
        f"registers {checkpoint} in {shown(registry_uri())}, which is not asked now; a known one keeps its version",
        "costs nothing but the time of this machine",
    ]


def register(config: RegisterConfig) -> str:
    """Register a checkpoint as a version of the model prefill-router, with its lineage."""
    version = registry.register(config.checkpoint, config.evaluation)
    done = "registered as" if version.created else "is already registered as"
    return f"checkpoint {version.checkpoint} {done} version {version.number} of {registry.NAME}"


if __name__ == "__main__":
    main(RegisterConfig, register, plan=plan)
