"""Labels of models: constant labels, benchmarks on which all models agree, and models that are suspiciously alike.

In: `LabelTable`. Out: a `Finding` per check. The agreement of two models is Cohen's kappa of their labels (Cohen 1960):

    kappa = (agreement - chance) / (1 - chance),   chance = p q + (1 - p) (1 - q)

with the accuracies p and q of the two models on the queries that both have a label for. 1 is perfect agreement, 0 what
the accuracies alone predict. Labels of different models agree beyond chance, because they share easy and difficult
queries; a pair is therefore compared with the other pairs.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float

from prefill_router.outcomes.quality.findings import MIN_QUERIES, Finding, Matrix, Share, Table, by_benchmark, suspects
from prefill_router.outcomes.quality.table import LabelTable

NEARLY = 0.01  # largest share of the rarer label, or of queries with disagreement
SOME_ABILITY = 0.2  # mean accuracy of the other models from which a model that is always wrong is suspicious
SAME_KAPPA = 0.9  # of two names of one model, or of copied labels
OUTLIER_KAPPA, OUTLIER_Z, OUTLIER_PAIRS = 0.6, 5.0, 10  # of a pair far above the others, if there are enough pairs
LONG_TOKENS, LONG_TEXT = 32, 40  # tokens and characters: shorter answers are often equal by chance
SAME_ANSWERS = 0.5  # share of long answers that are equal, or of equal length


def constant(labels: LabelTable) -> Finding:
    """Models with one label for all, or nearly all, of at least MIN_QUERIES queries of a benchmark."""
    correct = labels.outcomes.correct
    n, right = by_benchmark(labels, np.isfinite(correct)), by_benchmark(labels, correct == 1)
    enough = n >= MIN_QUERIES
    rarer = np.minimum(right, n - right)
    found = enough & (rarer <= NEARLY * n)
    others_n, others_right = n.sum(axis=1, keepdims=True) - n, right.sum(axis=1, keepdims=True) - right
    rows, wrong = [], np.zeros(correct.shape, dtype=bool)
    for benchmark, model in np.argwhere(found):
        others = Share(int(others_right[benchmark, model]), int(others_n[benchmark, model]))
        own = Share(int(right[benchmark, model]), int(n[benchmark, model]))
        suspicious = own.count == 0 and (others.estimate or 0.0) >= SOME_ABILITY
        if suspicious:
            wrong[labels.of_benchmark == benchmark, model] = True
        rows.append(
            (labels.benchmarks[benchmark], labels.models[model], own, others, "suspicious" if suspicious else "")
        )
    rows.sort(key=lambda row: (row[4] == "", row[2].count > 0, -(row[3].estimate or 0.0)))
    queries, models = np.nonzero(wrong & np.isfinite(correct))
    columns = ("benchmark", "model", "accuracy", "accuracy of the others", "remark")
    alike = _without_signal(labels)
    tables = [Table("Constant labels", columns, tuple(rows))] if rows else []
    return Finding(
        "constant",
        "pairs of model and benchmark",
        Share(int(found.sum()), int(enough.sum())),
        by_model={
            name: Share(int(c), int(of))
            for name, c, of in zip(labels.models, found.sum(0), enough.sum(0), strict=True)
            if c
        },
        tables=(*tables, alike) if alike.rows else tuple(tables),
        figures={
            "exactly_constant": int((enough & (rarer == 0)).sum()),
            "always_wrong_and_suspicious": sum(row[4] != "" for row in rows),
            "benchmarks_without_signal": len(alike.rows),
        },
        suspects=suspects(
            labels, "always wrong", queries, models, detail="the model is always wrong in this benchmark"
        ),
    )


def alike(labels: LabelTable) -> Finding:
    """Pairs of models whose labels, lengths or texts are equal too often for different models."""
    kappa, agreement, n = agreements(labels)
    upper = np.triu_indices(len(labels.models), 1)
    known = kappa[upper][np.isfinite(kappa[upper])]
    centre = float(np.median(known)) if len(known) else np.nan
    spread = 1.4826 * float(np.median(np.abs(known - centre))) if len(known) else np.nan
    tokens = _equal_share(np.where(labels.outcomes.output_tokens >= LONG_TOKENS, labels.outcomes.output_tokens, np.nan))
    texts = _equal_share(_long_texts(labels))
    rows = []
    for one, other in zip(*(places.tolist() for places in upper), strict=True):
        value = kappa[one, other]
        far = len(known) >= OUTLIER_PAIRS and value >= OUTLIER_KAPPA and value >= centre + OUTLIER_Z * spread
        same = [_of(shares, one, other) for shares in (tokens, texts)]
        remarks = ["labels"] if value >= SAME_KAPPA or far else []
        remarks += [name for name, share in zip(("output tokens", "texts"), same, strict=True) if _is_same(share)]
        if remarks:
            labelled = Share(int(agreement[one, other]), int(n[one, other]))
            k = None if np.isnan(value) else float(value)
            rows.append((labels.models[one], labels.models[other], k, labelled, *same, ", ".join(remarks)))
    rows.sort(key=lambda row: -(row[2] or 0.0))
    columns = ("model", "other model", "kappa", "equal labels", "equal output tokens", "equal texts", "alike in")
    compared = int((n[upper] >= MIN_QUERIES).sum())
    return Finding(
        "alike",
        "pairs of models",
        Share(len(rows), compared) if compared else None,
        "" if compared else f"two models with {MIN_QUERIES} labels of the same queries",
        tables=(Table("Pairs of models", columns, tuple(rows)),) if rows else (),
        figures={
            "median_kappa": None if np.isnan(centre) else centre,
            "highest_kappa": float(known.max()) if len(known) else None,
        },
        matrix=Matrix(kappa, labels.models, labels.models) if len(known) else None,
    )


def agreements(labels: LabelTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kappa, the number of equal labels, and of queries with both labels, of each pair of models [models, models].

    Kappa is NaN with fewer than MIN_QUERIES queries, without a right or without a wrong label, and on the diagonal.
    """
    correct = labels.outcomes.correct
    known, right = np.isfinite(correct).astype(np.float64), (correct == 1).astype(np.float64)
    n, both, own = (
        known.T @ known,
        right.T @ right,
        right.T @ known,
    )  # own[i, j]: right labels of i that j has a label for
    agreement = n - own - own.T + 2 * both
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = own / n, own.T / n
        chance = p * q + (1 - p) * (1 - q)
        kappa = (agreement / n - chance) / (1 - chance)
    kappa[(n < MIN_QUERIES) | (chance > 1 - 1e-12) | np.eye(len(n), dtype=bool)] = np.nan
    return kappa, agreement.astype(np.int64), n.astype(np.int64)


def _without_signal(labels: LabelTable) -> Table:
    """Benchmarks of at least MIN_QUERIES queries on which the models nearly always have one label."""
    correct = labels.outcomes.correct
    several = np.isfinite(correct).sum(axis=1) > 1
    split = (correct == 1).any(axis=1) & (correct == 0).any(axis=1)
    rows = []
    for number, name in enumerate(labels.benchmarks):
        part = several & (labels.of_benchmark == number)
        share = Share(int(split[part].sum()), int(part.sum()))
        if share.of >= MIN_QUERIES and share.count <= NEARLY * share.of:
            rows.append((name, share, Share(int((correct[part] == 1).sum()), int(np.isfinite(correct[part]).sum()))))
    return Table(
        "Benchmarks without signal", ("benchmark", "queries with disagreement", "accuracy of all models"), tuple(rows)
    )


def _equal_share(values: Float[np.ndarray, "queries models"]) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair of models: queries with equal values, and queries with both values; NaN is no value."""
    n_models = values.shape[1]
    known = np.isfinite(values)
    equal = np.zeros((n_models, n_models), dtype=np.int64)
    for model in range(n_models):
        equal[model] = (values == values[:, [model]]).sum(axis=0)
    return equal, known.T.astype(np.int64) @ known.astype(np.int64)


def _long_texts(labels: LabelTable) -> Float[np.ndarray, "queries models"]:
    """Codes of the texts of at least LONG_TEXT characters; NaN for shorter and missing ones."""
    if labels.answer is None:
        return np.full(labels.has_row.shape, np.nan)
    long = pc.greater_equal(pc.utf8_length(labels.answer.values), LONG_TEXT).to_numpy(zero_copy_only=False).astype(bool)
    return np.where(labels.answer.where(long), labels.answer.codes.astype(np.float64), np.nan)


def _of(shares: tuple[np.ndarray, np.ndarray], one: int, other: int) -> Share:
    return Share(int(shares[0][one, other]), int(shares[1][one, other]))


def _is_same(share: Share) -> bool:
    return share.of >= MIN_QUERIES and share.count >= SAME_ANSWERS * share.of
