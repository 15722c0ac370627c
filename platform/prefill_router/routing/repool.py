"""Changes of a router's pool without training: other prices, a model less, a model more.

In: a `Router`, and the change. Out: a `Router` whose other models have the same confidences bit for bit. Every change
keeps `c_min` and `c_max`, so that a lambda weighs a dollar as before, and the chosen lambda and the margin's bonus
(docs/equations.md, Changes of the pool). `manifest` records the change, and at the first one that adds or removes a
model the names of the trained targets. onboarding.py fits the head of a new model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefill_router.errors import InputError
from prefill_router.pool import Pool, TargetModel
from prefill_router.routing.added import AddedHead, ChangedPool
from prefill_router.routing.cost import CostModel, output_prices, unit_costs
from prefill_router.routing.policy import TrainingMeans
from prefill_router.routing.router import Router

TRAINED = "trained_targets"  # of the manifest: the models of the pool at the training
COST_FIELDS = (
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "cached_input_usd_per_mtok",
    "priced_as",
    "self_hosted",
)


@dataclass(frozen=True)
class NewTarget:
    """A model to add. `accuracy` and `cost_usd` (USD per query) are means over its labelled queries.

    `median_output` is in tokens. `token_ratio` is the mean ratio of its input tokens to the encoder's token count.
    """

    model: TargetModel
    head: AddedHead
    accuracy: float
    median_output: float
    token_ratio: float
    mean_input: float


def trained_targets(router: Router) -> int:
    """The number of targets that the trunk was trained on, also of those that were removed since."""
    return int(router.ensemble.layers[-1][1].shape[1])


def reprice(router: Router, prices: Pool) -> Router:
    """The router with the prices of `prices`; models that it does not name keep theirs.

    The mean cost of a model on the training queries follows from its median output length, and is approximate if the
    model uses the length head. Raises InputError for a model that is not in the router's pool.
    """
    known = dict(zip(router.pool.names, router.pool.models, strict=True))
    for at in router.pool.indices(prices.names):
        new = prices.models[prices.names.index(router.pool.names[at])]
        given = {name: getattr(new, name) for name in COST_FIELDS}
        kept = known[new.name].model_dump(exclude_unset=True, exclude=set(COST_FIELDS))
        known[new.name] = TargetModel.model_validate(
            kept | {name: value for name, value in given.items() if value is not None}
        )
    pool = Pool(models=tuple(known.values()))
    old = router.costs
    per_input, fixed = unit_costs(pool, old.median_output)
    costs = replace(old, per_input_token=per_input, fixed=fixed, per_output_token=output_prices(pool))
    changed = {
        name: {"before": _prices(before), "after": _prices(after)}
        for name, before, after in zip(pool.names, router.pool.models, pool.models, strict=True)
        if _prices(before) != _prices(after)
    }
    router = replace(router, pool=pool, costs=costs, manifest=_recorded(router, "repriced", changed), id="")
    if router.margin is None:
        return router
    means = router.margin.means
    moved = np.where([name in changed for name in pool.names], _mean_cost_norm(means, old, costs), means.cost_norm)
    return replace(router, margin=replace(router.margin, means=TrainingMeans(means.accuracy, moved)))


def remove_models(router: Router, names: Sequence[str]) -> Router:
    """The router without the models `names`: it decides as if no request allowed them.

    Raises InputError for a name that is not in the pool, or if no model is left.
    """
    gone = set(router.pool.indices(list(names)))
    left = np.array([at for at in range(len(router.pool.models)) if at not in gone], dtype=np.int64)
    if not len(left):
        raise InputError(f"remove: got all models of the pool ({', '.join(router.pool.names)}); keep one at least")
    changed = router.changed or _unchanged(router)
    columns, trained = changed.columns[left], trained_targets(router)
    used = [index for index in range(len(changed.heads)) if trained + index in columns]
    places = {trained + index: trained + place for place, index in enumerate(used)}
    columns = np.array([places.get(column, column) for column in columns.tolist()], dtype=np.int64)
    margin = router.margin
    if margin is not None:
        means = TrainingMeans(margin.means.accuracy[left], margin.means.cost_norm[left])
        margin = replace(margin, means=means)
    return replace(
        router,
        pool=Pool(models=tuple(router.pool.models[at] for at in left)),
        costs=_taken(router.costs, left),
        changed=ChangedPool(tuple(changed.heads[index] for index in used), columns),
        margin=margin,
        manifest=_recorded(router, "removed", {name: {} for name in names}),
        id="",
    )


def add_model(router: Router, new: NewTarget, record: Mapping[str, Any]) -> Router:
    """The router with a model more, the last of the pool. `record` is kept in the manifest.

    A model of this name that was added before is replaced. Raises InputError for a model that the trunk was trained on.
    """
    name = new.model.name
    check_new(router, name)
    if name in router.pool.names:
        router = remove_models(router, [name])
    changed = router.changed or _unchanged(router)
    pool = Pool(models=(*router.pool.models, new.model))
    old, margin = router.costs, router.margin
    median = np.append(old.median_output, new.median_output)
    per_input, fixed = unit_costs(pool, median)
    costs = CostModel(
        np.append(old.per_input_token, per_input[-1]),
        np.append(old.fixed, fixed[-1]),
        median,
        np.append(old.token_ratio, new.token_ratio),
        old.c_min,
        old.c_max,
        np.append(old.per_output_token, output_prices(pool)[-1]),
    )
    if margin is not None:
        usd = new.mean_input * per_input[-1] + fixed[-1]
        cost_norm = costs.normalise(np.array([[usd]]), extrapolate=True)[0]
        means = TrainingMeans(
            np.append(margin.means.accuracy, new.accuracy), np.append(margin.means.cost_norm, cost_norm)
        )
        margin = replace(margin, means=means)
    columns = np.append(changed.columns, trained_targets(router) + len(changed.heads))
    return replace(
        router,
        pool=pool,
        costs=costs,
        changed=ChangedPool((*changed.heads, new.head), columns),
        margin=margin,
        manifest=_recorded(router, "onboarded", {name: dict(record)}),
        id="",
    )


def check_new(router: Router, name: str) -> None:
    """Raises InputError if `name` is a model of the pool that the trunk was trained on."""
    columns = np.arange(len(router.pool.names)) if router.changed is None else router.changed.columns
    if name in router.pool.names and columns[router.pool.names.index(name)] < trained_targets(router):
        raise InputError(
            f"model: {name!r} is a model that the checkpoint was trained on; train again with the new labels, or "
            "remove it first (jobs.repool)"
        )


def _unchanged(router: Router) -> ChangedPool:
    return ChangedPool((), np.arange(len(router.pool.models)))


def _taken(costs: CostModel, left: np.ndarray) -> CostModel:
    names = ("per_input_token", "fixed", "median_output", "token_ratio", "per_output_token")
    return replace(costs, **{name: getattr(costs, name)[left] for name in names})


def _prices(model: TargetModel) -> dict[str, Any]:
    values = model.model_dump(mode="json", include=set(COST_FIELDS))
    return {name: value for name, value in values.items() if value is not None}


def _mean_cost_norm(means: TrainingMeans, old: CostModel, new: CostModel) -> np.ndarray:
    """Mean normalised costs with new prices: the mean input tokens are those that the old mean cost implies."""
    if old.c_max <= old.c_min:
        return means.cost_norm
    usd = old.c_min + means.cost_norm * (old.c_max - old.c_min)
    has_input, has_output = old.per_input_token > 0, old.fixed > 0
    mean_input = np.maximum(usd - old.fixed, 0) / np.where(has_input, old.per_input_token, 1)
    by_input = mean_input * new.per_input_token + new.fixed
    by_output = usd * new.fixed / np.where(has_output, old.fixed, 1)
    usd = np.where(has_input, by_input, np.where(has_output, by_output, new.fixed))
    return np.asarray(np.maximum((usd - old.c_min) / (old.c_max - old.c_min), 0.0))


def _recorded(router: Router, kind: str, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest with one more record of each change, which names the checkpoint that it was made from, if saved.

    The first change that adds or removes a model also records the names of the trained targets, in their order.
    """
    source = {"from": router.id} if router.id else {}
    record = [{"model": name, **source, **change} for name, change in changes.items()]
    targets = {TRAINED: list(router.pool.names)} if kind != "repriced" and router.changed is None else {}
    return {**router.manifest, **targets, kind: [*router.manifest.get(kind, []), *record]}
