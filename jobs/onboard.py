"""Adds a model to a checkpoint from labelled queries: the command of `prefill_router.workflows.onboard`."""

from __future__ import annotations

from prefill_router.cli import main
from prefill_router.workflows.onboard import OnboardConfig, plan, run

if __name__ == "__main__":
    main(OnboardConfig, run, plan=plan, then="python -m jobs.register --checkpoint {output}/checkpoint")
