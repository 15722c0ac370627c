"""The geometry report: peaks of metrics, encoders against targets, MLP and concatenated layers, the page."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from builders import ENCODER, OTHER, QUICK, TwoEncoders, make_outcomes

from jobs.probe import ProbeConfig, run
from prefill_router.files import read_json
from prefill_router.layers import encoder_target as table
from prefill_router.layers.mlp_probes import logistic_auc, mlp_auc, probe_peaks, project_folds
from prefill_router.layers.peaks import layer_rows, peak_layers, peaks, rank_agreement
from prefill_router.layers.report import describe
from prefill_router.outcomes.splits import make_folds
from prefill_router.pool import Pool
from prefill_router.prefill.bundled import BUNDLED
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo
from prefill_router.reports.format import number, signed, significant
from prefill_router.signals.geometry import Geometry
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import LayerScores, search_layers

MODELS = ("small", "medium", "large")


def scores(
    auc: float | list[float],
    fisher: float | list[float] = 1.0,
    d_eff: float = 1.0,
    anisotropy: float = 0.5,
    on_fold: np.ndarray | None = None,
    without: np.ndarray | None = None,
    models: int = 3,
) -> LayerScores:
    """Scores of one k and five folds; the AUC is the same on and without each fold unless given."""
    auc = np.broadcast_to(np.array(auc, dtype=float), (models,))
    fisher = np.broadcast_to(np.array(fisher, dtype=float), (models,))
    same = np.broadcast_to(auc, (1, 5, models))
    return LayerScores(
        (4,),
        auc[None],
        same if on_fold is None else on_fold[None],
        same if without is None else without[None],
        fisher[None],
        np.broadcast_to(fisher, (5, 1, models)),
        Geometry(d_eff, 9 - d_eff, 0.0, anisotropy),
    )


def layer(number: int, encoder: str = ENCODER, pooling: str = "mean") -> LayerKey:
    return LayerKey(encoder, pooling, number)


PLANTED = {
    layer(0): scores([0.5, 0.5, 0.9], 0.1, 2.0, 0.9),
    layer(1): scores(0.6, 0.2, 7.0, 0.5),
    layer(2): scores(0.61, 0.3, 3.0, 0.1),
    layer(3): scores(0.65, [9.0, 0.2, 0.2], 2.0, 0.4),
    layer(4): scores([0.8, 0.8, 0.6], 0.5, 1.0, 0.6),
}


def test_planted_peaks_are_found_and_anisotropy_peaks_at_its_lowest():
    [found] = peaks(layer_rows(PLANTED, 4), MODELS)
    assert {metric: found[metric]["layer"] for metric in ("d_eff", "anisotropy", "fisher_j", "auc")} == {
        "d_eff": 1,
        "anisotropy": 2,
        "fisher_j": 3,
        "auc": 4,
    }
    assert found["d_eff"] == {"layer": 1, "value": 7.0, "auc": pytest.approx(0.6)}
    assert {name: own["auc"]["layer"] for name, own in found["by_target"].items()} == {
        "small": 4,
        "medium": 4,
        "large": 0,
    }
    assert {name: own["fisher_j"]["layer"] for name, own in found["by_target"].items()} == {
        "small": 3,
        "medium": 4,
        "large": 4,
    }
    assert peak_layers(PLANTED, 4) == {"d_eff": layer(1), "anisotropy": layer(2), "fisher_j": layer(3), "auc": layer(4)}


def test_each_pooling_has_its_own_peaks():
    both = {**PLANTED, **{layer(at, pooling="last"): scores(0.5 + at / 10, at, 9.0 - at, at / 10) for at in (1, 2)}}
    found = {row["pooling"]: row for row in peaks(layer_rows(both, 4), MODELS)}
    assert (found["last"]["auc"]["layer"], found["last"]["d_eff"]["layer"]) == (2, 1)
    assert found["mean"]["auc"]["layer"] == 4


def test_peaks_without_a_fold_come_from_the_other_folds():
    without = np.full((5, 3), 0.7)
    without[2] = 0.9
    found = {layer(1): scores(0.8, without=without), layer(2): scores(0.75)}
    assert peak_layers(found, 4)["auc"] == layer(1)
    assert [peak_layers(found, 4, fold)["auc"].layer for fold in range(5)] == [2, 2, 1, 2, 2]


def test_rank_agreement_is_of_means_over_targets_without_undefined_values():
    found = {layer(at): scores(0.5 + at / 10, float(at**3), 5.0 - at, 0.5) for at in range(4)}
    found[layer(4)] = scores(0.95, 100.0, float("nan"), 0.5)
    result = rank_agreement(layer_rows(found, 4))
    assert result["fisher_j"] == pytest.approx(1)
    assert result["d_eff"] == pytest.approx(-1)
    assert result["d_eff_raw"] == pytest.approx(1)
    assert result["anisotropy"] is None
    assert result["blocks"] == 5


def test_the_auc_on_a_fold_uses_the_layer_chosen_by_the_other_folds():
    lucky, steady = np.full((5, 3), 0.6), np.full((5, 3), 0.7)
    lucky[0] = 0.95
    without_lucky, without_steady = np.full((5, 3), 0.8), np.full((5, 3), 0.7)
    without_lucky[0] = 0.6  # without the fold of its high AUC, the first layer is the worse one
    found = {
        layer(1): scores(0.75, on_fold=lucky, without=without_lucky),
        layer(2): scores(0.7, on_fold=steady, without=without_steady),
    }
    auc, chosen, by_fold = table.nested_auc(found, 4, MODELS)
    assert auc[:, 0].tolist() == [0.7, 0.6, 0.6, 0.6, 0.6]
    assert chosen == (layer(1),) * 3
    assert [layer_keys[0].layer for layer_keys in by_fold] == [2, 1, 1, 1, 1]


def test_fold_intervals_are_those_of_the_corrected_resampled_t_test():
    values = np.array([0.6, 0.62, 0.64, 0.66, 0.68])
    found = table.fold_interval(values)
    half = 2.776445 * values.std(ddof=1) * (1 / 5 + 1 / 4) ** 0.5
    assert (found.estimate, found.upper - found.estimate) == (pytest.approx(0.64), pytest.approx(half, rel=1e-5))
    assert table.fold_interval(np.array([0.6, np.nan])).lower is None
    assert table.fold_interval(np.full(5, np.nan)).estimate is None


def test_the_table_marks_each_targets_best_encoder_and_its_lead():
    spread = np.linspace(-0.01, 0.01, 5)[:, None]
    found = {
        layer(1): scores([0.8, 0.6, 0.6], on_fold=np.array([0.8, 0.6, 0.6]) + spread),
        layer(2): scores(0.5),
        layer(1, OTHER): scores([0.7, 0.7, 0.65]),
    }
    result = table.encoder_target_table(found, 4, MODELS)
    assert {name: best["encoder"] for name, best in result["best"].items()} == {
        "small": ENCODER,
        "medium": OTHER,
        "large": OTHER,
    }
    assert result["best"]["small"]["lead"]["estimate"] == pytest.approx(0.1)
    assert result["encoders"][ENCODER]["by_target"]["small"]["column"] == "mean_L1"
    assert result["encoders"][ENCODER]["mean"]["estimate"] == pytest.approx((0.8 + 0.6 + 0.6) / 3)
    assert result["any"]["mean"]["estimate"] == pytest.approx((0.8 + 0.7 + 0.65) / 3)
    assert result["any"]["by_target"]["medium"]["encoder"] == OTHER


def test_an_encoder_matches_a_target_by_full_name_or_last_part():
    pool = Pool.model_validate(
        {
            "models": [
                {"name": name, "input_usd_per_mtok": 1, "output_usd_per_mtok": 1, "endpoint": endpoint}
                for name, endpoint in (
                    ("org/Alpha-8B", None),
                    ("beta", {"base_url": "http://x", "model": "org/gamma"}),
                    ("delta", None),
                )
            ]
        }
    )
    assert table.own_encoders({"1": "/models/alpha-8b", "2": "org/gamma", "3": "alpha", "4": "other/delta"}, pool) == {
        "org/Alpha-8B": ["1"],
        "beta": ["2"],
        "delta": ["4"],
    }


def test_own_states_are_compared_with_the_best_foreign_ones():
    found = {layer(1): scores(0.6), layer(2): scores(0.64), layer(1, OTHER): scores(0.7), layer(2, OTHER): scores(0.5)}
    [row] = table.own_against_foreign(found, 4, MODELS, {"medium": [ENCODER]})
    assert (row["target"], row["own"]["column"], row["foreign"]["encoder"]) == ("medium", "mean_L2", OTHER)
    assert row["difference"]["estimate"] == pytest.approx(-0.06)
    own_only = {key: found[key] for key in found if key.encoder == ENCODER}
    assert table.own_against_foreign(own_only, 4, MODELS, {"medium": [ENCODER]})[0]["foreign"] is None


class Made:
    """States of three layers; labels depend on two hidden numbers, and a layer shows one, the other or neither."""

    def __init__(self, n: int = 500) -> None:
        rng = np.random.default_rng(3)
        self.outcomes, _ = make_outcomes(n=n)
        hidden = rng.normal(size=(n, 2))
        self.outcomes.correct[:] = rng.random((n, 3)) < 1 / (1 + np.exp(-3 * hidden.sum(axis=1)))[:, None]
        noise = [rng.normal(size=(n, 6)).astype(np.float32) for _ in range(3)]
        self.states = {layer(at): x for at, x in enumerate(noise)}
        # Layer 1 has the highest AUC, one number twice, and an offset; layer 2 has no offset; layer 0 is noise.
        self.states[layer(1)][:, 0] = 3 * hidden[:, 0] + 8
        self.states[layer(1)][:, 1] += 3 * hidden[:, 0]
        self.states[layer(2)][:, :3] += 0.8 * hidden[:, 1:]
        self.states[layer(0)] += 5
        self.folds = make_folds(self.outcomes, np.arange(n), 0)

    def probe(self):
        found = search_layers(
            list(self.states),
            lambda key: self.states[key].copy(),
            self.outcomes.correct,
            self.folds,
            [4],
            nested=True,
            with_geometry=True,
        )
        return found, probe_peaks(self.outcomes, self.folds, found, lambda key: self.states[key], 4, 0, QUICK)


@pytest.fixture(scope="module")
def made():
    made = Made()
    return made, *made.probe()


def test_complementary_layers_are_better_concatenated(made):
    _, found, probes = made
    assert {metric: key.layer for metric, key in peak_layers(found, 4).items()} == {
        "d_eff": 0,
        "anisotropy": 2,
        "fisher_j": 1,
        "auc": 1,
    }
    [one] = probes.concatenations
    assert (one.single, set(one.layer_keys), one.n_features) == (layer(1), set(map(layer, range(3))), (4, 12))
    gain = table.fold_interval(table.over_targets(one.auc - one.auc_single))
    assert gain.lower > 0


def test_a_layer_with_all_peaks_is_not_concatenated(made):
    data, found, _ = made
    probes = probe_peaks(
        data.outcomes, data.folds, {layer(1): found[layer(1)]}, lambda key: data.states[key], 4, 0, QUICK
    )
    assert probes.concatenations[0].layer_keys == (layer(1),)
    np.testing.assert_array_equal(probes.concatenations[0].auc, probes.concatenations[0].auc_single)


def test_the_logistic_probe_equals_that_of_the_layer_search(made):
    _, found, probes = made
    for key in probes.logistic:
        np.testing.assert_allclose(probes.logistic[key], found[key].auc_on_fold[0], atol=2e-3)
        assert found[key].auc[0] == pytest.approx(found[key].auc_on_fold[0].mean(axis=0))


def test_an_mlp_predicts_labels_that_are_not_linearly_separable():
    outcomes, _ = make_outcomes(n=500)
    x = np.random.default_rng(5).normal(size=(500, 2)).astype(np.float32)
    outcomes.correct[:] = (np.abs(x[:, :1]) > 0.7).astype(np.float32)
    folds = make_folds(outcomes, np.arange(500), 0)
    z = project_folds(x, folds, 2)
    line = np.mean([logistic_auc(z[fold], outcomes.correct, folds == fold) for fold in range(5)])
    trunk = QUICK.model_copy(update={"widths": (32,), "max_epochs": 40, "dropout": 0.1})
    assert line < 0.65
    assert mlp_auc(z, outcomes, folds, trunk, 0).mean() > line + 0.2


def test_a_probe_is_fitted_without_its_held_out_fold():
    rng = np.random.default_rng(0)
    z, held_out = rng.normal(size=(200, 4)), np.arange(200) < 50
    labels = (rng.random((200, 1)) < 0.5).astype(float)
    inverted = np.where(held_out[:, None], 1 - labels, labels)
    assert logistic_auc(z, labels, held_out)[0] == pytest.approx(1 - logistic_auc(z, inverted, held_out)[0])


def info(**other: object) -> EncoderInfo:
    return EncoderInfo.model_validate(
        {
            "model": "m",
            "revision": None,
            "architecture": "BertModel",
            "weights_digest": "w",
            "tokenizer_digest": "t",
            "attention": "causal",
            "last_token": "last real token",
            "n_layers": 2,
            "hidden_size": 8,
            "max_length": 512,
            "truncation_side": "left",
            "template": None,
            "dtype": "float32",
            "states_dtype": "float32",
            "backend": "none",
        }
        | other
    )


def test_encoders_have_unique_names_and_kinds():
    result = describe(
        {
            "1": info(model="minilm", weights_digest=BUNDLED[MINILM].weights_sha256, attention="bidirectional"),
            "2": info(model="/a/b/tiny"),
            "3": info(model="org/m"),
            "4": info(model="org/m", template="x"),
        }
    )
    assert (result["1"]["name"], result["1"]["kind"]) == ("all-MiniLM-L6-v2", "sentence encoder")
    assert (result["2"]["name"], result["2"]["kind"]) == ("tiny", "causal language model")
    assert (result["3"]["name"], result["4"]["name"]) == ("org/m (3)", "org/m (4)")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory):
    two = TwoEncoders(n=300)
    two.encoders = {ENCODER: EncoderConfig(model="small"), OTHER: EncoderConfig(model="b")}
    return two.write(tmp_path_factory.mktemp("geometry"))


def test_the_page_has_every_figure_of_a_deep_probe_and_loads_nothing(inputs: dict[str, object], tmp_path: Path):
    assert "geometry.html" in run(ProbeConfig(**inputs, output=tmp_path, components=4, deep=True))
    report = read_json(tmp_path / "geometry.json")
    page = unescape((tmp_path / "geometry.html").read_text())
    text = re.sub(r"<[^>]+>", " ", page)
    deep = report["deep"]
    for row in report["peaks"]:
        for metric in ("d_eff", "anisotropy", "fisher_j"):
            assert significant(row[metric]["value"]) in text
        for own in row["by_target"].values():
            assert number(own["auc"]["value"], 4) in text
    for own in report["agreement"].values():
        assert number(own["fisher_j"]) in text
        assert signed(own["trusting_j"]["estimate"]) in text
    for encoder in deep["encoder_target"]["encoders"].values():
        for own in (
            *encoder["by_target"].values(),
            {"auc": encoder["mean"], "auc_of_the_best": encoder["mean_of_the_best"]},
        ):
            assert number(own["auc"]["estimate"], 4) in text
            assert number(own["auc"]["lower"], 4) in text
            assert number(own["auc_of_the_best"], 4) in text
    differences = [row["difference"] for part in deep["mlp"]["encoders"].values() for row in part["blocks"]]
    differences += [row["difference"] for rows in deep["concatenation"].values() for row in rows]
    differences += [best["lead"] for best in deep["encoder_target"]["best"].values()]
    differences += [row["difference"] for row in deep["own_against_foreign"]]
    for figure in differences:
        assert signed(figure["estimate"]) in text
        assert signed(figure["upper"]) in text
    assert [row["target"] for row in deep["own_against_foreign"]] == ["small"]
    assert deep["own_against_foreign"][0]["own"]["auc"]["estimate"] > 0.7  # its own states depend on its labels
    best = {name: report["encoders"][own["encoder"]]["name"] for name, own in deep["encoder_target"]["best"].items()}
    assert (best["small"], best["medium"]) == ("small", "b")
    assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import", page)
    assert "NaN" not in (tmp_path / "geometry.json").read_text()


def test_a_plain_probe_makes_the_page_without_deep_figures(inputs: dict[str, object], tmp_path: Path):
    run(ProbeConfig(**inputs, output=tmp_path, components=4))
    report = read_json(tmp_path / "geometry.json")
    page = (tmp_path / "geometry.html").read_text()
    assert report["deep"] is None
    assert report["agreement"]["all"]["trusting_j"] is None
    assert "jobs.probe --deep" in page
    assert number(report["agreement"]["all"]["fisher_j"]) in page
