"""The prefill router and its baselines on one test split, and on other wordings of its prompts.

In: a router, joined signals, the split it was fitted on; for the wordings their prompts (perturb.py) and activations.
Out: `Predictions` or `Perturbed`, the input of every figure. The baselines are fitted here, on the training part
alone, with the router's own folds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefill_router.errors import InputError
from prefill_router.files import prompt_digest
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.metrics.robustness import Perturbed
from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations
from prefill_router.routing.fit import N_FOLDS, best_lambda
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import UNIFIED_GRID, FittedBaseline, category_prior, knn_vote, unified_mlp
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey

PREFILL = "prefill"


def predict_test(
    router: Router,
    signals: Signals,
    split: Split,
    *,
    baselines: bool = True,
    progress: bool = False,
    tuned: Mapping[str, FittedBaseline] | None = None,
) -> tuple[Predictions, dict[str, FittedBaseline]]:
    """Confidences of every router on the test queries, and the fitted baselines, none without `baselines`.

    With `tuned`, baselines of another split, the MLP takes their settings instead of searching for its own. Est.
    costs by the router's cost model, Eq. 2. Raises InputError where the router's encoder is not among the signals.
    """
    outcomes, test = signals.outcomes, split.test
    _check_encoders(router, signals.activations)
    n_tokens = signals.n_tokens[router.counting_encoder]
    p, _ = router.confidences(router.features(signals.states))
    routers = {PREFILL: RouterPredictions(p[test], router.chosen_lambda)}
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
        }
        for name, baseline in fitted.items():
            lam = best_lambda(baseline.held_out_p, outcomes, split.train, router.costs, n_tokens)
            routers[name] = RouterPredictions(baseline.p[test], lam)
    cost = router.costs.estimate(n_tokens[test], outcomes.input_tokens[test])
    predictions = Predictions(
        outcomes.query_ids[test],
        outcomes.benchmarks[test],
        outcomes.groups[test],
        outcomes.models,
        outcomes.correct[test],
        cost,
        router.costs.normalise(cost),
        routers,
    )
    return predictions, fitted


def encoders_to_run(router: Router, signals: Signals, baselines: bool) -> dict[str, EncoderConfig]:
    """By fingerprint, how to encode other prompts for the router, and for the baselines where they are asked for.

    Nothing above the highest layer read is run: without baselines that is the router's own.
    """
    configs = dict(router.encoders)
    if baselines:
        final = signals.final_layer()
        read = [final, *(key for key in router.layer_keys if key.encoder == final.encoder)]
        configs[final.encoder] = signals.encoders[final.encoder].model_copy(
            update={
                "device": "auto",
                "layers": tuple(sorted({key.layer for key in read})),
                "poolings": tuple(sorted({key.pooling for key in read})),
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

    Those that could not be encoded are left out, and so, counted, are those that become the tokens of the original.

    `prompts` is what `perturb` returned, `activations` the datasets made of it, by fingerprint, `signals` what the
    baselines were fitted on. Raises InputError for a missing encoder or column, a source query that the signals do not
    have, activations of other prompts, or nothing left.
    """
    _check_encoders(router, activations)
    known = set(signals.outcomes.query_ids)
    if strange := [source for source in prompts.column("source").to_pylist() if source not in known]:
        raise InputError(f"perturbed prompts: source {strange[0]!r} is not a query of the outcomes; perturb theirs")
    table = prompts
    for dataset in activations.values():
        failed = dataset.errors().column("query_id").combine_chunks()
        table = table.filter(pc.invert(pc.is_in(table.column("query_id"), failed)))
    if not table.num_rows:
        raise InputError(f"perturbed prompts: none of {prompts.num_rows:,} could be encoded; see the column 'error'")
    table, same_tokens = _reworded(table, signals, activations)
    if not table.num_rows:
        raise InputError(
            f"perturbed prompts: all {prompts.num_rows:,} become the tokens of the originals; there is "
            "nothing to judge: perturb more queries, or in other ways"
        )
    ids = table.column("query_id").to_pylist()
    digests = [prompt_digest(prompt) for prompt in table.column("prompt").to_pylist()]

    def states(key: LayerKey) -> np.ndarray:
        if key.encoder not in activations:
            raise InputError(
                f"activations: the baselines read encoder {key.encoder}, given are "
                f"{', '.join(activations)}; encode the perturbed prompts with it too"
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


def _reworded(
    table: pa.Table, signals: Signals, activations: Mapping[str, Activations]
) -> tuple[pa.Table, dict[str, int]]:
    """The prompts that some encoder reads as other tokens than the original, and per perturbation how many none does.

    An uncased tokenizer does not see a change of case, and truncation may cut off what was changed.
    """
    same = np.ones(table.num_rows, dtype=bool)
    for fingerprint, dataset in activations.items():
        before = signals.activations[fingerprint].tokens_digests(table.column("source").to_pylist())
        after = dataset.tokens_digests(table.column("query_id").to_pylist())
        same &= np.asarray(before, dtype=object) == np.asarray(after, dtype=object)
    kinds = np.asarray(table.column("perturbation").to_pylist(), dtype=object)
    return table.filter(pa.array(~same)), {name: int(same[kinds == name].sum()) for name in dict.fromkeys(kinds)}


def _check_encoders(router: Router, activations: Mapping[str, Activations]) -> None:
    if missing := [name for name in router.encoders if name not in activations]:
        raise InputError(
            f"activations: the checkpoint reads encoder {missing[0]}, given are "
            f"{', '.join(activations)}; prefill with the encoder that the checkpoint names"
        )
