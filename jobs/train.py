"""Trains a router and writes OUTPUT/checkpoint: the command of `prefill_router.workflows.train`."""

from __future__ import annotations

from prefill_router.cli import main
from prefill_router.workflows.train import TrainConfig, plan, run

if __name__ == "__main__":
    main(
        TrainConfig,
        run,
        plan=plan,
        then="python -m jobs.evaluate --checkpoint {output}/checkpoint, with the same outcomes, pool and activations",
    )
