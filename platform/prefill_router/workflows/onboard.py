"""Onboarding of a new model: labelled queries and a checkpoint in, a checkpoint with one more model out.

Writes OUTPUT/checkpoint, OUTPUT/onboard.json, OUTPUT/held_out.parquet and OUTPUT/onboard.html. The trunk is not trained
and the other models keep their confidences bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from threadpoolctl import threadpool_limits

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.experiments.onboarding import (
    Curve,
    HeldOut,
    Rule,
    held_out,
    labels_curve,
    missing_evidence,
    smoothed_rate,
)
from prefill_router.files import write_json, write_parquet
from prefill_router.outcomes.splits import make_folds
from prefill_router.outcomes.table import Outcomes, load_outcomes
from prefill_router.pool import Pool, TargetModel, load_pool
from prefill_router.prefill.dataset import read_activations
from prefill_router.progress import tqdm
from prefill_router.registry.versions import at_hand
from prefill_router.reports.onboarding import write_onboarding_page
from prefill_router.routing.added import HeadInputs
from prefill_router.routing.checkpoint import check_place, load_checkpoint, save_checkpoint
from prefill_router.routing.onboarding import CANDIDATES, Candidate, Fitted, Material, TrunkRows, fit_head
from prefill_router.routing.repool import NewTarget, add_model, check_new
from prefill_router.routing.router import Router
from prefill_router.signals.join import Signals, join
from prefill_router.version import code_version
from prefill_router.workflows.inputs import SignalsConfig

FEWEST = 10  # labelled queries
Offer = Literal["auto", "candidate", "fallback"]


class OnboardConfig(SignalsConfig):
    """The checkpoint, the new model with its labelled queries, and the evidence that it needs."""

    checkpoint: Annotated[str, Field(min_length=1, description="checkpoint folder or registry URI to start from")]
    model: Annotated[str, Field(min_length=1, description="name of the new model in outcomes and pool")]
    heads: Annotated[
        tuple[Candidate, ...],
        Field(min_length=1, description="kinds of heads, of which the evidence chooses: constant, targets, hidden"),
    ] = CANDIDATES
    bags: Annotated[
        int, Field(ge=0, le=50, description="bootstrap samples on which heads are fitted and averaged; 0: none")
    ] = 0
    offer: Annotated[
        Offer,
        Field(description="auto: by the evidence; candidate: chosen by score; fallback: by name and as fallback only"),
    ] = "auto"
    least_labels: Annotated[int, Field(ge=FEWEST, description="fewest labelled queries of a head that decides")] = 50
    least_of_each: Annotated[
        int, Field(ge=1, description="fewest right and fewest wrong answers of a head that decides")
    ] = 5
    folds: Annotated[int, Field(ge=2, le=20, description="folds of the held-out figures")] = 5
    draws: Annotated[int, Field(ge=2, description="subsamples of each size in the curve")] = 10
    seed: Annotated[int, Field(ge=0, description="seed of folds, subsamples and bootstrap")] = 0


def plan(config: OnboardConfig) -> list[str]:
    """What a dry run says: the labels of the new model. Raises InputError as `run` does. Asks no registry."""
    folder, place = at_hand(config.checkpoint), config.output / "checkpoint"
    check_place(place)
    source = f"{config.checkpoint}, for which the registry is not asked now"
    if folder is not None:
        router = load_checkpoint(folder)
        check_new(router, config.model)
        source = f"checkpoint {router.id}"
    model = new_model(load_pool(config.pool), config.model)
    labels = len(labelled_signals(config, model).outcomes)
    return [
        f"writes checkpoint: {place}: {source} with {model.name}, from {labels:,} labelled queries",
        f"costs nothing but the time of this machine: {len(config.heads)} heads in {config.folds} folds and the curve",
    ]


def run(config: OnboardConfig) -> str:
    """Add a model to a checkpoint from labelled queries, without training again; write OUTPUT/checkpoint."""
    folder = config.output / "checkpoint"
    check_place(folder)
    router = load_checkpoint(registry.resolve(config.checkpoint))
    check_new(router, config.model)
    model = new_model(load_pool(config.pool), config.model)
    signals = labelled_signals(config, model)
    outcomes, correct = signals.outcomes, signals.outcomes.correct[:, 0].astype(np.float64)
    print(f"{len(outcomes):,} labelled queries of {model.name}, {int(correct.sum()):,} right", flush=True)
    material = material_of(router, signals)
    every = np.arange(len(outcomes))
    folds = make_folds(outcomes, every, config.seed, config.folds)
    with threadpool_limits(1):  # the matrices are small: threads would wait for each other
        found = held_out(material, correct, outcomes.groups, folds, config.heads, config.bags, config.seed)
        rule = Rule(config.least_labels, config.least_of_each)
        missing = missing_evidence(rule, correct, found)
        fitted = fit_head(material, config.heads, config.bags, config.seed)
        fallback_only = missing is not None if config.offer == "auto" else config.offer == "fallback"
        progress = partial(tqdm, desc="labels needed", unit=" sizes", leave=False)
        how = (config.heads, config.bags, config.seed)
        curve = labels_curve(material, correct, outcomes.groups, found, rule, config.draws, *how, progress)
    record = record_of(config, signals, fitted, found, missing, fallback_only, curve)
    if fallback_only:
        model = model.model_copy(update={"fallback_only": True})
    new = target_of(router, signals, model, fitted)
    changed = save_checkpoint(add_model(router, new, record), folder)
    written = {"model": model.name, "from": router.id, "checkpoint": changed.id, **record}
    write_json(config.output / "onboard.json", written)
    write_parquet(config.output / "held_out.parquet", held_out_table(outcomes, found))
    page = write_onboarding_page(config.output, written, found, correct, curve)
    offered = "offered as fallback only" if fallback_only else "a candidate"
    auc, gain = found.auc.estimate, found.gain
    return (
        f"checkpoint {changed.id} in {folder}: {model.name} is {offered}{f' ({missing})' if missing else ''}; head "
        f"{fitted.candidate}, held-out AUC {'undefined' if auc is None else f'{auc:.3f}'}, Brier score "
        f"{found.brier.estimate:.4f}, {gain.estimate:+.4f} [{gain.lower:+.4f}, {gain.upper:+.4f}] below that of the "
        f"rate; page: {page}"
    )


def new_model(pool: Pool, name: str) -> TargetModel:
    """The entry of the new model. Raises InputError if the pool does not have it."""
    (at,) = pool.indices([name])
    return pool.models[at]


def labelled_signals(config: OnboardConfig, model: TargetModel) -> Signals:
    """The labelled queries of the new model with their states.

    Raises InputError if they are fewer than FEWEST or record no output length, and as the readers and `join` do.
    """
    outcomes = load_outcomes(config.outcomes, Pool(models=(model,)))
    outcomes = outcomes.take(np.flatnonzero(outcomes.labelled[:, 0]))
    if len(outcomes) < FEWEST:
        raise InputError(
            f"outcomes: {len(outcomes)} labelled queries of {model.name}, at least {FEWEST} are needed; add labels"
        )
    if np.isnan(outcomes.output_tokens).all():
        raise InputError(
            f"outcomes: column 'output_tokens' is empty for {model.name}; costs need their median: record output "
            "lengths"
        )
    return join(outcomes, [read_activations(folder) for folder in config.activations])


def material_of(router: Router, signals: Signals) -> Material:
    """What heads read of the queries, and whether each answer is right, as the trained targets are calibrated."""
    features = router.features(signals.states)
    hidden = router.ensemble.hidden(features)
    trained, _ = router.trained_confidences(hidden, features)
    return Material(
        HeadInputs.of(hidden, trained), signals.outcomes.correct[:, 0].astype(np.float64), TrunkRows.of(router.ensemble)
    )


def target_of(router: Router, signals: Signals, model: TargetModel, fitted: Fitted) -> NewTarget:
    """The model to add, with its means over the labelled queries."""
    outcomes = signals.outcomes
    n_tokens = signals.n_tokens[router.counting_encoder].astype(np.float64)
    recorded = outcomes.input_tokens[:, 0].astype(np.float64)
    known = ~np.isnan(recorded)
    ratio = float((recorded[known] / np.maximum(n_tokens[known], 1)).mean()) if known.any() else 1.0
    return NewTarget(
        model=model,
        head=fitted.head,
        accuracy=smoothed_rate(outcomes.correct[:, 0].astype(np.float64)),
        median_output=float(np.nanmedian(outcomes.output_tokens)),
        token_ratio=ratio,
        mean_input=float(np.where(known, recorded, n_tokens * ratio).mean()),
    )


def record_of(
    config: OnboardConfig,
    signals: Signals,
    fitted: Fitted,
    found: HeldOut,
    missing: str | None,
    fallback_only: bool,
    curve: Curve | None,
) -> dict[str, Any]:
    """What the manifest records of the onboarding."""
    correct = signals.outcomes.correct[:, 0]
    return {
        "labels": len(correct),
        "right": int((correct == 1).sum()),
        "head": fitted.candidate,
        "prior": list(fitted.spread),
        "log_evidence": dict(fitted.log_evidence),
        "held_out": found.figures,
        "fallback_only": fallback_only,
        "offer": config.offer,
        "missing_evidence": missing,
        "labels_needed": None if curve is None else curve.labels_needed,
        "rule": {"least_labels": config.least_labels, "least_of_each": config.least_of_each},
        "bags": config.bags,
        "seed": config.seed,
        "outcomes_digest": signals.outcomes.digest(),
        "activations_digest": signals.digest,
        "code_version": code_version(),
    }


def held_out_table(outcomes: Outcomes, found: HeldOut) -> pa.Table:
    """The held-out predictions: a row per labelled query."""
    return pa.table(
        {
            "query_id": pa.array(outcomes.query_ids, pa.string()),
            "group": pa.array(outcomes.groups, pa.string()),
            "p": found.p,
            "p_constant": found.rate,
            "correct": outcomes.correct[:, 0].astype(np.int8),
        }
    )
