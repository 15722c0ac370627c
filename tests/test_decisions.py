"""The decisions benchmark: variants of the same trunks, numbers of queries, and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import TwoEncoders

from benchmarks import decisions
from prefill_router.files import read_json
from prefill_router.metrics.predictions import read_predictions
from prefill_router.routing.config import FitConfig
from prefill_router.routing.trunk import TrunkConfig

pytestmark = pytest.mark.train

SMALL = TrunkConfig(widths=(16,), members=2, kept=1, max_epochs=20, batch_size=32, learning_rate=0.01)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    names = ("prefill", "pooled", "platt")
    monkeypatch.setattr(decisions, "VARIANTS", {name: decisions.VARIANTS[name] for name in names})
    fit = FitConfig(components=4, trunk=SMALL, lengths="median")
    inputs = TwoEncoders(n=800).write(tmp_path / "inputs")
    return {**inputs, "output": tmp_path / "out", "seeds": 2, "scheme": "75/10/15", "fit": fit}


def test_all_variants_have_the_trunks_of_a_seed(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = decisions.train_trunks
    monkeypatch.setattr(decisions, "train_trunks", lambda *args: trained.append(1) or train(*args))
    assert "6 routers x 2 seeds" in decisions.run(decisions.DecisionsConfig.model_validate(given))
    p = {name: one.p for name, one in read_predictions(next(tmp_path.glob("out/*/seed0.parquet"))).routers.items()}
    assert list(p) == ["prefill", "pooled", "platt", "raw", "category_prior", "best_single"]
    order = np.argsort(p["raw"][:, 0])
    for name in ("pooled", "platt"):  # monotone maps of the same probabilities
        assert not np.allclose(p[name], p["raw"])
        assert (np.diff(p[name][order, 0]) >= 0).all()
    found = read_json(tmp_path / "out/decisions.json")["all training queries"]["routers"]
    assert len(found["prefill"]["auc"]["by_seed"]) == 2
    decisions.run(decisions.DecisionsConfig.model_validate(given))
    assert len(trained) == 2  # the second run reads the predictions of the first


def test_unseen_benchmarks_are_left_out_of_every_fit(given: dict[str, Any], tmp_path: Path) -> None:
    decisions.run(decisions.DecisionsConfig.model_validate(given))
    decisions.run(decisions.DecisionsConfig.model_validate(given | {"unseen": True}))
    seen, unseen = (
        read_predictions(next(tmp_path.glob(f"out/*/{name}.parquet"))) for name in ("seed0", "seed0-unseen")
    )
    assert list(seen.query_ids) == list(unseen.query_ids)
    for name, router in unseen.routers.items():
        assert not np.isnan(router.p).any()
        assert not np.allclose(router.p, seen.routers[name].p)
        assert router.chosen_lambda == seen.routers[name].chosen_lambda
    benchmarks = seen.benchmarks
    prior = unseen.routers["category_prior"].p
    for benchmark in set(benchmarks):  # which the prior has never seen: all its queries are alike
        assert len(np.unique(prior[benchmarks == benchmark], axis=0)) == 1


def test_numbers_of_queries_share_the_trunks(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    finish = decisions.finish_router

    def counted(trained: Any, *rest: Any) -> Any:
        sizes.append((len(trained.split.train), len(trained.rows)))
        return finish(trained, *rest)

    monkeypatch.setattr(decisions, "finish_router", counted)
    more = {"labels": (200, 400), "calibration": (100,), "scheme": "85/15", "seeds": 2}
    decisions.run(decisions.DecisionsConfig.model_validate(given | more))
    assert sorted(set(sizes)) == [(200, 100), (400, 100)]
    found = read_json(tmp_path / "out/decisions.json")
    assert [title for title in found if title != "config"] == [
        "200 training queries, 100 calibration queries",
        "400 training queries, 100 calibration queries",
    ]
