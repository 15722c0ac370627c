"""Trains probe tokens for an encoder and writes OUTPUT/adapter: the command of `prefill_router.workflows.adapt`."""

from __future__ import annotations

from prefill_router.cli import main
from prefill_router.workflows.adapt import AdaptConfig, plan, run

if __name__ == "__main__":
    main(AdaptConfig, run, plan=plan, then="python -m jobs.prefill --encoder.adapter {output}/adapter")
