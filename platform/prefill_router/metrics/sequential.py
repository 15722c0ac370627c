"""Anytime-valid comparison of two means: canary less live, of outcomes in [0, 1], tested after every outcome.

In: the number of outcomes of each arm and their sum. Out: log evidence against a null hypothesis, and a verdict about a
band. The evidence is an e-process: under the null hypothesis it ever reaches log(1/alpha) with a probability of at most
alpha (Ville 1939), so that looking at it often costs nothing. Only the counts matter, not their order.

For a mean m, the beta-binomial mixture M(m) = B(a + S, b + n - S) / (B(a, b) m^S (1 - m)^(n - S)) of n outcomes with
sum S is a nonnegative supermartingale of mean at most 1 (Robbins 1970; Howard, Ramdas, McAuliffe and Sekhon 2021,
Proposition 7): exactly 1 for outcomes 0 and 1, and less for others, by convexity (Hoeffding 1963). The product over two
arms is one for the pair of their means, and its minimum over a null hypothesis about the difference is the evidence.

Assumes that an outcome has the mean of its arm whatever the outcomes before it were. Knows nothing of servers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import betaln, xlogy

PRIOR = 0.5  # a = b: Jeffreys' prior, which loses little at means near 0 and 1
STEPS = 30  # of bisections: an error of 1e-9 in a mean, and of its square in the minimum
EDGE = 1e-12  # distance of means from 0 and 1

Verdict = Literal["healthy", "broken", "undecided"]
Counts = Float[np.ndarray, "*streams"]


@dataclass(frozen=True)
class Sample:
    """The outcomes of one arm: their number, and their sum."""

    n: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        """The mean outcome; None without outcomes."""
        return self.total / self.n if self.n else None


def log_mixture(n: Counts, total: Counts, mean: Counts) -> Counts:
    """log M(mean) for `n` outcomes with this total; 0 without outcomes."""
    prior = betaln(PRIOR + total, PRIOR + n - total) - betaln(PRIOR, PRIOR)
    return prior - xlogy(total, mean) - xlogy(n - total, 1 - mean)


def log_evidence(live_n: Counts, live_total: Counts, n: Counts, total: Counts, margin: float) -> Counts:
    """Log evidence against a difference of at most `margin`: that the canary's mean is higher than live's by more.

    `n` and `total` are the canary's; `margin` is in (-1, 1), and may be negative.
    """
    # The minimum of M0(p) M1(q) over q - p <= margin: at the two mean outcomes if they fulfil it, else on
    # q - p = margin, where the logarithm is convex in p.
    live_mean, mean = live_total / np.maximum(live_n, 1), total / np.maximum(n, 1)
    inside = (mean - live_mean <= margin) | (live_n == 0) | (n == 0)
    low = np.full(np.shape(inside), max(0.0, -margin) + EDGE)
    high = np.full(np.shape(inside), min(1.0, 1.0 - margin) - EDGE)
    for _ in range(STEPS):
        middle = (low + high) / 2
        other = middle + margin
        slope = (live_n - live_total) / (1 - middle) - live_total / middle + (n - total) / (1 - other) - total / other
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    p = np.where(inside, live_mean, (low + high) / 2)
    q = np.where(inside, mean, p + margin)
    return np.asarray(log_mixture(live_n, live_total, p) + log_mixture(n, total, q))


def verdict(live: Sample, canary: Sample, margin: float, alpha: float) -> Verdict:
    """Whether the canary's mean outcome, of which less is better, exceeds live's by more than `margin`.

    `broken`: it is shown to; `healthy`: it is shown not to; each is wrong with a probability of at most `alpha`, over
    all times at which it is asked.
    """
    counts = (live.n, live.total, canary.n, canary.total)
    live_n, live_total, n, total = (np.array([float(one)]) for one in counts)
    bar = math.log(1 / alpha)
    if log_evidence(live_n, live_total, n, total, margin)[0] >= bar:
        return "broken"
    # 1 - outcome turns `at least margin` into `at most -margin`.
    if log_evidence(live_n, live_n - live_total, n, n - total, -margin)[0] >= bar:
        return "healthy"
    return "undecided"
