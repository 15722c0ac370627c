"""Predictions of the prefill router and its baselines, on a test split and on perturbed prompts.

In: a router, joined signals and the split on which the router was fitted; for perturbed prompts also these prompts
(perturb.py) and their activations. Out: `Predictions` or `Perturbed`, from which all figures are computed. Fits the
baselines on the training part, with the router's folds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.metrics.predictions import MedianCosts, Predictions, RouterPredictions
from prefill_router.metrics.robustness import Perturbed
from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations
from prefill_router.routing.cost import CostModel
from prefill_router.routing.fit import best_lambda
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.policy import TrainingMeans, training_means
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import (
    UNIFIED_GRID,
    FittedBaseline,
    best_single,
    category_prior,
    knn_vote,
    unified_mlp,
)
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey

PREFILL, BEST_SINGLE = "prefill", "best_single"


def predict_test(
    router: Router,
    signals: Signals,
    split: Split,
    *,
    baselines: bool = True,
    progress: bool = False,
    tuned: Mapping[str, FittedBaseline] | None = None,
) -> tuple[Predictions, dict[str, FittedBaseline]]:
    """Confidences of every router on the test queries, and the fitted baselines (none if `baselines` is False).

    `tuned`: baselines of another split, whose settings the unified MLP uses instead of tuning its own. Costs are
    estimates in USD by the router's cost model, Eq. 2 of docs/equations.md. Raises InputError if the signals lack an
    encoder of the router.
    """
    outcomes, test = signals.outcomes, split.test
    check_encoders(router, signals.activations)
    n_tokens = signals.n_tokens[router.counting_encoder]
    features = router.features(signals.states)
    p, _ = router.confidences(features)
    output_tokens = router.output_tokens(features)
    bonus = 0.0 if router.margin is None else router.margin.bonus
    routers = {PREFILL: RouterPredictions(p[test], router.chosen_lambda, margin_bonus=bonus)}
    fitted: dict[str, FittedBaseline] = {}
    if baselines:
        seed = int(router.manifest["fit"]["seed"])
        grid = [tuned["unified_mlp"].settings] if tuned else UNIFIED_GRID
        folds = make_folds(outcomes, split.train, seed, N_FOLDS)
        states = signals.states(signals.final_layer())
        fitted = {
            "category_prior": category_prior(outcomes, split.train, folds),
            "knn": knn_vote(outcomes, split.train, folds, states),
            "unified_mlp": unified_mlp(outcomes, split.train, folds, states, seed, progress, grid),
            BEST_SINGLE: best_single(outcomes, split.train, folds),
        }
        for name, baseline in fitted.items():
            lam = 0.0  # at any other lambda the cost of a query decides between models
            if name != BEST_SINGLE:
                lam = best_lambda(
                    baseline.held_out_p, outcomes, split.train, router.costs, n_tokens, output_tokens=output_tokens
                )
            routers[name] = RouterPredictions(baseline.p[test], lam)
    cost = _estimate(router.costs, outcomes, test, n_tokens, output_tokens)
    predictions = Predictions(
        outcomes.query_ids[test],
        outcomes.benchmarks[test],
        outcomes.groups[test],
        outcomes.models,
        outcomes.correct[test],
        cost,
        router.costs.normalise(cost),
        routers,
        means_of(outcomes, split.train, router.costs, n_tokens, output_tokens),
        None if output_tokens is None else _median_costs(router.costs, outcomes, split, n_tokens),
    )
    return predictions, fitted


def _median_costs(
    costs: CostModel, outcomes: Outcomes, split: Split, n_tokens: Int[np.ndarray, " queries"]
) -> MedianCosts:
    cost = _estimate(costs, outcomes, split.test, n_tokens, None)
    return MedianCosts(cost, costs.normalise(cost), means_of(outcomes, split.train, costs, n_tokens).cost_norm)


def means_of(
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    costs: CostModel,
    n_tokens: Int[np.ndarray, " queries"],
    output_tokens: Float[np.ndarray, "queries models"] | None = None,
) -> TrainingMeans:
    """Mean accuracy and mean normalised cost of each model on the training queries.

    `n_tokens` are the encoder's token counts of all queries, `output_tokens` their expected output tokens; None: the
    models' medians.
    """
    cost = _estimate(costs, outcomes, train, n_tokens, output_tokens)
    return training_means(outcomes.correct[train], costs.normalise(cost))


def _estimate(
    costs: CostModel,
    outcomes: Outcomes,
    rows: Int[np.ndarray, " rows"],
    n_tokens: Int[np.ndarray, " queries"],
    output_tokens: Float[np.ndarray, "queries models"] | None,
) -> Float[np.ndarray, "rows models"]:
    """Estimated costs of the queries `rows` in USD, Eq. 2."""
    expected = None if output_tokens is None else output_tokens[rows]
    return costs.estimate(n_tokens[rows], outcomes.input_tokens[rows], outcomes.prompt_bytes[rows], expected)


def encoders_to_run(router: Router, signals: Signals, baselines: bool) -> dict[str, EncoderConfig]:
    """By fingerprint: encoder configurations to encode new prompts for the router and, if asked, the baselines.

    They compute only the layers and poolings that are read: the router's, and the final layer for the baselines.
    """
    configs = dict(router.encoders)
    if baselines:
        final = signals.final_layer()
        wanted = [final, *(key for key in router.layer_keys if key.encoder == final.encoder)]
        configs[final.encoder] = signals.encoders[final.encoder].model_copy(
            update={
                "device": "auto",
                "layers": tuple(sorted({key.layer for key in wanted})),
                "poolings": tuple(sorted({key.pooling for key in wanted})),
            }
        )
    return configs


def predict_perturbed(
    router: Router,
    fitted: Mapping[str, FittedBaseline],
    signals: Signals,
    prompts: pa.Table,
    activations: Mapping[str, Activations],
) -> Perturbed:
    """Confidences of every router on perturbed prompts.

    Leaves out prompts that could not be encoded, and prompts with the same tokens as the original, which are counted in
    `Perturbed.same_tokens`. `prompts`: the table that `perturb` returned. `activations`: datasets of these prompts, by
    fingerprint. `signals`: the signals on which the baselines were fitted. Raises InputError for a missing encoder or
    column, an unknown source query, activations of other prompts, or if no prompt is left.
    """
    check_encoders(router, activations)
    known = set(signals.outcomes.query_ids)
    if unknown := [source for source in prompts.column("source").to_pylist() if source not in known]:
        raise InputError(
            f"perturbed prompts: source {unknown[0]!r} is not a query of the outcomes; perturb prompts of the outcomes"
        )
    table = prompts
    for dataset in activations.values():
        failed = dataset.errors().column("query_id").combine_chunks()
        table = table.filter(pc.invert(pc.is_in(table.column("query_id"), failed)))
    if not table.num_rows:
        raise InputError(f"perturbed prompts: none of {prompts.num_rows:,} could be encoded; see the column 'error'")
    table, same_tokens = _changed(table, signals, activations)
    if not table.num_rows:
        raise InputError(
            f"perturbed prompts: all {prompts.num_rows:,} have the same tokens as the originals; perturb "
            "more queries, or use other perturbations"
        )
    ids = table.column("query_id").to_pylist()
    digests = [prompt_digest(prompt) for prompt in table.column("prompt").to_pylist()]

    def states(key: LayerKey) -> np.ndarray:
        if key.encoder not in activations:
            raise InputError(
                f"activations: the baselines need encoder {key.encoder}, got "
                f"{', '.join(activations) or 'none'}; encode the perturbed prompts with it too"
            )
        return activations[key.encoder].states(key.column, ids, digests)

    p = {PREFILL: router.confidences(router.features(states))[0]}
    sources = np.asarray(table.column("source").to_pylist(), dtype=object)
    if fitted:
        of_query = dict(zip(signals.outcomes.query_ids, signals.outcomes.benchmarks, strict=True))
        benchmarks = np.asarray([of_query[source] for source in sources], dtype=object)
        final = states(signals.final_layer())
        p |= {name: baseline.predict(benchmarks, final) for name, baseline in fitted.items()}
    return Perturbed(
        sources,
        np.asarray(table.column("perturbation").to_pylist(), dtype=object),
        signals.outcomes.models,
        p,
        same_tokens,
    )


def _changed(
    table: pa.Table, signals: Signals, activations: Mapping[str, Activations]
) -> tuple[pa.Table, dict[str, int]]:
    """The prompts whose tokens differ from the original's for some encoder, and the number of others by perturbation.

    The tokens can be the same because a tokenizer is uncased, or because truncation cuts off the change.
    """
    same = np.ones(table.num_rows, dtype=bool)
    for fingerprint, dataset in activations.items():
        before = signals.activations[fingerprint].tokens_digests(table.column("source").to_pylist())
        after = dataset.tokens_digests(table.column("query_id").to_pylist())
        same &= np.asarray(before, dtype=object) == np.asarray(after, dtype=object)
    kinds = np.asarray(table.column("perturbation").to_pylist(), dtype=object)
    return table.filter(pa.array(~same)), {name: int(same[kinds == name].sum()) for name in dict.fromkeys(kinds)}


def check_encoders(router: Router, activations: Mapping[str, Activations]) -> None:
    """Raises InputError if the activations lack an encoder of the router."""
    if missing := [name for name in router.encoders if name not in activations]:
        raise InputError(
            f"activations: the checkpoint reads encoder {missing[0]}, got "
            f"{', '.join(activations) or 'none'}; run jobs.prefill with the encoder of the checkpoint"
        )
