"""All checks of labels: an outcomes table in, findings, accuracies and suspicious labels out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefill_router.outcomes.quality.answers import refusals, truncated, unparsed
from prefill_router.outcomes.quality.findings import Finding, Json, Matrix, by_benchmark
from prefill_router.outcomes.quality.items import implausible
from prefill_router.outcomes.quality.models import alike, constant
from prefill_router.outcomes.quality.prompts import duplicates
from prefill_router.outcomes.quality.scoring import judges, missing, sources
from prefill_router.outcomes.quality.table import LabelTable

CHECKS: dict[str, Callable[[LabelTable], Finding]] = {
    "duplicates": duplicates,
    "unparsed": unparsed,
    "truncated": truncated,
    "refusals": refusals,
    "constant": constant,
    "alike": alike,
    "judges": judges,
    "implausible": implausible,
    "missing": missing,
    "sources": sources,
}


@dataclass(frozen=True)
class LabelQuality:
    """The findings by name of the check, in the order of CHECKS, and the accuracy by model and benchmark."""

    labels: LabelTable
    findings: dict[str, Finding]
    accuracy: Matrix

    @property
    def suspects(self) -> pa.Table:
        """Every suspicious query, (query, model) or pair of queries with its reason, in the order of the findings."""
        return pa.concat_tables([finding.suspects for finding in self.findings.values()])

    @property
    def with_findings(self) -> list[str]:
        """The checks that found something."""
        return [name for name, finding in self.findings.items() if finding.status == "found"]

    def to_json(self) -> Json:
        """Every figure by check, with the counts of queries, models, rows and labels."""
        outcomes = self.labels.outcomes
        return {
            "queries": len(outcomes),
            "models": list(outcomes.models),
            "benchmarks": list(self.labels.benchmarks),
            "rows": int(self.labels.has_row.sum()),
            "labels": int(outcomes.labelled.sum()),
            "optional_columns": list(self.labels.columns),
            "findings": {name: finding.to_json() for name, finding in self.findings.items()},
        }


def check_labels(
    labels: LabelTable, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names
) -> LabelQuality:
    """Runs all checks. `progress` wraps the iteration over their names, such as `tqdm.tqdm`."""
    findings = {name: CHECKS[name](labels) for name in progress(list(CHECKS))}
    correct = labels.outcomes.correct
    right, n = by_benchmark(labels, correct == 1), by_benchmark(labels, np.isfinite(correct))
    with np.errstate(invalid="ignore", divide="ignore"):
        return LabelQuality(labels, findings, Matrix((right / n).T, labels.models, labels.benchmarks))
