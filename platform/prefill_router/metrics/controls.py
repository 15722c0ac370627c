"""Figures of the controls of an evaluation: trunks that cannot know the labels, and truncated prompts.

In: test predictions of control trunks (experiments/controls.py), and a table of the prompts as the encoders read them.
Out: the part `controls` of metrics.json. Definitions: docs/metrics.md, Controls.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from prefill_router.metrics.bootstrap import Json, interval, resample
from prefill_router.metrics.confidences import mean_over_models, roc_auc_per_model
from prefill_router.metrics.groups import Draws
from prefill_router.metrics.predictions import Predictions

SHUFFLED, RANDOM = "shuffled_labels", "random_features"
TRUNCATION = pa.schema(
    [
        ("encoder", pa.string()),
        ("query_id", pa.string()),
        ("part", pa.string()),
        ("n_tokens", pa.int64()),
        ("n_dropped", pa.int64()),
        ("prompt_digest", pa.string()),
        ("tokens_digest", pa.string()),
    ]
)
PARTS = ("train", "calibration", "test")
ONE_CLASS = "the labels of these queries do not hold both classes"


def chance_figures(controls: Predictions, *, n_resamples: int = 1000, seed: int = 0) -> Json:
    """By kind of control: `auc`, the mean over repeats and models, and `by_repeat`, the AUC of each repeat.

    The routers of `controls` are named `KIND NUMBER`. The interval covers the draw of the test queries and that of the
    repeats: every resample of the queries also draws repeats, with replacement.
    """

    def figures(weights: np.ndarray) -> dict[str, Draws]:
        return {
            name: mean_over_models(roc_auc_per_model(router.p, controls.correct, weights))
            for name, router in controls.routers.items()
        }

    draws = resample(figures, controls.groups, n_resamples, seed)
    kinds = dict.fromkeys(name.rpartition(" ")[0] for name in draws)
    report = {}
    for kind in kinds:
        auc = np.stack([values for name, values in draws.items() if name.rpartition(" ")[0] == kind], axis=1)
        report[kind] = {
            "auc": interval(_over_repeats(auc, seed), ONE_CLASS).to_json(),
            "by_repeat": [None if np.isnan(value) else float(value) for value in auc[0]],
        }
    return report


def _over_repeats(values: Float[np.ndarray, "draws repeats"], seed: int) -> Draws:
    """The mean over repeats: of all of them for the estimate, of as many drawn ones for each resample."""
    n, repeats = len(values) - 1, values.shape[1]
    drawn = np.random.default_rng(seed).integers(repeats, size=(n, repeats))
    return np.append(values[:1].mean(axis=1), np.take_along_axis(values[1:], drawn, axis=1).mean(axis=1))


def truncation_figures(table: pa.Table, predictions: Predictions, *, n_resamples: int = 1000, seed: int = 0) -> Json:
    """Counts of truncated prompts by encoder and part, and AUC on truncated and on other test prompts by router.

    `table` has the schema TRUNCATION. A test prompt counts as truncated if an encoder of the router truncated it. The
    figures by router are left out if no test prompt was truncated.
    """
    encoders = {
        encoder: {
            part: _counts(own if part == "all" else own.filter(pc.equal(own.column("part"), part)))
            for part in (*PARTS, "all")
        }
        for encoder in dict.fromkeys(table.column("encoder").to_pylist())
        for own in [table.filter(pc.equal(table.column("encoder"), encoder))]
    }
    cut_ids = set(table.filter(pc.greater(table.column("n_dropped"), 0)).column("query_id").to_pylist())
    cut = np.array([query_id in cut_ids for query_id in predictions.query_ids])
    report: Json = {"encoders": encoders, "n_truncated_test": int(cut.sum())}
    if cut.any():
        report["routers"] = _auc_by_truncation(cut, predictions, n_resamples, seed)
    return report


def _counts(rows: pa.Table) -> Json:
    """Number and share of truncated prompts, and the number of prompts that truncation made equal to another one."""
    n, cut = len(rows), int(pc.sum(pc.greater(rows.column("n_dropped"), 0)).as_py() or 0)
    groups = rows.group_by("tokens_digest").aggregate([("prompt_digest", "count_distinct"), ("n_dropped", "max")])
    different = groups.column("prompt_digest_count_distinct")
    equal = pc.and_(pc.greater(different, 1), pc.greater(groups.column("n_dropped_max"), 0))
    return {
        "n": n,
        "n_truncated": cut,
        "share_truncated": cut / n if n else None,
        "n_equal_after_truncation": int(pc.sum(different.filter(equal)).as_py() or 0),
    }


def _auc_by_truncation(cut: np.ndarray, predictions: Predictions, n_resamples: int, seed: int) -> Json:
    def figures(weights: np.ndarray) -> dict[str, dict[str, Draws]]:
        report = {}
        for name, router in predictions.routers.items():
            truncated, other = (
                mean_over_models(roc_auc_per_model(router.p, predictions.correct, weights * part))
                for part in (cut, ~cut)
            )
            report[name] = {
                "auc_truncated": truncated,
                "auc_not_truncated": other,
                "difference": truncated - other,
            }
        return report

    draws = resample(figures, predictions.groups, n_resamples, seed)
    return {
        name: {figure: interval(values, ONE_CLASS).to_json() for figure, values in by_figure.items()}
        for name, by_figure in draws.items()
    }
