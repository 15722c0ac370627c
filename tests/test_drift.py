"""Tests of drift: each statistic against a reference by hand, and the false alarm rates that are stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from prefill_router.drift.betting import NOVEL_SHARES, STAKES, START_EVERY, mean_factors, novelty_factors, wealth
from prefill_router.drift.energy import energy_test
from prefill_router.drift.psi import counts_in, index_of, of_counts, stability, uniform_stability
from prefill_router.drift.ranks import BLOCK, held_out_values, online_p_values

EDGES = np.linspace(0.1, 0.9, 9)


def test_the_stability_index_is_the_sum_by_hand():
    reference, live = np.array([30.0, 50.0, 20.0]), np.array([10.0, 60.0, 130.0])
    p, q = (reference + 0.5) / 101.5, (live + 0.5) / 201.5
    by_hand = sum((b - a) * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True))
    found = of_counts(reference, live, np.array([1.0, 2.0]))
    assert found.plain == pytest.approx(by_hand)
    assert found.bias == pytest.approx(2 * (1 / 100 + 1 / 200))
    assert found.estimate == pytest.approx(by_hand - 2 * (1 / 100 + 1 / 200))
    assert found.lower < found.estimate < found.upper


def test_without_drift_the_index_has_its_bias_as_mean_and_uniform_p_values():
    rng = np.random.default_rng(0)
    found = [stability(rng.normal(size=400), rng.normal(size=600), seed) for seed in range(150)]
    assert np.mean([one.plain for one in found]) == pytest.approx(found[0].bias, rel=0.1)
    assert np.mean([one.plain for one in found]) > 0.03  # which is close to a third of the customary bound
    assert kstest([one.p_value for one in found], "uniform").pvalue > 0.01


def test_the_interval_of_the_index_covers_the_index_of_the_distributions():
    p, q, rng = np.full(10, 0.1), np.array([0.06] * 5 + [0.14] * 5), np.random.default_rng(1)
    true = float(((q - p) * np.log(q / p)).sum())
    found = [of_counts(*(rng.multinomial(800, x).astype(float) for x in (p, q)), EDGES, s) for s in range(100)]
    covered = sum(one.lower <= true <= one.upper for one in found)
    assert covered >= binom.ppf(0.001, 100, 0.95)
    assert np.mean([one.estimate for one in found]) == pytest.approx(true, rel=0.1)


def test_equal_values_share_a_bin_and_an_empty_bin_gives_a_finite_index():
    reference, live = np.array([0.0] * 70 + [1.0] * 30), np.zeros(50)
    found = stability(reference, live)
    assert found.edges == (0.0, 1.0)
    assert np.isfinite(found.plain)
    assert stability(np.zeros(50), np.zeros(60)).estimate == 0
    assert counts_in(np.array([0.0, 0.5, 0.5, 2.0]), np.array([0.5, 1.0])).tolist() == [1, 2, 1]


def test_ranks_are_compared_with_the_uniform_distribution():
    even = uniform_stability((np.arange(1000) + 0.5) / 1000, 5000)
    assert even.observed == pytest.approx([0.1] * 10)
    assert even.plain == pytest.approx(0)
    assert float(index_of(np.full(10, 500.0), np.full(10, 100.0))) == pytest.approx(0)


def test_the_energy_coefficient_is_that_of_all_pairs():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 3)), rng.normal(0.8, size=(5, 3))

    def mean(a: np.ndarray, b: np.ndarray, own: bool) -> float:
        pairs = [np.linalg.norm(u - v) for i, u in enumerate(a) for j, v in enumerate(b) if not (own and i == j)]
        return float(np.mean(pairs))

    across = mean(x, y, False)
    by_hand = (2 * across - mean(x, x, True) - mean(y, y, True)) / (2 * across)
    assert energy_test(x, y).coefficient == pytest.approx(by_hand)
    assert energy_test(y, x).coefficient == pytest.approx(by_hand)


def test_the_p_value_of_the_energy_test_is_uniform_without_drift():
    rng = np.random.default_rng(3)
    found = [
        energy_test(rng.normal(size=(20, 2)), rng.normal(size=(15, 2)), seed, permutations=99) for seed in range(120)
    ]
    assert kstest([one.p_value for one in found], "uniform").pvalue > 0.01
    assert np.mean([one.coefficient for one in found]) == pytest.approx(0, abs=0.01)
    assert energy_test(rng.normal(size=(40, 2)), rng.normal(1.0, size=(30, 2))).p_value == 1 / 500


@given(st.lists(st.integers(0, 6), max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_an_online_p_value_counts_the_higher_and_the_equal_earlier_values(before: list[int], values: list[int]):
    reference, live = np.array(before, dtype=float) + 0.5, np.array(values, dtype=float)
    p, u = online_p_values(live, reference, 4), np.random.default_rng(4).random(len(live))
    for n, value in enumerate(live):
        earlier = [*reference, *live[:n]]
        higher, equal = sum(one > value for one in earlier), sum(one == value for one in earlier)
        assert p[n] == pytest.approx((higher + u[n] * (1 + equal)) / (len(earlier) + 1))


def test_blocks_do_not_change_the_online_p_values(monkeypatch: pytest.MonkeyPatch):
    live, reference = np.random.default_rng(5).random(150), held_out_values(40)
    whole = online_p_values(live, reference)
    assert len(live) < BLOCK
    monkeypatch.setattr("prefill_router.drift.ranks.BLOCK", 32)
    assert online_p_values(live, reference) == pytest.approx(whole)


def ranked(distances: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Novelty as the router computes it (signals/novelty.py)."""
    return np.searchsorted(np.sort(held_out), distances) / len(held_out)


def test_online_p_values_are_uniform_and_independent_of_the_one_reference():
    """Over many streams: with 30 held-out queries and 1,500 decisions, ranks among the 30 alone are far from it."""
    rng = np.random.default_rng(6)
    online, fixed = [], []
    for seed in range(100):
        held_out, novelty = rng.normal(size=30), rng.normal(size=1_500)
        novelty = ranked(novelty, held_out)
        online.append(online_p_values(novelty, held_out_values(30), seed)[1_000:].mean())
        fixed.append(1 - novelty[1_000:].mean())
    assert np.std(online) == pytest.approx(np.sqrt(1 / 12 / 500), rel=0.25)
    assert np.std(fixed) > 3 * np.std(online)


@pytest.mark.parametrize("kind", ["novelty", "mean"])
def test_the_mean_of_every_bet_is_at_most_one(kind: str):
    if kind == "novelty":
        grid = (np.arange(20_000) + 0.5) / 20_000
        factors = novelty_factors(grid)
        assert factors.mean(axis=0) == pytest.approx(np.ones(factors.shape[1]), abs=1e-4)
        assert (np.diff(factors, axis=0) <= 0).all()
    else:
        factors = mean_factors(np.array([0.7, -0.3, -0.3, -0.1]))
        assert factors.mean(axis=0) == pytest.approx(np.ones(len(STAKES)))
        factors = mean_factors(np.array([-1.2]))
    assert (factors > 0).all()


def test_the_wealth_is_the_mixture_of_all_starts_and_bets():
    rng = np.random.default_rng(7)
    factors = rng.uniform(0.5, 1.6, size=(23, 3))
    found = wealth(factors, alpha=0.01, every=5)
    for t in range(len(factors)):
        starts = range(0, t + 1, 5)
        total = 1 / (len(starts) + 1)  # the capital of later starts
        for k, start in enumerate(starts, start=1):
            total += factors[start : t + 1].prod(axis=0).mean() / (k * (k + 1))
        assert found.log_wealth[t] == pytest.approx(np.log(total))


def test_at_most_alpha_of_the_streams_without_drift_have_an_alarm_at_any_time():
    rng, alpha, streams = np.random.default_rng(8), 0.2, 150
    p = [
        online_p_values(ranked(rng.normal(size=1_000), own), held_out_values(100), n)
        for n, own in enumerate(rng.normal(size=(streams, 100)))
    ]
    false = sum(wealth(novelty_factors(one), alpha).alarm_at is not None for one in p)
    assert false <= binom.ppf(0.999, streams, alpha)
    assert false > 0  # the bound is not idle


def test_a_novel_stream_raises_the_alarm_soon_and_names_its_start():
    rng = np.random.default_rng(9)
    stream = np.concatenate([rng.random(500), rng.beta(5, 1, 200)])
    found = wealth(novelty_factors(online_p_values(stream, held_out_values(5_000))), 0.01)
    assert found.alarm_at is not None
    assert 500 < found.alarm_at < 560
    assert found.since == 500
    assert found.log_wealth[found.alarm_at] >= found.bound > found.log_wealth[: found.alarm_at].max()
    assert START_EVERY == 100
    assert max(NOVEL_SHARES) < 1  # one familiar query does not end a bet


def test_a_stream_closer_to_the_training_than_the_reference_raises_no_alarm():
    stream = np.random.default_rng(10).beta(1, 3, 3_000)
    found = wealth(novelty_factors(online_p_values(stream, held_out_values(1_000))), 0.01)
    assert found.alarm_at is None
