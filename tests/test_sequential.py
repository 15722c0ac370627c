"""The sequential test of two means: the mixture, the minimum over a null hypothesis, and its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from prefill_router.metrics.sequential import PRIOR, Sample, log_evidence, log_mixture, verdict


def one(value: float) -> np.ndarray:
    return np.array([float(value)])


@pytest.mark.parametrize(("n", "total", "mean"), [(0, 0, 0.3), (7, 7, 0.2), (40, 3, 0.1), (25, 11.5, 0.6)])
def test_the_mixture_is_the_mean_likelihood_ratio_over_the_prior(n: int, total: float, mean: float) -> None:
    def ratio(theta: float) -> float:
        likelihoods = (theta / mean) ** total * ((1 - theta) / (1 - mean)) ** (n - total)
        return float(likelihoods * beta.pdf(theta, PRIOR, PRIOR))

    expected = quad(ratio, 0, 1)[0]
    assert log_mixture(one(n), one(total), one(mean))[0] == pytest.approx(math.log(expected), abs=1e-5)


COUNTS = [(200, 4, 12, 9), (50, 20.5, 400, 190), (30, 0, 5, 5), (60, 60, 9, 9), (80, 9, 80, 7)]


@pytest.mark.parametrize("margin", [-0.05, 0.0, 0.1])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_evidence_is_the_minimum_over_the_null_hypothesis(
    counts: tuple[int, float, int, float], margin: float
) -> None:
    live_n, live_total, n, total = counts
    grid = np.linspace(0, 1, 501).clip(1e-9, 1 - 1e-9)
    p, q = np.meshgrid(grid, grid, indexing="ij")
    zero = 0 * p
    joint = log_mixture(live_n + zero, live_total + zero, p) + log_mixture(n + zero, total + zero, q)
    expected = joint[q - p <= margin + 1e-8].min()
    found = log_evidence(one(live_n), one(live_total), one(n), one(total), margin)[0]
    assert found == pytest.approx(expected, abs=0.1)  # the grid has few points near 0 and 1


def test_at_most_alpha_of_equal_streams_ever_break_or_heal_at_the_margin() -> None:
    generator, alpha, looks = np.random.default_rng(0), 0.05, 100
    for margin, live_mean, mean in ((0.02, 0.05, 0.07), (0.05, 0.3, 0.35)):  # the worst case of both hypotheses
        live_n, n = np.meshgrid(90.0 * np.arange(1, looks + 1), np.ones(400))[0], 10.0 * np.arange(1, looks + 1)
        live = generator.binomial(90, live_mean, (400, looks)).cumsum(1).astype(float)
        canary = generator.binomial(10, mean, (400, looks)).cumsum(1).astype(float)
        broken = log_evidence(live_n, live, n + 0 * canary, canary, margin).max(1) >= math.log(1 / alpha)
        healthy = log_evidence(live_n, live_n - live, n + 0 * canary, n - canary, -margin).max(1) >= math.log(1 / alpha)
        assert broken.mean() <= alpha
        assert healthy.mean() <= alpha


def test_a_broken_canary_is_found_within_few_outcomes_and_a_healthy_one_later() -> None:
    live = Sample(300, 3.0)
    assert verdict(live, Sample(4, 4.0), 0.02, 0.0125) == "broken"
    assert verdict(live, Sample(), 0.02, 0.0125) == verdict(Sample(), Sample(4, 4.0), 0.02, 0.0125) == "undecided"
    assert verdict(Sample(5000, 50.0), Sample(2000, 20.0), 0.02, 0.0125) == "healthy"
    assert verdict(Sample(5000, 50.0), Sample(40, 1.0), 0.02, 0.0125) == "undecided"
