"""Traffic: the decisions of one checkpoint in a decision log, and the feedback on their answers, as arrays.

In: decisions of a log (decisions/log.py). Out: `Traffic`. Feedback counts for the model that answered, or that a
decision of /v1/route chose; the last feedback on a decision counts. Knows nothing of tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prefill_router.decisions.log import rated_model
from prefill_router.decisions.replay import LoggedDecisions, logged_decisions
from prefill_router.errors import InputError
from prefill_router.metrics.predictions import Predictions

UNKNOWN = "unknown"  # domain of a decision without the field


@dataclass(frozen=True)
class Feedback:
    """Feedback in the order in which it came.

    `model`: position in the pool of the model that is rated. `confidence`: the router's for this model. `score`: in
    [0, 1]. `propensity`: probability that the model was asked; NaN if unknown. `time`: Unix, s. `decision`: position in
    the traffic.
    """

    model: Int[np.ndarray, " feedback"]
    confidence: Float[np.ndarray, " feedback"]
    score: Float[np.ndarray, " feedback"]
    propensity: Float[np.ndarray, " feedback"]
    time: Float[np.ndarray, " feedback"]
    decision: Int[np.ndarray, " feedback"]
    domain: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Traffic:
    """Decisions in the order of their times. `others`: number of decisions of other checkpoints, which are left out."""

    models: tuple[str, ...]
    decisions: LoggedDecisions
    time: Float[np.ndarray, " decisions"]
    feedback: Feedback
    others: int

    def __len__(self) -> int:
        return len(self.decisions.ids)


def read_traffic(
    log: Mapping[str, Mapping[str, Any]],
    models: Sequence[str],
    checkpoint: str,
    domain: str = "key",
    correct_from: float | None = None,
) -> Traffic:
    """The traffic of `checkpoint` in a log; `models` are the names of its pool.

    `domain`: field of the decision records that groups the feedback. `correct_from`: a score of at least this value
    counts as 1, any other as 0; None: scores as they are. Raises InputError as `logged_decisions` does.
    """
    decisions = logged_decisions(log, models, checkpoint)
    position = {name: index for index, name in enumerate(models)}
    rows: list[tuple[int, float, float, float, float, int]] = []
    domains: list[str] = []
    for row, name in enumerate(decisions.ids):
        one = log[name]
        served, found = position.get(rated_model(name, one) or ""), one.get("feedback")
        if served is None or not found or np.isnan(decisions.p[row, served]):
            continue
        record, score = one["decision"], float(found[-1]["score"])
        known = record.get("propensity") if record.get("model") == models[served] else None
        rows.append(
            (
                served,
                float(decisions.p[row, served]),
                score if correct_from is None else float(score >= correct_from),
                float("nan") if known is None else float(known),
                float(found[-1].get("time", record.get("time", 0.0))),
                row,
            )
        )
        domains.append(str(record.get(domain) or UNKNOWN))
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 6)
    order = np.argsort(table[:, 4], kind="stable")
    table = table[order]
    feedback = Feedback(
        table[:, 0].astype(np.int64),
        table[:, 1],
        table[:, 2],
        table[:, 3],
        table[:, 4],
        table[:, 5].astype(np.int64),
        tuple(domains[at] for at in order),
    )
    times = np.array([log[name]["decision"].get("time", 0.0) for name in decisions.ids], dtype=np.float64)
    decided = sum(bool(one["decision"].get("candidates")) for one in log.values())
    return Traffic(tuple(models), decisions, times, feedback, decided - len(decisions.ids))


def reference_confidences(
    predictions: Predictions, models: Sequence[str], router: str = "prefill"
) -> Float[np.ndarray, "queries models"]:
    """Confidences of the test split for `models`. Raises InputError if the router or a model is not in the file."""
    if router not in predictions.routers or set(models) - set(predictions.models):
        raise InputError(
            f"evaluation: it has the routers {', '.join(predictions.routers)} and the models "
            f"{', '.join(predictions.models)}, but not {router!r} with {', '.join(models)}; give the evaluation of the "
            "checkpoint"
        )
    return predictions.routers[router].p[:, [predictions.models.index(name) for name in models]]
