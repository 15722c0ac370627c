"""How labels were made: disagreement of judges and of answers, missing labels, and several scorers.

In: `LabelTable`. Out: a `Finding` per check. Of a pair with the share p of right answers among k answers, p (1 - p) k /
(k - 1) estimates without bias the variance of the label of one answer. Its mean is the lowest Brier score that any
prediction of the label of one answer can reach.
"""

from __future__ import annotations

import numpy as np

from prefill_router.outcomes.quality.findings import (
    MIN_QUERIES,
    Finding,
    Json,
    Share,
    Table,
    differing_models,
    rates,
    suspects,
)
from prefill_router.outcomes.quality.table import LabelTable, Texts


def judges(labels: LabelTable) -> Finding:
    """Labels on which several judges, or several answers to one query, disagree."""
    shares = labels.outcomes.shares
    known = np.isfinite(shares)
    fractional = known & (shares > 0) & (shares < 1)
    split, judged = np.zeros(shares.shape, dtype=bool), np.zeros(shares.shape, dtype=bool)
    if labels.judges is not None:
        judged = labels.judges.count > 1
        split = judged & (labels.judges.right > 0) & (labels.judges.right < labels.judges.count)
    repeated = np.zeros(shares.shape, dtype=bool) if labels.answers is None else labels.answers > 1
    if not (fractional.any() or judged.any() or repeated.any()):
        return Finding("judges", "labels", None, "fractional labels, several answers, or the column judge_scores")
    flags = fractional | split
    queries, models = np.nonzero(flags)
    uncertainty = np.where(fractional, np.minimum(shares, 1 - shares), np.nan)
    if labels.judges is not None:
        votes = labels.judges.right / np.maximum(labels.judges.count, 1)
        uncertainty = np.where(split, np.fmax(uncertainty, np.minimum(votes, 1 - votes)), uncertainty)
    order = np.argsort(-uncertainty[queries, models], kind="stable")
    queries, models = queries[order], models[order]
    detail = [
        "judges disagree" if split[query, model] else f"the label is {shares[query, model]:.2f}"
        for query, model in zip(queries, models, strict=True)
    ]
    figures: Json = {
        "fractional_labels": int(fractional.sum()),
        "judged_by_several": int(judged.sum()),
        "judges_disagree": int(split.sum()),
        "mean_entropy_bits": float(_entropy(shares[known]).mean()) if known.any() else None,
    }
    return Finding(
        "judges",
        "labels",
        **rates(labels, flags, known | judged),
        tables=_noise(labels, figures),
        figures=figures,
        suspects=suspects(
            labels, "judges disagree", queries, models, score=uncertainty[queries, models], detail=detail
        ),
    )


def missing(labels: LabelTable) -> Finding:
    """Pairs of query and model without a label: without a row, or with a null."""
    labelled, everything = labels.outcomes.labelled, np.ones(labels.has_row.shape, dtype=bool)
    kinds = {"no row": ~labels.has_row, "row with the label null": labels.has_row & ~labelled}
    rows = tuple((name, Share(int(kind.sum()), kind.size)) for name, kind in kinds.items() if kind.any())
    incomplete = int((~labelled.all(axis=1)).sum())
    table = differing_models(labels, ~labelled, everything)
    return Finding(
        "missing",
        "pairs of query and model",
        **rates(labels, ~labelled, everything),
        tables=tuple(one for one in (Table("Kinds", ("kind", "pairs"), rows), table) if one.rows),
        figures={"queries_with_a_missing_label": incomplete, "queries": len(labelled)},
    )


def sources(labels: LabelTable) -> Finding:
    """Benchmarks in which different models have different scorers: their labels cannot be compared."""
    if labels.scored_by is None:
        return Finding("sources", "benchmarks", None, "the column scored_by")
    scorers = labels.scored_by
    names = np.array([*scorers.values.to_pylist(), None], dtype=object)
    rows, count, queries_mixed = [], 0, 0
    for number, benchmark in enumerate(labels.benchmarks):
        codes = scorers.codes[labels.of_benchmark == number]
        several = np.array([len(np.unique(row[row >= 0])) > 1 for row in codes])
        queries_mixed += int(several.sum())
        by_scorer = {code: (codes == code).any(axis=0) for code in np.unique(codes[codes >= 0])}
        if not several.any() and len({tuple(have) for have in by_scorer.values()}) < 2:
            continue
        count += 1
        for code, have in by_scorer.items():
            using = [name for name, one in zip(labels.models, have, strict=True) if one]
            labelled = Share(int((codes == code).sum()), int((codes >= 0).sum()))
            rows.append((benchmark, str(names[code]), labelled, len(using), ", ".join(using)))
    columns = ("benchmark", "scorer", "labels", "models", "names")
    tables = [Table("Benchmarks with several scorers", columns, tuple(rows))] if rows else []
    tables += [
        _counts(texts, name) for texts, name in ((scorers, "scored_by"), (labels.tokens_from, "tokens_from")) if texts
    ]
    return Finding(
        "sources",
        "benchmarks",
        Share(count, len(labels.benchmarks)),
        tables=tuple(tables),
        figures={"queries_with_several_scorers": queries_mixed},
    )


def _noise(labels: LabelTable, figures: Json) -> tuple[Table, ...]:
    """By model, over pairs with several answers: the Brier floor and the standard error of accuracy by the answers.

    Adds the floor over all models to `figures`.
    """
    if labels.answers is None:
        return ()
    shares, k = labels.outcomes.shares.astype(np.float64), labels.answers
    several = np.isfinite(shares) & (k > 1)
    variance = np.where(several, shares * (1 - shares) * k / np.where(several, k - 1, 1), np.nan)
    figures["brier_floor"] = float(variance[several].mean()) if several.any() else None
    rows = []
    for model, name in enumerate(labels.models):
        use = several[:, model]
        if use.sum() >= MIN_QUERIES:
            own = variance[use, model]
            error = float(np.sqrt((own / k[use, model]).sum())) / int(use.sum())
            rows.append((name, int(use.sum()), float(k[use, model].mean()), float(own.mean()), error))
    columns = ("model", "queries", "answers per query", "Brier floor", "standard error of accuracy")
    return (Table("Noise of labels", columns, tuple(rows)),) if rows else ()


def _entropy(p: np.ndarray) -> np.ndarray:
    """The entropy of a label that is right with probability p, in bits."""
    inside = np.clip(p.astype(np.float64), 1e-12, 1 - 1e-12)
    return np.where((p > 0) & (p < 1), -inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside), 0.0)


def _counts(texts: Texts, name: str) -> Table:
    codes = texts.codes[texts.known]
    counts = np.bincount(codes, minlength=len(texts.values))
    rows = [
        (value, Share(int(counts[code]), len(codes)))
        for code, value in enumerate(texts.values.to_pylist())
        if counts[code]
    ]
    return Table(f"Values of {name}", ("value", "rows"), tuple(sorted(rows, key=lambda row: -row[1].count)))
