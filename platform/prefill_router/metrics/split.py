"""Everything of an evaluation that no resample changes: choices, costs and exact paths of all routers.

In: `Predictions`. Out: `TestSplit`, from which `figures` computes every figure on every resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from prefill_router.metrics import curves
from prefill_router.metrics.bootstrap import largest_resample
from prefill_router.metrics.lambda_path import LambdaPath, lambda_path
from prefill_router.metrics.predictions import Predictions
from prefill_router.metrics.utility import StaticChoices, router_utility
from prefill_router.outcomes.table import partitions
from prefill_router.routing.policy import LAMBDAS, choose


@dataclass(frozen=True)
class Curve:
    """The choices of one router at each lambda of the sweep and, as the last point, at its chosen lambda.

    `correct` and `cost` are the labels and costs (USD per query) of these choices, `second` is the second choice at
    lambda 0 and `charged` the cost of every model. Both costs include the router's own overhead. `utility` is that of
    the choices at UTILITY_LAMBDAS.
    """

    choices: Int[np.ndarray, "points complete"]
    correct: Float[np.ndarray, "complete points"]
    cost: Float[np.ndarray, "complete points"]
    second: Int[np.ndarray, " complete"]
    path: LambdaPath
    charged: Float[np.ndarray, "complete models"]
    overhead: float
    utility: Float[np.ndarray, "complete lambdas"]


@dataclass(frozen=True)
class TestSplit:
    """All inputs that no resample changes. Arrays over `complete` hold the queries with a label for every model.

    Costs are on an exact grid. `strong` and `weak` are the most accurate and the cheapest model (RouteLLM's pair).
    `disagreement` is the same for the queries on which models disagree: None if there are none, or if this object is
    such a part itself. `static` is None if the predictions have no means of the training queries.
    """

    predictions: Predictions
    correct: Float[np.ndarray, "complete models"]
    cost: Float[np.ndarray, "complete models"]
    oracle_correct: Float[np.ndarray, "complete 1"]
    oracle_cost: Float[np.ndarray, "complete 1"]
    curves: dict[str, Curve]
    benchmarks: tuple[str, ...]
    of_benchmark: Bool[np.ndarray, "queries benchmarks"]
    strong: int
    weak: int
    in_disagreement: Bool[np.ndarray, " queries"]
    disagreement: TestSplit | None
    static: StaticChoices | None

    @property
    def complete(self) -> Bool[np.ndarray, " queries"]:
        return self.predictions.complete


def prepare(predictions: Predictions, parts: bool = True) -> TestSplit:
    """Computes everything that does not depend on the resample, such as all choices of all routers.

    `parts` False leaves out the disagreement part.
    """
    complete = predictions.complete
    arrays = (predictions.correct, predictions.cost, predictions.cost_norm)
    correct, raw_cost, cost_norm = (values[complete] for values in arrays)
    overheads = np.array([[router.overhead_usd for router in predictions.routers.values()]])
    gridded = curves.on_exact_grid(
        np.column_stack([raw_cost, np.repeat(overheads, len(raw_cost), axis=0)]), largest_resample(predictions.groups)
    )
    cost = gridded[:, : len(predictions.models)]
    router_curves = {}
    for index, (name, router) in enumerate(predictions.routers.items()):
        p, charged = router.p[complete], cost + gridded[:, [len(predictions.models) + index]]
        margin = predictions.margin(name)
        choices = curves.sweep(p, raw_cost, cost_norm, np.append(LAMBDAS, router.chosen_lambda), margin)
        others = choices[0][:, None] != np.arange(p.shape[1])
        second = choose(p, raw_cost, cost_norm, 0.0, others, margin) if p.shape[1] > 1 else choices[0]
        router_curves[name] = Curve(
            choices,
            curves.picked(correct, choices),
            curves.picked(charged, choices),
            second,
            lambda_path(p, raw_cost, cost_norm, margin),
            charged,
            router.overhead_usd,
            router_utility(choices, correct, cost_norm),
        )
    right = (correct == 1).any(axis=1, keepdims=True)
    cheapest_right = np.where(correct == 1, cost, np.inf).min(axis=1, keepdims=True)
    benchmarks = tuple(sorted(set(predictions.benchmarks)))
    disagree = partitions(predictions.correct) == "disagreement"
    part = prepare(predictions.take(disagree), parts=False) if parts and disagree.any() else None
    mean_cost, accuracy = (values.sum(axis=0) for values in (cost, correct))
    strong, weak = np.lexsort((mean_cost, -accuracy))[0], np.lexsort((-accuracy, mean_cost))[0]
    return TestSplit(
        predictions,
        correct,
        cost,
        right.astype(np.float64),
        np.where(right, cheapest_right, cost.min(axis=1, keepdims=True)),
        router_curves,
        benchmarks,
        np.stack([predictions.benchmarks == name for name in benchmarks], axis=1).astype(bool),
        int(strong),
        int(weak),
        disagree,
        part,
        None if predictions.training is None else StaticChoices.of(predictions.training, correct, cost_norm),
    )
