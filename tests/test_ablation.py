"""The ablation: variants on the same test queries at every seed, and resumption after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import TwoEncoders

from benchmarks import ablation
from prefill_router.cli import parse
from prefill_router.errors import InputError
from prefill_router.files import read_json
from prefill_router.metrics.predictions import read_predictions
from prefill_router.routing.config import FitConfig
from prefill_router.routing.trunk import TrunkConfig

pytestmark = pytest.mark.train

SMALL = TrunkConfig(widths=(16,), members=2, kept=1, max_epochs=20, batch_size=32, learning_rate=0.01)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(ablation, "FitConfig", lambda **fields: FitConfig(components=4, trunk=SMALL, **fields))
    return TwoEncoders(n=300).write(tmp_path / "inputs")


def test_each_part_is_changed_alone_and_judged_on_the_same_queries(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        ablation, "PARTS", {"isotonic": {"calibrator": "isotonic"}, "one layer key": {"each_pooling": False}}
    )
    config = ablation.AblationConfig.model_validate({**inputs, "output": tmp_path / "out", "seeds": 2})
    assert "7 configurations x 2 seeds" in ablation.run(config)
    first = read_predictions(next(tmp_path.glob("out/*/seed0.parquet")))
    p = {name: router.p for name, router in first.routers.items()}
    assert list(p) == [
        "prefill",
        "logistic regression",
        "a trunk for each target",
        "not calibrated",
        "isotonic",
        "one layer key",
        "final layer alone",
    ]
    np.testing.assert_array_equal(p["one layer key"], p["prefill"])  # there is one pooling
    for name in ("not calibrated", "isotonic"):  # monotone maps of the same probabilities
        assert not np.allclose(p[name], p["prefill"])
        order = np.argsort(p["prefill"][:, 0])
        assert (np.diff(p[name][order, 0]) >= 0).all()
    summary = read_json(tmp_path / "out/ablation.json")["routers"]
    assert len(summary["prefill"]["auc"]["by_seed"]) == 2
    assert summary["prefill"]["auc"]["mean"] > 0.65
    assert "| prefill less isotonic |" in (tmp_path / "out/ablation.md").read_text()


def test_configurations_use_the_common_seed_and_scheme_and_are_fitted_once(
    inputs: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = {
        "outcomes": "x",
        "pool": "x",
        "activations": "x",
        "output": "x",
        "fit": {"seed": 9, "components": 4, "trunk": SMALL.model_dump(mode="json")},
    }
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(given))
    config = ablation.AblationConfig.model_validate(
        {
            **inputs,
            "output": tmp_path / "out",
            "seeds": 2,
            "scheme": "85/15",
            "configs": {"same": tmp_path / "same.yaml"},
        }
    )
    ablation.run(config)
    for path in tmp_path.glob("out/*/seed*.parquet"):
        routers = read_predictions(path).routers
        np.testing.assert_array_equal(routers["same"].p, routers["prefill"].p)
    monkeypatch.setattr(ablation, "fit_router", None)
    ablation.run(config)


def test_the_parts_need_a_calibration_part(tmp_path: Path):
    with pytest.raises(InputError, match=r"got 85/15, but the parts are calibrated on .*75/10/15"):
        parse(
            ablation.AblationConfig,
            "",
            ["--outcomes", "x", "--pool", "x", "--activations", "x", "--output", "x", "--scheme", "85/15"],
        )
