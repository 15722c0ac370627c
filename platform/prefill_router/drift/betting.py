"""Betting: a sequential alarm whose false alarm rate holds at every time.

In: the factors of bets on a stream: positive numbers whose conditional mean is at most 1 without drift. Out: `Wealth`.
Wealth that starts at 1 reaches 1/alpha at any time with probability at most alpha (Ville 1939), so that a look at every
observation costs nothing. Bets of several kinds and several starts are averaged: a stream that drifts late is not
penalised for the time before (Shin, Ramdas and Rinaldo 2024). Knows nothing of what is bet on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

START_EVERY = 100  # observations between two starts
NOVEL_SHAPES, NOVEL_SHARES = (2.0, 5.0, 15.0, 50.0), (0.1, 0.3, 0.9)
STAKES = (0.05, 0.1, 0.2, 0.4, 0.8)  # of bets on a mean


@dataclass(frozen=True)
class Wealth:
    """Logarithm of the wealth after each observation, and the alarm.

    `alarm_at`: the first observation at which the wealth is at least 1/alpha; None: there is none. `since`: the first
    observation of the stretch before the alarm on which the best bet won most, to START_EVERY observations.
    """

    log_wealth: Float[np.ndarray, " observations"]
    bound: float
    alarm_at: int | None
    since: int | None


def novelty_factors(p: Float[np.ndarray, " decisions"]) -> Float[np.ndarray, "decisions bets"]:
    """Factors of bets on small p-values: 1 - w + w b (1 - p)^(b - 1), a density on [0, 1] for each b and w.

    A bet (b, w) is the likelihood ratio of a stream in which the share w of the queries is novel. All factors decrease
    in p, so that a stream less novel than the reference does not raise the wealth either.
    """
    shapes, shares = (grid.ravel() for grid in np.meshgrid(NOVEL_SHAPES, NOVEL_SHARES))
    return 1 - shares + shares * shapes * (1 - p[:, None]) ** (shapes - 1)


def mean_factors(excess: Float[np.ndarray, " observations"]) -> Float[np.ndarray, "observations bets"]:
    """Factors of bets on a positive mean of `excess`, which is above -1.25: 1 + s excess for each stake s.

    Their conditional mean is at most 1 if that of the excess is at most 0 (Waudby-Smith and Ramdas 2024).
    """
    return 1 + excess[:, None] * np.array(STAKES)


def wealth(factors: Float[np.ndarray, "observations bets"], alpha: float, every: int = START_EVERY) -> Wealth:
    """The wealth of a mixture of bets and starts, with the bound 1/`alpha`.

    Start k = 1, 2, ... is before observation (k - 1) `every` and has the weight 1 / (k (k + 1)), in equal parts for
    each bet; the weights sum to 1. The capital of later starts is not bet before.
    """
    n, bets = factors.shape
    logs = np.log(factors)
    found, starts = np.empty(n), range(0, n, every)
    capital = np.full(bets, -np.inf)  # of the starts so far, by bet
    totals = np.zeros((len(starts) + 1, bets))  # log of the product of the factors before each start
    for k, start in enumerate(starts, start=1):
        grown = np.cumsum(logs[start : start + every], axis=0)
        capital = np.logaddexp(capital, -np.log(k * (k + 1) * bets))
        found[start : start + every] = np.logaddexp(np.logaddexp.reduce(capital + grown, axis=1), -np.log(k + 1))
        capital = capital + grown[-1]
        totals[k] = totals[k - 1] + grown[-1]
    bound = float(-np.log(alpha))
    crossed = np.flatnonzero(found >= bound)
    if not len(crossed):
        return Wealth(found, bound, None, None)
    alarm_at = int(crossed[0])
    last = alarm_at // every
    now = totals[last] + logs[last * every : alarm_at + 1].sum(axis=0)
    gains = now - totals[: last + 1]
    return Wealth(found, bound, alarm_at, int(gains.max(axis=1).argmax()) * every)
