"""Logistic regression with a Gaussian prior on the weights, by the Laplace approximation.

In: inputs [rows, inputs] of one model, labels in [0, 1], and a prior: weights = mean + factor x v, v standard normal.
Out: the posterior mode, a factor of the posterior covariance, and the log evidence (MacKay 1992; Bishop 2006, 4.4).
With fewer rows than inputs the mode is found in the span of the rows. Knows nothing of trunks and targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import expit

ITERATIONS, TOLERANCE = 50, 1e-9  # of Newton's method; the tolerance is half the squared Newton decrement, in nats
HALVINGS = 30
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True)
class Prior:
    """Gaussian prior of the weights: mean, and a factor of the covariance (covariance = factor x factor')."""

    mean: Float[np.ndarray, " inputs"]
    factor: Float[np.ndarray, "inputs directions"]


@dataclass(frozen=True)
class Posterior:
    """Gaussian approximation of the posterior at its mode.

    `factor` is lower triangular, and factor x factor' is the covariance. `log_evidence` is the logarithm of the
    labels' marginal likelihood, in nats.
    """

    mean: Float[np.ndarray, " inputs"]
    factor: Float[np.ndarray, "inputs inputs"]
    log_evidence: float


@dataclass(frozen=True)
class Mode:
    """The mode in the coordinates v of the prior, and the log evidence. `posterior` adds the covariance."""

    prior: Prior
    v: Float[np.ndarray, " directions"]
    basis: Float[np.ndarray, "directions span"]  # orthonormal; the posterior equals the prior outside its span
    hessian: Float[np.ndarray, "span span"]
    log_evidence: float

    def posterior(self) -> Posterior:
        """The posterior of the weights."""
        lower = np.linalg.cholesky(self.hessian)
        inverse = solve_triangular(lower, np.eye(len(lower)), lower=True)  # inverse' x inverse = hessian^-1
        change = inverse.T - np.eye(len(lower))
        of_v = np.eye(len(self.v)) + self.basis @ change @ self.basis.T
        factor = self.prior.factor @ of_v
        _, triangular = np.linalg.qr(factor.T)
        square = np.zeros((len(factor), len(factor)))
        square[:, : len(triangular)] = triangular.T
        return Posterior(self.prior.mean + self.prior.factor @ self.v, square, self.log_evidence)


def find_mode(x: Float[np.ndarray, "rows inputs"], y: Float[np.ndarray, " rows"], prior: Prior) -> Mode:
    """The posterior mode and the log evidence, by Newton's method with step halving."""
    offset, z = x @ prior.mean, x @ prior.factor
    basis = np.eye(z.shape[1])
    if len(z) < z.shape[1]:
        basis, triangular = np.linalg.qr(z.T)
        z = triangular.T
    u = np.zeros(z.shape[1])
    loss, hessian = np.inf, np.eye(len(u))
    for _ in range(ITERATIONS):
        logits = offset + z @ u
        p = expit(logits)
        loss = _loss(logits, y, u)
        gradient = z.T @ (p - y) + u
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.eye(len(u))
        step = cho_solve(cho_factor(hessian), gradient)
        if gradient @ step < 2 * TOLERANCE:
            u = u - step
            break
        scale = 1.0
        for _ in range(HALVINGS):
            if _loss(offset + z @ (u - scale * step), y, u - scale * step) < loss:
                break
            scale /= 2
        u = u - scale * step
    return Mode(prior, basis @ u, basis, hessian, float(-loss - np.linalg.slogdet(hessian)[1] / 2))


def expected_sigmoid(
    mean: Float[np.ndarray, "*any"], variance: Float[np.ndarray, "*any"]
) -> tuple[Float[np.ndarray, "*any"], Float[np.ndarray, "*any"]]:
    """Mean and variance of sigmoid(l) for a normal l, by Gauss-Hermite quadrature."""
    values = expit(mean[..., None] + np.sqrt(variance)[..., None] * NODES)
    first = values @ WEIGHTS
    return first, np.maximum(np.square(values) @ WEIGHTS - np.square(first), 0.0)


def _loss(logits: np.ndarray, y: np.ndarray, u: np.ndarray) -> float:
    """Negative log posterior without the normalisation of the prior."""
    return float(np.logaddexp(0, logits).sum() - y @ logits + u @ u / 2)
