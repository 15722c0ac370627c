"""Training: layer search, projections, trunk ensemble and calibration, written as a checkpoint and tracked as a run."""

from __future__ import annotations

import shlex

from prefill_router import registry
from prefill_router.experiments.provenance import provenance
from prefill_router.outcomes.splits import split_queries
from prefill_router.pool import Pool
from prefill_router.registry.store import shown, tracking_uri
from prefill_router.routing.checkpoint import check_place, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import FittedRouter, fit_router
from prefill_router.signals.join import Signals
from prefill_router.workflows.inputs import (
    SignalsConfig,
    check_adapters,
    load_signals,
    note_fallback_only,
    split_signals,
)


class TrainConfig(SignalsConfig):
    """Inputs, the output folder (the checkpoint goes to OUTPUT/checkpoint), and the configuration of the fit."""

    fit: FitConfig = FitConfig()


def fit(signals: Signals, pool: Pool, config: FitConfig | None = None, progress: bool = False) -> FittedRouter:
    """Splits the queries by the configuration's seed and scheme and fits a router on the training part.

    Returns the fitted router with its split; `save` writes the checkpoint. Raises InputError as `fit_router` does.
    """
    config = config or FitConfig()
    split = split_queries(signals.outcomes, config.seed, config.scheme)
    check_adapters(signals, split)
    return fit_router(signals, pool, split, config, provenance(signals, split), progress)


def plan(config: TrainConfig) -> list[str]:
    """What a dry run says of training. Raises InputError as `run` does for its inputs and its place."""
    folder = config.output / "checkpoint"
    check_place(folder)
    _, signals = load_signals(config)
    split_signals(signals, config.fit.seed, config.fit.scheme)
    trunk = config.fit.trunk
    return [
        f"writes checkpoint: {folder}{', in place of the one there' if folder.exists() else ''}",
        f"tracks the run in {shown(tracking_uri())}",
        f"costs nothing but the time of this machine: probes of {len(signals.layer_keys)} layers, then {trunk.members} "
        f"members of at most {trunk.max_epochs} epochs each",
    ]


def run(config: TrainConfig) -> str:
    """Train a router on outcomes and activations; write OUTPUT/checkpoint."""
    folder = config.output / "checkpoint"
    check_place(folder)
    pool, signals = load_signals(config)
    note_fallback_only(pool)
    split = split_signals(signals, config.fit.seed, config.fit.scheme)
    with registry.track("train", config) as tracked:
        fitted = fit_router(signals, pool, split, config.fit, provenance(signals, split), progress=True)
        router = save_checkpoint(fitted.router, folder)
        metrics = {**fitted.held_out_figures, "chosen_lambda": router.chosen_lambda}
        tracked.tag(checkpoint_id=router.id)
        tracked.log_metrics(metrics)
        tracked.log_artifact(folder, "checkpoint")
    for name, keys in zip(pool.names, fitted.selection.layer_keys, strict=True):
        print(f"  {name}: {', '.join(key.column for key in keys)}")
    by_hand = f"; not tracked: python -m jobs.register --checkpoint {shlex.quote(str(folder))}"
    return (
        f"checkpoint {router.id} in {folder}; held-out AUC {metrics['held_out_auc']:.4f}, "
        f"Brier {metrics['held_out_brier']:.4f}, chosen lambda {router.chosen_lambda:.2f}"
        f"{'' if tracked.complete else by_hand}"
    )
