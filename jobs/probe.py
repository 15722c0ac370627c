"""Probes every candidate block on the training split: AUC, Fisher J, effective dimension, anisotropy, per target."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jobs.cli import main
from jobs.inputs import SignalsConfig, load, split
from prefill_router.evaluation.layers import agreement, layer_table, plot_layers
from prefill_router.evaluation.report import number
from prefill_router.files import write_atomically, write_json, write_parquet
from prefill_router.outcomes.splits import Scheme, make_folds
from prefill_router.routing.fit import N_FOLDS, check_two_classes
from prefill_router.signals.probe import Block, Geometry, ProbeScores, measure_geometry, probe_block, probe_blocks


class ProbeConfig(SignalsConfig):
    """Inputs, the split to probe on, and the number of components."""

    seed: Annotated[int, Field(ge=0, description="of split and folds")] = 0
    scheme: Annotated[Scheme, Field(description="only the training part is looked at")] = "85/15"
    components: Annotated[int, Field(ge=1, description="PCA components of the logistic probe")] = 64


def run(config: ProbeConfig) -> str:
    """Probe every layer x pooling x target on the training split; write the table, its plot and a summary."""
    _, signals = load(config)
    train = split(signals, config.seed, config.scheme).train
    correct = signals.outcomes.correct[train]
    check_two_classes(signals.outcomes, train)
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)

    def measure(block: Block) -> tuple[ProbeScores, Geometry]:
        states = signals.states(block)[train]
        return probe_block(states, correct, folds, config.components, nested=False), measure_geometry(states)

    measured = probe_blocks(signals.blocks, measure, "probe")
    scores = {block: score for block, (score, _) in measured.items()}
    geometry = {block: shape for block, (_, shape) in measured.items()}
    table = layer_table(scores, geometry, signals.outcomes.models, config.components)
    summary = agreement(scores)
    write_parquet(config.output / "layers.parquet", table)
    write_atomically(config.output / "layers.svg", lambda path: plot_layers(scores, geometry, path))
    write_json(config.output / "summary.json", {**summary, "config": config.model_dump(mode="json")})
    return (f"{len(scores)} blocks x {len(signals.outcomes.models)} targets; rank correlation of J with AUC "
            f"{number(summary['rank_correlation'])}, AUC lost by trusting J {number(summary['auc_lost'], 4)}; table "
            f"and plot in {config.output}")


if __name__ == "__main__":
    main(ProbeConfig, run)
