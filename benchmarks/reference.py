"""The layer search written with scikit-learn: the reference for its speed (benchmarks.probe) and results (tests).

In: states of one layer key, labels, folds. Out: cross-validated AUC per number of components and target.
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
    """AUC [ks, targets], one fit at a time. With `share`, all targets and k of a fold share scaler and PCA.

    Scaler and PCA are fitted on all rows of the other folds, labelled or not. As in the search, the components share
    one factor that makes their mean variance 1. `solver` is the svd_solver of PCA; above 500 columns `auto` may be the
    inexact randomised solver.
    """
    n_folds = int(folds.max()) + 1
    auc = np.zeros((n_folds, len(ks), correct.shape[1]))
    for fold in range(n_folds):
        fit, test = states[folds != fold], states[folds == fold]
        labels, test_labels = correct[folds != fold], correct[folds == fold]
        shared = _components(fit, test, max(ks), solver) if share else None
        for at, k in enumerate(ks):
            for target in range(correct.shape[1]):
                z, z_test, variances = shared or _components(fit, test, k, solver)
                factor = np.sqrt(variances[:k].mean())
                known, test_known = ~np.isnan(labels[:, target]), ~np.isnan(test_labels[:, target])
                model = LogisticRegression(C=1.0).fit(z[known, :k] / factor, labels[known, target])
                auc[fold, at, target] = roc_auc_score(
                    test_labels[test_known, target], model.decision_function(z_test[test_known, :k] / factor)
                )
    return auc.mean(axis=0)


def _components(fit: np.ndarray, test: np.ndarray, k: int, solver: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scaler, pca = StandardScaler(), PCA(min(k, fit.shape[1]), svd_solver=solver, random_state=0)
    z = pca.fit_transform(scaler.fit_transform(fit))
    return z, pca.transform(scaler.transform(test)), pca.explained_variance_


def measured_layer(
    states: np.ndarray, correct: np.ndarray, folds: np.ndarray, ks: Sequence[int], share: bool, solver: str
) -> tuple[np.ndarray, float, int, float]:
    """`reference_layer` on one thread: (AUC, CPU seconds, process id, peak memory of the process in MiB)."""
    with threadpool_limits(1):
        started = time.process_time()
        auc = reference_layer(states, correct, folds, ks, share, solver)
        return auc, time.process_time() - started, os.getpid(), peak_mib()


def peak_mib() -> float:
    """Peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
