"""AUC within a task family, to which the family itself contributes nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from prefill_router.outcomes.table import Outcomes

MIN_PER_CLASS = 10


def within_family_auc(
    outcomes: Outcomes, test: Int[np.ndarray, " test"], p: Float[np.ndarray, "queries models"]
) -> float:
    """Mean ROC-AUC over (family, model) pairs with at least ten test labels of each class.

    `p` has confidences of all queries of `outcomes`; only those at `test` are used.
    """
    aucs = []
    for family in sorted(set(outcomes.benchmarks[test])):
        rows = test[outcomes.benchmarks[test] == family]
        for model in range(len(outcomes.models)):
            known = rows[outcomes.labelled[rows, model]]
            y = outcomes.correct[known, model]
            if min(np.sum(y == 0), np.sum(y == 1)) >= MIN_PER_CLASS:
                aucs.append(roc_auc_score(y, p[known, model]))
    assert aucs, "no family has ten test labels of each class for any model"
    return float(np.mean(aucs))
