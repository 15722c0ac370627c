"""The layer search as one writes it with scikit-learn: what it is measured against, and held to.

In: states of one block, labels, folds. Out: cross-validated AUC per number of components and target.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits


def reference_layer(
    states: np.ndarray, correct: np.ndarray, folds: np.ndarray, ks: Sequence[int], share: bool, solver: str = "auto"
) -> np.ndarray:
    """AUC [ks, targets], a fit at a time; with `share`, scaler and PCA serve all targets and k of a fold.

    Scaler and PCA are fitted on all rows of the other folds, labelled or not; the components have the one common factor
    that gives them unit mean variance, as in the search. `solver` is that of PCA: above 500 columns `auto` may be the
    randomised one, which is not exact.
    """
    n_folds = int(folds.max()) + 1
    auc = np.zeros((n_folds, len(ks), correct.shape[1]))
    for fold in range(n_folds):
        fit, test = states[folds != fold], states[folds == fold]
        labels, judged = correct[folds != fold], correct[folds == fold]
        shared = _components(fit, test, max(ks), solver) if share else None
        for at, k in enumerate(ks):
            for target in range(correct.shape[1]):
                z, z_test, variances = shared or _components(fit, test, k, solver)
                factor = np.sqrt(variances[:k].mean())
                known, asked = ~np.isnan(labels[:, target]), ~np.isnan(judged[:, target])
                model = LogisticRegression(C=1.0).fit(z[known, :k] / factor, labels[known, target])
                auc[fold, at, target] = roc_auc_score(
                    judged[asked, target], model.decision_function(z_test[asked, :k] / factor)
                )
    return auc.mean(axis=0)


def _components(fit: np.ndarray, test: np.ndarray, k: int, solver: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scaler, pca = StandardScaler(), PCA(min(k, fit.shape[1]), svd_solver=solver, random_state=0)
    z = pca.fit_transform(scaler.fit_transform(fit))
    return z, pca.transform(scaler.transform(test)), pca.explained_variance_


def measured_block(
    states: np.ndarray, correct: np.ndarray, folds: np.ndarray, ks: Sequence[int], share: bool, solver: str
) -> tuple[np.ndarray, float, int, float]:
    """`reference_layer` on one thread, CPU seconds; and the process that did it, with its peak MiB."""
    with threadpool_limits(1):
        started = time.process_time()
        auc = reference_layer(states, correct, folds, ks, share, solver)
        return auc, time.process_time() - started, os.getpid(), peak_mib()


def peak_mib() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
