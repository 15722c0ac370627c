"""The figures of an evaluation, as one frozen dataclass per group of figures.

The type parameter T of every class is the type of one figure: `Draws` (an array [resamples]) while the bootstrap runs,
`Interval` in the result. Fields are in the order of metrics.json. The metadata of a field hold the reason why its
figure can be undefined; a field without a reason inherits that of the enclosing group, and finally `DEFAULT`.
Definitions: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from prefill_router.metrics.bootstrap import Interval, Json, interval

T = TypeVar("T")
Draws = np.ndarray  # [resamples], NaN if undefined
NO_COMPLETE_LABELS = "no query has a label for every model"


@dataclass(frozen=True)
class Undefined:
    """Why a figure is undefined: `reason`, unless a more general reason applies to the split.

    `needs_complete`: the figure needs queries with a label for every model. `needs_plane`: it also needs the
    normalised plane (docs/equations.md, Eq. 7-8).
    """

    reason: str
    needs_complete: bool = True
    needs_plane: bool = False

    def why(self, no_plane: str) -> str:
        """The reason on one split; `no_plane` is `Anchors.why_undefined` of that split."""
        if self.needs_complete and no_plane == NO_COMPLETE_LABELS:
            return NO_COMPLETE_LABELS
        return (no_plane if self.needs_plane else "") or self.reason


def reason(text: str, *, needs_complete: bool = True, needs_plane: bool = False) -> dict[str, Any]:
    """Metadata of a field: see `Undefined`."""
    return {"undefined": Undefined(text, needs_complete, needs_plane)}


DEFAULT = Undefined("no query of this part has a label for every model")
PLANE = reason("it is undefined here", needs_plane=True)
ONE_CLASS = reason("the labels do not hold both classes", needs_complete=False)
NO_LABELS = reason("there are no labels", needs_complete=False)
NO_HEADROOM = reason("the oracle is no better than the best single model")
ALL_FREE = reason("every model is free")
INLINE = {"inline": True}  # the group's members belong to the enclosing JSON object
CENTRED = {"centred": True}  # see `bootstrap.interval`
BY_NAME = {"by_name": True}  # per model or benchmark; differences between routers leave it out


@dataclass(frozen=True)
class MeanFigure(Generic[T]):
    """A figure per model, and its mean over the models for which it is defined."""

    mean: T = field(metadata=INLINE)
    per_model: Mapping[str, T] = field(metadata=BY_NAME)


@dataclass(frozen=True)
class ConfidenceFigures(Generic[T]):
    """Discrimination and calibration of the confidences, over all labelled pairs."""

    auc: MeanFigure[T] = field(metadata=ONE_CLASS)
    brier: MeanFigure[T] = field(metadata=NO_LABELS)
    ece: MeanFigure[T] = field(metadata=NO_LABELS | CENTRED)


@dataclass(frozen=True)
class NearMissFigures(Generic[T]):
    """Shares of the queries whose first choice is wrong."""

    second_right: T
    narrow: T
    near_miss: T


@dataclass(frozen=True)
class CurveFigures(Generic[T]):
    """The accuracy-cost curve of one router, its most accurate point and its point at the chosen lambda."""

    p_auccc: T = field(metadata=PLANE)
    mdp_auccc: T = field(metadata=PLANE)
    p_auccc_exact: T = field(metadata=PLANE)
    mdp_auccc_exact: T = field(metadata=PLANE)
    p_auccc_exact_over_hull: T = field(metadata=PLANE)
    efficacy: T = field(metadata=PLANE)
    oracle_accuracy: T
    best_single_accuracy: T
    routed_to_accuracy: T
    cost_saving_over_best_single_at_chosen_lambda: T = field(metadata=ALL_FREE)
    break_even_overhead_usd: T
    max_router_accuracy: T
    cost_at_max_accuracy: T
    accuracy_gain: T
    headroom_captured: T = field(metadata=NO_HEADROOM)
    cost_saving: T = field(metadata=ALL_FREE)
    accuracy_at_chosen_lambda: T
    cost_at_chosen_lambda: T
    accuracy_gain_at_chosen_lambda: T
    headroom_captured_at_chosen_lambda: T = field(metadata=NO_HEADROOM)
    cost_saving_at_chosen_lambda: T = field(metadata=ALL_FREE)


@dataclass(frozen=True)
class CostTradeoff(Generic[T]):
    """LLMRouterBench: performance and cost along the sweep."""

    perf_gain: T
    cost_save: T = field(
        metadata=reason("no point of the sweep is as accurate as the best single model, or it is free")
    )


@dataclass(frozen=True)
class MacroGains(Generic[T]):
    """LLMRouterBench: performance at the chosen lambda, averaged over benchmarks."""

    avg_acc: T
    gain_over_random: T
    gain_over_best_single: T
    gap_to_oracle: T


@dataclass(frozen=True)
class LLMRouterBenchFigures(Generic[T]):
    """`gains` and `pareto_dist` exist on the full test split only."""

    tradeoff: CostTradeoff[T] = field(metadata=INLINE)
    gains: MacroGains[T] | None = field(metadata=INLINE)
    pareto_dist: T | None = field(metadata=PLANE)


@dataclass(frozen=True)
class Optimality(Generic[T]):
    """RouterArena: the router's choices compared with the oracle's."""

    optimal_selection: T
    optimal_accuracy: T
    optimal_cost: T


@dataclass(frozen=True)
class RouterArenaFigures(Generic[T]):
    """`optimality` exists on the full test split only."""

    arena_score: T
    optimality: Optimality[T] | None = field(metadata=INLINE)


@dataclass(frozen=True)
class RouterBenchFigures(Generic[T]):
    """Average improvement in quality."""

    aiq: T = field(metadata=reason("all models cost the same on average"))


@dataclass(frozen=True)
class RouteLLMFigures(Generic[T]):
    """The performance gap between a strong and a weak model that the router's ranking recovers."""

    apgr: T
    cpt_20: T
    cpt_50: T
    cpt_80: T


@dataclass(frozen=True)
class LiteratureFigures(Generic[T]):
    """Figures of other router benchmarks. `routellm` exists on the full test split only."""

    llmrouterbench: LLMRouterBenchFigures[T] = field(
        metadata=reason("in no benchmark is the model compared with ever right")
    )
    routerarena: RouterArenaFigures[T] = field(
        metadata=reason("no model answers any query, or the router costs nothing")
    )
    routerbench: RouterBenchFigures[T]
    routellm: RouteLLMFigures[T] | None = field(
        metadata=reason("the strongest model is no more accurate than the cheapest, or recovers too little")
    )


@dataclass(frozen=True)
class SplitFigures(Generic[T]):
    """Figures of one router on the full test split, or on its queries on which models disagree."""

    confidence: ConfidenceFigures[T] = field(metadata=INLINE)
    near_misses: NearMissFigures[T] = field(metadata=reason("no first choice was wrong"))
    curve: CurveFigures[T] = field(metadata=INLINE)
    literature: LiteratureFigures[T]


@dataclass(frozen=True)
class RoutedToFigures(Generic[T]):
    """One model on the queries routed to it at lambda 0."""

    share: T
    accuracy: T
    accuracy_delta: T
    cost_delta: T


@dataclass(frozen=True)
class BenchmarkFigures(Generic[T]):
    """One router within one benchmark, or the mean over benchmarks."""

    auc: T = field(metadata=ONE_CLASS)
    accuracy_at_chosen_lambda: T
    routed_to_accuracy: T


@dataclass(frozen=True)
class UtilityFigures(Generic[T]):
    """By lambda: utility, and its difference from the best static choice; empty without means of training queries."""

    utility: Mapping[str, T]
    utility_over_best_static: Mapping[str, T]


@dataclass(frozen=True)
class RouterFigures(Generic[T]):
    """All figures of one router. `disagreement` is None if models disagree on no query."""

    split: SplitFigures[T] = field(metadata=INLINE)
    utility: UtilityFigures[T] = field(metadata=INLINE)
    routed_to: Mapping[str, RoutedToFigures[T]] = field(
        metadata=BY_NAME | reason("no query is routed to the model, or every query is")
    )
    macro: BenchmarkFigures[T]
    benchmarks: Mapping[str, BenchmarkFigures[T]] = field(metadata=BY_NAME)
    disagreement: SplitFigures[T] | None


@dataclass(frozen=True)
class OperatingPoint(Generic[T]):
    """Accuracy and mean cost (USD per query) of one model, or of a model chosen at random."""

    accuracy: T
    cost: T


@dataclass(frozen=True)
class BestStaticFigures(Generic[T]):
    """The model with the highest mean utility on the training queries, on the test queries; cost in USD per query."""

    utility: T
    accuracy: T
    cost: T


@dataclass(frozen=True)
class ModelOnlyFigures(Generic[T]):
    """The curve through the Pareto-optimal single models."""

    p_auccc: T = field(metadata=PLANE)
    efficacy: T = field(metadata=PLANE)


@dataclass(frozen=True)
class PoolBenchmarkFigures(Generic[T]):
    """Best single model and oracle within one benchmark, or the mean over benchmarks."""

    best_single_accuracy: T
    oracle_accuracy: T


@dataclass(frozen=True)
class PoolFigures(Generic[T]):
    """Figures of the pool, without any router. Costs are in USD per query."""

    models: Mapping[str, OperatingPoint[T]]
    oracle_accuracy: T
    oracle_cost: T
    best_single_accuracy: T
    best_single_cost: T
    best_static: Mapping[str, BestStaticFigures[T]]
    model_only: ModelOnlyFigures[T]
    mixture_hull_p_auccc: T = field(metadata=PLANE)
    random_choice: OperatingPoint[T]
    macro: PoolBenchmarkFigures[T]
    benchmarks: Mapping[str, PoolBenchmarkFigures[T]] = field(metadata=BY_NAME)


@dataclass(frozen=True)
class EvaluationFigures(Generic[T]):
    """Everything that the bootstrap computes."""

    pool: PoolFigures[T]
    routers: Mapping[str, RouterFigures[T]]


def split_columns(group: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """A group of arrays [resamples names] as one group of arrays [resamples] per name."""
    return {
        name: type(group)(**{member.name: getattr(group, member.name)[:, i] for member in fields(group)})
        for i, name in enumerate(names)
    }


def difference(one: RouterFigures[Draws], other: RouterFigures[Draws]) -> RouterFigures[Draws]:
    """Paired differences `one` minus `other`, without the figures per model and per benchmark."""
    return _minus(one, other)


def _minus(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return None
    if isinstance(one, Mapping):
        return {name: _minus(part, other[name]) for name, part in one.items()}
    if is_dataclass(one):
        group: Any = type(one)
        return group(
            **{
                member.name: {}
                if member.metadata.get("by_name")
                else _minus(getattr(one, member.name), getattr(other, member.name))
                for member in fields(one)
            }
        )
    return one - other


def pool_intervals(figures: PoolFigures[Draws], no_plane: str) -> PoolFigures[Interval]:
    """The pool's figures with an `Interval` for each array; `no_plane` is `Anchors.why_undefined`."""
    return _intervals(figures, no_plane, True, DEFAULT, False)


def router_intervals(
    figures: RouterFigures[Draws], no_plane: str, no_plane_in_disagreement: str, *, centre: bool = True
) -> RouterFigures[Interval]:
    """A router's figures with an `Interval` for each array.

    The last two strings are `Anchors.why_undefined` of the full split and of its disagreement part. `centre` False
    ignores `centred`: a difference can be negative.
    """
    part = _intervals(figures.disagreement, no_plane_in_disagreement, centre, DEFAULT, False)
    full = _intervals(replace(figures, disagreement=None), no_plane, centre, DEFAULT, False)
    return replace(full, disagreement=part)


def _intervals(value: Any, no_plane: str, centre: bool, undefined: Undefined, centred: bool) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _intervals(part, no_plane, centre, undefined, centred) for name, part in value.items()}
    if not is_dataclass(value):
        return interval(value, undefined.why(no_plane), centred=centre and centred)
    group: Any = type(value)
    return group(
        **{
            member.name: _intervals(
                getattr(value, member.name),
                no_plane,
                centre,
                member.metadata.get("undefined") or undefined,
                centred or bool(member.metadata.get("centred")),
            )
            for member in fields(value)
        }
    )


def to_json(value: Any) -> Json:
    """A group of intervals as in metrics.json; groups that are None or empty are left out."""
    if isinstance(value, Interval):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: to_json(part) for name, part in value.items()}
    tree: Json = {}
    for member in fields(value):
        part = getattr(value, member.name)
        if part is None or part == {}:
            continue
        tree |= to_json(part) if member.metadata.get("inline") else {member.name: to_json(part)}
    return tree
