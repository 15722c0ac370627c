"""Trains a router and writes OUTPUT/checkpoint: the command of `prefill_router.workflows.train`."""

from __future__ import annotations

from prefill_router.cli import main
from prefill_router.workflows.train import TrainConfig, run

if __name__ == "__main__":
    main(TrainConfig, run)
