"""The calibration suite: each map by its definition, the choice on queries that no map has seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from prefill_router.semantic.calibrators import SUITE, choose, fit_map

RNG = np.random.default_rng(0)
TRUE = expit(RNG.normal(size=(900, 2)))
CORRECT = (RNG.random(TRUE.shape) < TRUE).astype(float)
CORRECT[::7, 1] = np.nan
FOLDS = np.arange(900) % 5


@pytest.mark.parametrize("name", SUITE)
def test_every_map_keeps_the_order_of_queries_and_stays_a_probability(name: str):
    p = fit_map(name, TRUE[:400], CORRECT[:400])(TRUE)
    assert ((p >= 0) & (p <= 1)).all()
    for model in range(2):
        assert (np.diff(p[np.argsort(TRUE[:, model]), model]) >= -1e-12).all()


def test_percentile_is_the_rank_among_the_calibration_queries():
    p = fit_map("percentile", TRUE, CORRECT)(TRUE)
    np.testing.assert_allclose(p, rankdata(TRUE, axis=0) / 901)
    assert (fit_map("percentile", np.full((5, 2), 0.3), CORRECT[:5])(np.full((1, 2), 0.3)) == 0.5).all()


def test_zscore_is_the_normal_distribution_function_of_the_logits_zscore():
    logits = logit(TRUE)
    expected = norm.cdf((logits - logits.mean(axis=0)) / logits.std(axis=0))
    np.testing.assert_allclose(fit_map("zscore", TRUE, CORRECT)(TRUE), expected)


def test_what_is_calibrated_is_left_alone_and_what_is_not_is_mended():
    assert choose(TRUE, CORRECT, FOLDS)[0] in ("none", "pooled", "platt")
    chosen, figures = choose(expit(4 * logit(TRUE) + 2), CORRECT, FOLDS)
    assert chosen in ("pooled", "platt")
    assert figures["platt"]["brier"] < figures["none"]["brier"] - 0.03
    bent = np.where(TRUE > 0.5, 0.9 + TRUE / 20, TRUE / 20)  # a step, which no line in the logit can fit
    chosen, figures = choose(bent, CORRECT, FOLDS)
    assert chosen == "isotonic"
    assert set(figures) == set(SUITE)
