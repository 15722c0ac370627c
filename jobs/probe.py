"""Probes every candidate layer on the training split: AUC, Fisher's J, effective dimension and anisotropy per target.

On a Ray cluster each layer key (encoder, pooling, layer) is a task, which reads its states on its own node. Without a
cluster the search runs in this process. The probes of `deep` are one task per encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import ray
from pydantic import Field, field_validator

from prefill_router.cli import main
from prefill_router.cluster import answer, connect, is_given, where
from prefill_router.experiments.provenance import provenance
from prefill_router.files import write_json, write_parquet
from prefill_router.layers.encoder_target import of_encoder
from prefill_router.layers.mlp_probes import PeakProbes, probe_peaks
from prefill_router.layers.report import geometry_report
from prefill_router.layers.table import agreement, layer_table
from prefill_router.outcomes.splits import Scheme, make_folds
from prefill_router.outcomes.table import read_note
from prefill_router.progress import tqdm
from prefill_router.reports.format import number
from prefill_router.reports.geometry import write_geometry
from prefill_router.routing.fit import check_two_classes
from prefill_router.routing.layers import N_FOLDS
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import LayerScores, search_layer, search_layers
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals


class ProbeConfig(SignalsConfig):
    """Inputs, the split, and the numbers of components."""

    seed: Annotated[int, Field(ge=0, description="seed of split and folds")] = 0
    scheme: Annotated[Scheme, Field(description="split scheme; only the training part is read")] = "85/15"
    components: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="numbers k of PCA components of the logistic probes: a number or a list"),
    ] = (64,)
    deep: Annotated[
        bool,
        Field(
            description="also evaluate layer choices on folds that did not choose them, MLP probes and concatenated "
            "layers, at the largest k; takes much longer"
        ),
    ] = False

    @field_validator("components", mode="before")
    @classmethod
    def _one_or_more_components(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value


def plan(config: ProbeConfig) -> list[str]:
    """What a dry run says: the number of probes. Raises InputError as `run` does for its inputs."""
    _, signals = load_signals(config)
    check_two_classes(signals.outcomes, split_signals(signals, config.seed, config.scheme).train)
    probes = f"{len(signals.layer_keys)} layers x {len(signals.outcomes.models)} targets x {len(config.components)} k"
    place = where() if is_given() else "this process"
    return [f"costs the time of {place}: {probes}{', and MLP probes of the peaks' if config.deep else ''}"]


def run(config: ProbeConfig) -> str:
    """Probe every layer, pooling and target at every k on the training split; write a table, a summary and a page."""
    pool, signals = load_signals(config)
    train = split_signals(signals, config.seed, config.scheme).train
    check_two_classes(signals.outcomes, train)
    folds = make_folds(signals.outcomes, train, config.seed, N_FOLDS)
    ks = sorted(set(config.components))
    if is_given():
        connect()
        found = search_on_cluster(signals, train, folds, ks, config.deep)
    else:
        found = search_layers(
            signals.layer_keys,
            lambda key: signals.states(key, train),
            signals.outcomes.correct[train],
            folds,
            ks,
            nested=config.deep,
            with_geometry=True,
            progress="probe",
        )
    probes = probe_encoders(signals, train, folds, found, ks[-1], config.seed) if config.deep else None
    by_k = {k: agreement({key: scores.at(k) for key, scores in found.items()}) for k in ks}
    summary = by_k[ks[-1]]
    write_parquet(config.output / "layers.parquet", layer_table(found, signals.outcomes.models))
    write_json(
        config.output / "summary.json", {**summary, "by_components": by_k, "config": config.model_dump(mode="json")}
    )
    infos = {fingerprint: dataset.encoder for fingerprint, dataset in signals.activations.items()}
    report = geometry_report(found, ks[-1], pool, infos, len(train), probes)
    inputs = config.model_dump(mode="json", include={"seed", "scheme", "outcomes", "pool"})
    page = write_geometry(
        config.output, {**report, "notice": read_note(config.outcomes), "provenance": inputs | provenance(signals)}
    )
    return (
        f"{len(found)} layers x {len(signals.outcomes.models)} targets x {len(ks)} k; rank correlation of J with "
        f"AUC {number(summary['rank_correlation'])}, AUC lost by trusting J {number(summary['auc_lost'], 4)}; "
        f"page: {page}"
    )


def search_on_cluster(
    signals: Signals, train: np.ndarray, folds: np.ndarray, ks: Sequence[int], nested: bool = False
) -> dict[LayerKey, LayerScores]:
    """As `search_layers`, with a one-CPU task per layer key. All nodes must be able to read the datasets."""
    shared = ray.put((signals, train, folds, nested))
    search = ray.remote(num_cpus=1)(_search_column)
    tasks = {search.remote(shared, key, list(ks)): key for key in signals.layer_keys}
    found, waiting = {}, list(tasks)
    with tqdm(total=len(tasks), desc="probe", unit=" layers", leave=False) as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            found.update({tasks[task]: answer(task) for task in done})
            bar.update(len(done))
    return {key: found[key] for key in signals.layer_keys}


def probe_encoders(
    signals: Signals, train: np.ndarray, folds: np.ndarray, found: Mapping[LayerKey, LayerScores], k: int, seed: int
) -> dict[str, PeakProbes]:
    """`probe_peaks` by encoder: one-CPU tasks if this process is connected to Ray, otherwise sequentially."""
    by_encoder = {encoder: of_encoder(found, encoder) for encoder in signals.activations}
    inputs = (signals, train, folds)
    if not ray.is_initialized():
        return {encoder: _probe_encoder(inputs, scores, k, seed, "probes") for encoder, scores in by_encoder.items()}
    shared, probe = ray.put(inputs), ray.remote(num_cpus=1)(_probe_encoder)
    tasks = {encoder: probe.remote(shared, scores, k, seed) for encoder, scores in by_encoder.items()}
    return {encoder: answer(task) for encoder, task in tasks.items()}


def _search_column(inputs: tuple[Signals, np.ndarray, np.ndarray, bool], key: LayerKey, ks: list[int]) -> LayerScores:
    signals, train, folds, nested = inputs
    return search_layer(
        signals.states(key, train), signals.outcomes.correct[train], folds, ks, nested=nested, with_geometry=True
    )


def _probe_encoder(
    inputs: tuple[Signals, np.ndarray, np.ndarray],
    found: Mapping[LayerKey, LayerScores],
    k: int,
    seed: int,
    progress: str | None = None,
) -> PeakProbes:
    signals, train, folds = inputs
    return probe_peaks(
        signals.outcomes.take(train),
        folds,
        found,
        lambda key: signals.states(key, train),
        k,
        seed,
        progress=progress,
    )


if __name__ == "__main__":
    main(ProbeConfig, run, plan=plan, then="open {output}/geometry.html, then python -m jobs.train")
