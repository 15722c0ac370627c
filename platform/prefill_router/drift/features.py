"""Feature test: PCA features of recent prompts of a log against those of the test queries or of earlier prompts.

In: traffic, a router, activations datasets. Out: `EnergyTest`, or the reason why there is none. The features are the
input of the trunk, [queries, features] (docs/equations.md, Eq. 1). Rows that the encoder cannot read are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from prefill_router.controller import LocalRouter
from prefill_router.drift.energy import EnergyTest, energy_test
from prefill_router.drift.traffic import Traffic
from prefill_router.errors import InputError
from prefill_router.prefill.dataset import as_float32, list_values, read_activations
from prefill_router.routing.router import Router
from prefill_router.signals.layer_key import LayerKey, LayerStates

BATCH = 32  # prompts that are encoded at once
MIN_PROMPTS = 50


def feature_test(
    traffic: Traffic,
    router: Router,
    folders: Sequence[Path],
    query_ids: Sequence[str] | None,
    n: int,
    recent: int,
    baseline: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> EnergyTest | str:
    """The energy test of the last `recent` decisions, on at most `n` prompts and 2 `n` reference queries.

    `folders`: activations datasets with the reference queries `query_ids`, which the fit of the projections must not
    have read: those of an evaluation's test split. With a `baseline`, its prompts are the reference. Returns the reason
    if there is nothing to compare.
    """
    live = [one for one in traffic.decisions.prompts[baseline:][-recent:] if one is not None]
    before = [one for one in traffic.decisions.prompts[:baseline] if one is not None]
    if len(live) < MIN_PROMPTS:
        return f"the log has {len(live):,} recent prompts, {MIN_PROMPTS} are needed (gateway.log.prompts)"
    if baseline and len(before) < MIN_PROMPTS:
        return f"the log has {len(before):,} prompts of the baseline, {MIN_PROMPTS} are needed (gateway.log.prompts)"
    if baseline:
        reference = prompt_features(router, before, 2 * n, seed, progress)
    elif not folders or query_ids is None:
        return "the test queries of an evaluation and their activations are needed"
    else:
        reference = dataset_features(router, folders, query_ids, 2 * n, seed)
    features = prompt_features(router, live, n, seed, progress)
    if min(len(reference), len(features)) < MIN_PROMPTS:
        return f"the encoder reads {min(len(reference), len(features)):,} of the prompts, {MIN_PROMPTS} are needed"
    return energy_test(reference, features, seed)


def dataset_features(
    router: Router, folders: Sequence[Path], query_ids: Sequence[str], n: int, seed: int = 0
) -> Float[np.ndarray, "queries features"]:
    """Features of at most `n` random queries of `query_ids`. Raises InputError if a query or an encoder is missing."""
    return _features(router, _rows(router, folders, sample(query_ids, n, seed)))


def prompt_features(
    router: Router, prompts: Sequence[str], n: int, seed: int = 0, progress: bool = False
) -> Float[np.ndarray, "queries features"]:
    """Features of at most `n` random prompts, from the router's encoders. Raises InputError as `load_encoder` does."""
    chosen = sample(prompts, n, seed)
    starts: Iterable[int] = range(0, len(chosen), BATCH)
    if progress:
        from prefill_router.progress import tqdm

        starts = tqdm(starts, desc="encoding prompts of the log", unit=f" batches of {BATCH}")
    with LocalRouter(router) as local:
        parts = [_features(router, local.encode(chosen[start : start + BATCH])) for start in starts]
    return np.concatenate(parts)


def reference_novelty(
    router: Router, folders: Sequence[Path], query_ids: Sequence[str] | None
) -> Float[np.ndarray, " queries"] | int | None:
    """Novelty of the test queries `query_ids`, from their activations.

    Without these, the number of held-out training queries; None for a router without novelty.
    """
    if router.novelty is None:
        return None
    if not folders or query_ids is None:
        return len(router.novelty.held_out)
    states = _states(_rows(router, folders, query_ids))
    return router.novelty([states(key) for key in router.layer_keys], router.projections)


def sample(values: Sequence[str], n: int, seed: int) -> list[str]:
    """At most `n` of the values, drawn without replacement, in their order."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(values))[:n])
    return [values[at] for at in chosen.tolist()]


def _rows(router: Router, folders: Sequence[Path], query_ids: Sequence[str]) -> dict[str, pa.Table]:
    datasets = {one.fingerprint: one for one in map(read_activations, folders)}
    if missing := sorted(set(router.encoders) - set(datasets)):
        raise InputError(
            f"activations: the router reads encoder {missing[0]}, got {', '.join(datasets) or 'none'}; give the "
            "activations of its training"
        )
    return {name: datasets[name].rows(query_ids) for name in router.encoders}


def _features(router: Router, rows: Mapping[str, pa.Table]) -> Float[np.ndarray, "queries features"]:
    states = _states(rows)
    if not len(states(router.layer_keys[0])):
        return np.zeros((0, sum(one.components.shape[1] for one in router.projections)), np.float32)
    return router.features(states)


def _states(rows: Mapping[str, pa.Table]) -> LayerStates:
    """The states of the rows without an error in any encoder."""
    fine = pa.array(np.all([pc.is_null(table.column("error")).to_numpy() for table in rows.values()], axis=0))

    @cache
    def states(key: LayerKey) -> np.ndarray:
        column = rows[key.encoder].column(key.column).filter(fine)
        width = column.type.list_size
        return as_float32(list_values(column, width)) if len(column) else np.zeros((0, width), np.float32)

    return states
