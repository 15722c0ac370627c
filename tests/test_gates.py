"""Verdicts of gates on made-up predictions: better, equal, worse; multiplicity; missing figures; the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from paired_pool import two_routers
from tiny_router import tiny_router

from prefill_router.errors import InputError
from prefill_router.experiments.round_trip import decision_ms, synthetic_rows, try_checkpoint
from prefill_router.files import read_yaml, write_json
from prefill_router.metrics import gates
from prefill_router.metrics.bootstrap import Interval
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.gates import Verdict
from prefill_router.metrics.paired import (
    CANDIDATE,
    CHAMPION,
    SMALL,
    PairedBenchmark,
    PairedFigure,
    PairedFigures,
    paired_figures,
    simultaneous,
)
from prefill_router.pool import Pool
from prefill_router.reports.gates_page import render
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.workflows.gate_policy import GatePolicy

HOW = {"level": 0.9, "n_resamples": 200, "seed": 0, "min_benchmark": 40}
POLICY = Path(__file__).parents[1] / "configs/gates.yaml"


def pair(estimate: float | None, lower: float | None, upper: float | None) -> PairedFigure:
    difference = Interval(estimate, lower, upper, "because" if estimate is None else None)
    return PairedFigure(difference, difference, difference)


@pytest.fixture(scope="module")
def rare() -> PairedFigures:
    """A worse candidate, on a split with six benchmarks of 10 queries each."""
    return paired_figures(two_routers(candidate=2.0, rare=60), **HOW)


def benchmark(name: str, difference: float, lower: float, upper: float) -> PairedBenchmark:
    return PairedBenchmark(name, 100, 0.5, 0.5 + difference, difference, lower, upper)


@pytest.mark.parametrize(
    ("lower", "margin", "status"),
    [(-0.009, 0.01, "passed"), (-0.011, 0.01, "failed"), (0.002, -0.001, "passed"), (0.0005, -0.001, "failed")],
)
def test_the_worse_end_of_the_interval_decides(lower: float, margin: float, status: str) -> None:
    assert gates.non_inferior("auc", pair(0.003, lower, 0.02), margin, 0.9, True).status == status


@pytest.mark.parametrize(("upper", "status"), [(0.004, "passed"), (0.006, "failed")])
def test_for_brier_the_upper_end_is_the_worse_one(upper: float, status: str) -> None:
    assert gates.non_inferior("brier", pair(0.001, -0.01, upper), 0.005, 0.9, True).status == status


@pytest.mark.parametrize("required", [True, False])
def test_an_undefined_figure_refuses_only_if_the_policy_requires_it(required: bool) -> None:
    gate = gates.non_inferior("auc", pair(None, None, None), 0.01, 0.9, required)
    assert (gate.status, gate.reason, gate.refuses) == ("not measured", "because", required)
    assert Verdict((gate,)).passed is not required


def test_a_benchmark_fails_only_if_its_loss_is_large_and_established() -> None:
    small = benchmark("small but sure", -0.04, -0.06, -0.02)
    unsure = benchmark("large but unsure", -0.10, -0.25, 0.05)
    both = benchmark("large and sure", -0.10, -0.15, -0.05)
    assert gates.no_regression([small, unsure], 0.05, True).status == "passed"
    refused = gates.no_regression([small, unsure, both], 0.05, True)
    assert refused.status == "failed"
    assert refused.reason == "regressed: large and sure"
    assert refused.figure.startswith("worst of 3: large and sure -0.100")


def test_the_headline_names_every_gate_that_refuses_and_no_other() -> None:
    same = [gates.not_measured(name, "rule", "no evaluation", True) for name in ("auc", "brier")]
    lost = gates.non_inferior("p_auccc_exact", pair(-0.2, -0.3, -0.1), 0.03, 0.9, True)
    fine = gates.holds("checkpoint", "rule", None)
    spare = gates.not_measured("flip_rate", "rule", "no prompts", False)
    assert Verdict((fine, *same, lost, spare)).headline() == (
        "auc, brier not measured: no evaluation; p_auccc_exact failed: -0.2000 (90 % -0.3000 to -0.1000)"
    )
    assert Verdict((fine, spare)).headline() == "1 gates passed, 1 not measured"


def test_paired_figures_are_those_of_the_evaluation() -> None:
    predictions = two_routers(candidate=1.4)
    found = paired_figures(predictions, **HOW)
    same = evaluate(predictions, n_resamples=0, reference=CHAMPION)["routers"]
    for name, figure in found.figures.items():
        assert figure.candidate.estimate == same[CANDIDATE][name]["estimate"], name
        assert figure.difference.estimate == pytest.approx(same[CANDIDATE]["differences"][name]["estimate"], abs=1e-12)
    for one in found.benchmarks:
        expected = same[CANDIDATE]["benchmarks"][one.name]["accuracy_at_chosen_lambda"]["estimate"]
        assert one.candidate == expected


def test_a_router_compared_with_itself_differs_by_nothing() -> None:
    predictions = two_routers()
    own = predictions.routers[CHAMPION]
    found = paired_figures(replace(predictions, routers={CHAMPION: own, CANDIDATE: own}), **HOW)
    for figure in found.figures.values():
        assert (figure.difference.estimate, figure.difference.lower, figure.difference.upper) == (0, 0, 0)
    assert {(one.difference, one.lower, one.upper) for one in found.benchmarks} == {(0, 0, 0)}


def test_better_and_equal_candidates_pass_and_a_worse_one_fails() -> None:
    def auc(candidate: float) -> str:
        found = paired_figures(two_routers(candidate=candidate, n=3000), **HOW)
        return gates.non_inferior("auc", found.figures["auc"], 0.01, 0.9, True).status

    assert [auc(noise) for noise in (0.5, 1.0, 1.6)] == ["passed", "passed", "failed"]


def test_small_benchmarks_are_pooled_and_counted(rare: PairedFigures) -> None:
    pooled = next(one for one in rare.benchmarks if one.name == SMALL)
    assert pooled.queries == 60
    assert pooled.pooled == tuple(f"rare {at}" for at in range(6))
    assert sum(one.queries for one in rare.benchmarks) == rare.complete
    too_few = paired_figures(two_routers(rare=20), **HOW)
    assert SMALL not in [one.name for one in too_few.benchmarks]
    assert too_few.too_small == {SMALL: 20}


def test_simultaneous_intervals_widen_with_the_number_of_benchmarks() -> None:
    rng = np.random.default_rng(0)
    draws = [np.concatenate([[0.0], rng.normal(0, 1, 4000)]) for _ in range(20)]
    one, twenty = simultaneous(draws[:1], 0.9)[0], simultaneous(draws, 0.9)
    assert one[0] == pytest.approx(-1.645, abs=0.1)  # the normal quantile of 95 %
    assert twenty[0][0] == pytest.approx(-2.80, abs=0.15)  # of 0.95 ** (1 / 20)
    assert simultaneous([], 0.9) == []


def test_equal_candidates_are_rarely_refused_over_any_benchmark() -> None:
    """One-sided error of all benchmarks together: at most 5 %, here of 400 made-up comparisons of 12 benchmarks."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        paired = rng.choice([-1.0, 0.0, 1.0], (12, 60), p=[0.1, 0.8, 0.1])
        rows = rng.integers(60, size=(200, 60))
        draws = [np.concatenate([[one.mean()], one[rows].mean(axis=1)]) for one in paired]
        refused += any(upper < 0 for _, upper in simultaneous(draws, 0.9))
    assert refused / 400 < 0.09


def test_a_comparison_needs_both_routers_and_resamples() -> None:
    predictions = two_routers()
    only = replace(predictions, routers={CHAMPION: predictions.routers[CHAMPION]})
    with pytest.raises(InputError, match="routers: 'candidate' is missing"):
        paired_figures(only, **HOW)
    with pytest.raises(InputError, match="resamples: got 0"):
        paired_figures(predictions, **{**HOW, "n_resamples": 0})


@pytest.mark.parametrize("damage", ["none", "nan", "truncated", "pool", "missing"])
def test_a_checkpoint_that_cannot_route_is_found(tmp_path: Path, damage: str) -> None:
    folder, router = tmp_path / "checkpoint", tiny_router("a" * 16)
    (weight, bias), *_ = router.ensemble.layers
    if damage == "nan":
        router = replace(router, ensemble=replace(router.ensemble, layers=((weight * np.nan, bias),)))
    save_checkpoint(router, folder)
    if damage == "truncated":
        tensors = folder / "checkpoint.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-8])
    if damage == "pool":
        (folder / "pool.yaml").write_text("models: []\n")
    if damage == "missing":
        (folder / "pool.yaml").unlink()
    trial = try_checkpoint(folder)
    assert (trial.problem is None) == (damage == "none")
    expected = {
        "nan": "192 of 192 are not finite",
        "truncated": "its sha256 differs",
        "pool": "its sha256 differs",
        "missing": "pool.yaml: missing",
    }
    assert expected.get(damage, "") in (trial.problem or "")


def test_a_checkpoint_of_models_with_small_context_windows_routes(tmp_path: Path) -> None:
    router = tiny_router("a" * 16)
    models = tuple(model.model_copy(update={"context_tokens": 500}) for model in router.pool.models)
    small = replace(router, pool=Pool(models=models))
    with pytest.raises(InputError, match="no model is left"):
        small.decide(synthetic_rows(small))
    save_checkpoint(small, tmp_path / "checkpoint")
    assert try_checkpoint(tmp_path / "checkpoint").problem is None
    assert decision_ms(small).estimate is not None


def test_synthetic_states_route_without_activations() -> None:
    decisions = tiny_router("a" * 16, "middle").decide(synthetic_rows(tiny_router("a" * 16, "middle"), n=5))
    assert len(decisions) == 5
    assert all(0 < one.confidence < 1 for decision in decisions for one in decision.candidates)


@pytest.mark.parametrize(("state", "champion"), [("unmeasured", None), ("passed", 3), ("failed", 3), ("forced", 3)])
def test_the_page_shows_every_gate_and_loads_nothing(
    tmp_path: Path, rare: PairedFigures, state: str, champion: int | None
) -> None:
    paired = rare if champion else None
    found = [gates.holds("checkpoint", "routes", None), gates.not_measured("flip_rate", "below", "no prompts", False)]
    if paired is not None:
        found += [gates.non_inferior(name, paired.figures[name], 0.01, 0.9, True) for name in ("auc", "brier")]
        found.append(gates.no_regression(paired.benchmarks, 0.05, True))
    record = {
        **Verdict(tuple(found)).to_json(),
        "version": 4,
        "checkpoint": "c" * 16,
        "champion": champion,
        "state": state,
        "time": "now",
        "who": "me",
        "reason": "a <b>reason</b>" if state == "forced" else None,
        "code_version": "0",
        "command": "python",
        "policy": read_yaml(POLICY, GatePolicy).model_dump(mode="json"),
        "policy_digest": "d" * 16,
        "compared": "900 test queries",
        "paired": None if paired is None else paired.to_json(),
    }
    write_json(tmp_path / "verdict.json", record)  # has no NaN
    page = render(record)
    for gate in found:
        assert gate.rule in page
    assert ("a &lt;b&gt;reason" in page) == (state == "forced")
    assert page.count("<svg") == (0 if paired is None else 4)
    assert "http" not in page.replace("http-equiv", "")


def test_a_policy_that_omits_a_gate_is_refused(tmp_path: Path) -> None:
    text = "\n".join(line for line in POLICY.read_text().splitlines() if not line.startswith("brier:"))
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(InputError, match="brier: Field required"):
        read_yaml(tmp_path / "gates.yaml", GatePolicy)
