"""Trains a router: layer search, projections, trunk ensemble, calibration; writes a checkpoint and tracks the run."""

from __future__ import annotations

from jobs.cli import main
from jobs.inputs import SignalsConfig, load, split
from prefill_router import registry
from prefill_router.outcomes.splits import Split
from prefill_router.routing.checkpoint import check_place, save_checkpoint
from prefill_router.routing.fit import FitConfig, fit_router
from prefill_router.signals.join import Signals
from prefill_router.version import code_version


class TrainConfig(SignalsConfig):
    """Inputs, the output folder (the checkpoint goes to OUTPUT/checkpoint) and how to fit."""

    fit: FitConfig = FitConfig()


def lineage(signals: Signals, parts: Split) -> dict[str, object]:
    """What the checkpoint was made from."""
    return {
        "code_version": code_version(),
        "outcomes_digest": signals.outcomes.digest(),
        "activations_digest": signals.digest,
        "encoders": {
            fingerprint: dataset.encoder.model_dump(mode="json") for fingerprint, dataset in signals.activations.items()
        },
        "test_digest": signals.outcomes.take(parts.test).digest(),
        "queries": {
            "train": len(parts.train),
            "calibration": len(parts.calibration),
            "test": len(parts.test),
            "left_out": len(signals.left_out),
        },
    }


def run(config: TrainConfig) -> str:
    """Train a router on outcomes and activations; write OUTPUT/checkpoint."""
    check_place(config.output / "checkpoint")
    pool, signals = load(config)
    parts = split(signals, config.fit.seed, config.fit.scheme)
    with registry.track("train", config) as tracked:
        fitted = fit_router(
            signals,
            pool,
            parts,
            config.fit,
            lineage(signals, parts),
            progress=True,
        )
        router = save_checkpoint(fitted.router, config.output / "checkpoint")
        metrics = {**fitted.held_out_figures, "chosen_lambda": router.chosen_lambda}
        tracked.tag(checkpoint_id=router.id)
        tracked.log_metrics(metrics)
        tracked.log_artifact(config.output / "checkpoint", "checkpoint")
    for name, layer_keys in zip(pool.names, fitted.selection.layer_keys, strict=True):
        print(f"  {name}: {', '.join(key.column for key in layer_keys)}")
    return (
        f"checkpoint {router.id} in {config.output / 'checkpoint'}; held-out AUC {metrics['held_out_auc']:.4f}, "
        f"Brier {metrics['held_out_brier']:.4f}, chosen lambda {router.chosen_lambda:.2f}"
    )


if __name__ == "__main__":
    main(TrainConfig, run)
