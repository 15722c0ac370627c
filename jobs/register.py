"""Registers a checkpoint as a version of the model `prefill-router`, with its lineage.

In: a checkpoint folder, optionally the evaluation that belongs to it. Out: the version's number; nothing is
promoted (jobs.promote does that).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel


class RegisterConfig(FrozenModel):
    checkpoint: Annotated[Path, Field(description="checkpoint folder, as jobs.train writes it")]
    evaluation: Annotated[Path | None, Field(description="evaluation folder; its headline figures become tags")] = None


def register(config: RegisterConfig) -> str:
    """Registers a checkpoint as a version of the model prefill-router, with its lineage."""
    version = registry.register(config.checkpoint, config.evaluation)
    done = "registered as" if version.created else "was registered before, it is"
    return f"checkpoint {version.checkpoint} {done} version {version.number} of {registry.NAME}"


if __name__ == "__main__":
    main(RegisterConfig, register)
