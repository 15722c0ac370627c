"""Sets the aliases of the registered model: `champion` through the gates, `candidate` and `shadow` without them.

In: a version number, and for a comparison the evaluations, or outcomes and activations. Out: the aliases and the
verdict in the registry, and a page. The command of `prefill_router.workflows.promote`; a refusal exits with 1. What
serves an alias follows docs/serving.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prefill_router.cli import main
from prefill_router.registry.store import registry_uri, shown
from prefill_router.workflows import promote as workflow
from prefill_router.workflows.gate_policy import Bound, load_policy
from prefill_router.workflows.promote import PromoteConfig as PromoteConfig

POLICY = Path(__file__).parents[1] / "configs/gates.yaml"


def plan(config: PromoteConfig) -> list[str]:
    """What a dry run says. Reads the policy and asks no registry."""
    store = f"in {shown(registry_uri())}, which is not asked now"
    if config.undo:
        return [f"swaps `champion` and `previous` {store}"]
    if config.clear:
        return [f"removes the alias `{config.alias}` {store}"]
    version = f"version {config.version}" if config.version else "the version with the alias `candidate`"
    if config.alias != "champion":
        return [f"tries the checkpoint of {version} and makes it the {config.alias} {store}"]
    policy = load_policy(config.policy or POLICY)
    gates = [name for name, value in policy if isinstance(value, Bound)]
    return [
        f"compares {version} with the champion through {', '.join(gates)}, policy {policy.digest}, {store}",
        f"costs nothing but the time of this machine: {policy.resamples:,} resamples of the common test queries",
    ]


def promote(config: PromoteConfig) -> str:
    """Make a version the champion if it passes the gates, restore the previous champion, or set another alias."""
    promotion = workflow.run(config, load_policy(config.policy or POLICY))
    if promotion.refused:
        sys.exit(f"promote: refused: {promotion.summary}")
    return promotion.summary


if __name__ == "__main__":
    main(PromoteConfig, promote, plan=plan)
