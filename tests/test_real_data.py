"""The pools of the results on the real outcomes of PREFILL_ROUTER_DATA; skipped without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefill_router.experiments.predict import means_of
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import Outcomes, load_outcomes
from prefill_router.pool import Pool, load_pool
from prefill_router.routing.cost import fit_costs
from prefill_router.semantic.baselines import best_single, category_prior

POOLS = {  # folder of the outcomes, queries, models, benchmarks
    "mmlu_mixed": ("mmlu_pro", 12_025, 9, 14),
    "mmlu_small": ("mmlu_pro", 12_020, 8, 14),
    "zk_mixed": ("zeroeval_korbench", 4_090, 19, 8),
    "rg_mixed": ("reasoning_gym", 10_050, 9, 101),
}


def load(data_dir: Path, name: str) -> tuple[Outcomes, Pool]:
    table, file = data_dir / POOLS[name][0] / "outcomes.parquet", data_dir / "pools" / f"{name}.yaml"
    for path in (table, file):
        if not path.is_file():
            pytest.skip(f"no real data at {path}; set PREFILL_ROUTER_DATA to a folder that has it")
    pool = load_pool(file)
    return load_outcomes(table, pool), pool


@pytest.fixture(scope="module")
def rg_mixed(data_dir: Path) -> tuple[Outcomes, Pool]:
    return load(data_dir, "rg_mixed")


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_of_the_results_has_its_queries_models_and_benchmarks(data_dir: Path, pool: str):
    outcomes, _ = load(data_dir, pool)
    assert (len(outcomes), len(outcomes.models), len(set(outcomes.benchmarks))) == POOLS[pool][1:]
    assert outcomes.complete.mean() > 0.9


def test_equal_prompts_of_rg_mixed_stay_in_one_part_and_every_family_is_tested(rg_mixed):
    rg, _ = rg_mixed
    split = split_queries(rg, 0, "75/10/15")
    parts = {name: {rg.prompts[q] for q in vars(split)[name]} for name in ("train", "calibration", "test")}
    assert len(set(rg.prompts)) == 9_472 == sum(map(len, parts.values()))
    assert set(rg.benchmarks[split.train]) == set(rg.benchmarks[split.test]) == set(rg.benchmarks)


def test_the_category_prior_of_rg_mixed_beats_the_best_single_model(rg_mixed):
    rg, pool = rg_mixed
    split = split_queries(rg, 0)
    folds = make_folds(rg, split.train, 0, 5)
    n_tokens = np.full(len(rg), 300)
    costs = fit_costs(pool, rg, split.train, n_tokens)
    fitted = {
        "category_prior": category_prior(rg, split.train, folds),
        "best_single": best_single(rg, split.train, folds),
    }
    test = split.test
    cost = costs.estimate(n_tokens[test], rg.input_tokens[test], rg.prompt_bytes[test])
    predictions = Predictions(
        rg.query_ids[test],
        rg.benchmarks[test],
        rg.groups[test],
        rg.models,
        rg.correct[test],
        cost,
        costs.normalise(cost),
        {name: RouterPredictions(found.p[test], 0.0) for name, found in fitted.items()},
        means_of(rg, split.train, costs, n_tokens),
    )
    metrics = evaluate(predictions, n_resamples=50)
    assert metrics["routers"]["category_prior"]["auc"]["lower"] > 0.85
    assert metrics["routers"]["category_prior"]["utility_over_best_static"]["0"]["lower"] > 0
    assert metrics["pool"]["best_static"]["0"]["model"] == "openai_o3-mini"
