"""Changes the prices or removes models of a checkpoint: the command of `prefill_router.workflows.repool`."""

from __future__ import annotations

from prefill_router.cli import main
from prefill_router.workflows.repool import RepoolConfig, plan, run

if __name__ == "__main__":
    main(RepoolConfig, run, plan=plan, then="python -m jobs.register --checkpoint {output}/checkpoint")
