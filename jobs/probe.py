"""Probes every candidate block on the training split: AUC, Fisher J, effective dimension, anisotropy, per target.

On a cluster each (pooling, layer) column is a task that reads its column where it runs; on one machine, a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import ray
from pydantic import Field, field_validator
from tqdm import tqdm

from jobs.cli import main
from jobs.cluster import answer, connect, is_given
from jobs.inputs import SignalsConfig, load, split
from prefill_router.evaluation.layers import agreement, layer_table, plot_layers
from prefill_router.evaluation.report import number
from prefill_router.files import write_atomically, write_json, write_parquet
from prefill_router.outcomes.splits import Scheme, make_folds
from prefill_router.routing.fit import N_FOLDS, check_two_classes
from prefill_router.signals.join import Signals
from prefill_router.signals.probe import Block
from prefill_router.signals.search import LayerScores, search_block, search_layers


class ProbeConfig(SignalsConfig):
    """Inputs, the split to probe on, and the numbers of components."""

    seed: Annotated[int, Field(ge=0, description="of split and folds")] = 0
    scheme: Annotated[Scheme, Field(description="only the training part is looked at")] = "85/15"
    components: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(
        min_length=1, description="PCA components k of the logistic probes: a number, or a list")] = (64,)

    @field_validator("components", mode="before")
    @classmethod
    def _one_or_more_components(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value


def run(config: ProbeConfig) -> str:
    """Probe every layer x pooling x target x k on the training split; write the table, its plot and a summary."""
    _, signals = load(config)
    train = split(signals, config.seed, config.scheme).train
    check_two_classes(signals.outcomes, train)
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)
    ks = sorted(set(config.components))
    if is_given():
        connect()
        found = search_on_cluster(signals, train, folds, ks)
    else:
        found = search_layers(signals.blocks, lambda block: signals.states(block, train),
                              signals.outcomes.correct[train], folds, ks, nested=False, with_geometry=True,
                              progress="probe")
    by_k = {k: agreement({block: scores.at(k) for block, scores in found.items()}) for k in ks}
    summary = by_k[ks[-1]]
    write_parquet(config.output / "layers.parquet", layer_table(found, signals.outcomes.models))
    write_atomically(config.output / "layers.svg", lambda path: plot_layers(found, ks[-1], path))
    write_json(config.output / "summary.json", {**summary, "by_components": by_k,
                                                "config": config.model_dump(mode="json")})
    return (f"{len(found)} blocks x {len(signals.outcomes.models)} targets x {len(ks)} k; rank correlation of J with "
            f"AUC {number(summary['rank_correlation'])}, AUC lost by trusting J {number(summary['auc_lost'], 4)}; "
            f"table and plot in {config.output}")


def search_on_cluster(signals: Signals, train: np.ndarray, folds: np.ndarray, ks: Sequence[int]
                      ) -> dict[Block, LayerScores]:
    """As `search_layers`, a task of one CPU for every block; the datasets must be on storage that all nodes see."""
    here = ray.put((signals, train, folds))
    search = ray.remote(num_cpus=1)(_search_column)
    tasks = {search.remote(here, block, list(ks)): block for block in signals.blocks}
    found, waiting = {}, list(tasks)
    with tqdm(total=len(tasks), desc="probe", unit="block", leave=False) as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            found.update({tasks[task]: answer(task) for task in done})
            bar.update(len(done))
    return {block: found[block] for block in signals.blocks}


def _search_column(inputs: tuple[Signals, np.ndarray, np.ndarray], block: Block, ks: list[int]) -> LayerScores:
    signals, train, folds = inputs
    return search_block(signals.states(block, train), signals.outcomes.correct[train], folds, ks, nested=False,
                        with_geometry=True)


if __name__ == "__main__":
    main(ProbeConfig, run)
