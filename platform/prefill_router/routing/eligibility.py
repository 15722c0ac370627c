"""Eligibility: the models of the pool that can answer a query, before any score.

In: the requirements of a request, estimated token counts and costs. Out: the eligible models of each query, and the
reason for every other model. Filters, in this order: the request's models, capabilities, context window, cost limit.
A model that is offered as fallback only (pool.yaml, `fallback_only`) and passes them is eligible if no other model is.
Knows nothing of confidences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from jaxtyping import Bool, Float

from prefill_router.errors import InputError
from prefill_router.pool import Capability, Pool

# The field of a request that each filter reads, and how to let a model pass. The order is that of the filters.
WAYS_OUT = {
    "models": "name more models of the pool",
    "require": "add a model with these capabilities to the pool, or declare them in pool.yaml",
    "prompt": "shorten the prompt or its answer, or add a model with a larger context window",
    "max_cost_usd": "allow a higher cost or more models",
}
FALLBACK_ONLY = len(WAYS_OUT)  # in `Eligibility.failed`: other models are eligible


@dataclass(frozen=True)
class Requirements:
    """Requirements of a request that a model must meet to be a candidate, and what its cost depends on.

    `models`: names of the models to choose from; None: all. `capabilities`: features that the request uses.
    `max_cost_usd`: maximum estimated cost of a query in USD; None: no limit. `max_output_tokens`: maximum number of
    tokens of the answer; None: the model's expected output tokens. `added_tokens`: input tokens that the
    encoder does not read, such as tool definitions. `cached`: a model and the input tokens in its prompt cache, which
    have the price of cached input; None: no model has any.
    """

    models: tuple[str, ...] | None = None
    capabilities: frozenset[Capability] = frozenset()
    max_cost_usd: float | None = None
    max_output_tokens: int | None = None
    added_tokens: int = 0
    cached: tuple[str, int] | None = None


def check_capabilities(names: Iterable[str]) -> frozenset[Capability]:
    """The names as a set. Raises InputError for a name that is not a capability."""
    known = get_args(Capability)
    for name in names:
        if name not in known:
            raise InputError(f"require: got {name!r}, allowed are {', '.join(known)}")
    return frozenset(cast(Iterable[Capability], names))


@dataclass(frozen=True)
class Excluded:
    """A model that is not a candidate, and the reason. `fallback`: it may answer if no candidate does."""

    model: str
    reason: str
    fallback: bool = False


@dataclass(frozen=True)
class Eligibility:
    """The eligible models of every query, and the first filter that each other model fails.

    `failed` has the index of the filter in `WAYS_OUT` or FALLBACK_ONLY, -1 for an eligible model.
    """

    pool: Pool
    requirements: Requirements
    input_tokens: Float[np.ndarray, "queries models"]
    output_tokens: Float[np.ndarray, "queries models"]
    cost: Float[np.ndarray, "queries models"]
    failed: np.ndarray

    @property
    def allowed(self) -> Bool[np.ndarray, "queries models"]:
        return self.failed < 0

    def excluded(self, row: int) -> tuple[Excluded, ...]:
        """The models that are not candidates of query `row`, in pool order."""
        return tuple(
            Excluded(self.pool.names[m], self._reason(row, m), bool(self.failed[row, m] == FALLBACK_ONLY))
            for m in np.flatnonzero(self.failed[row] >= 0).tolist()
        )

    def check(self) -> None:
        """Raises InputError for a query without an eligible model, with the reason for every model."""
        empty = np.flatnonzero(~self.allowed.any(axis=1))
        if not len(empty):
            return
        row = int(empty[0])
        # The model that passes most filters shows the nearest way out.
        field, way_out = list(WAYS_OUT.items())[int(self.failed[row].max())]
        reasons = "; ".join(
            f"{one.model}: {one.reason}"
            for one, failed in zip(self.excluded(row), self.failed[row], strict=True)
            if failed > 0
        )
        query = "this query" if len(self.failed) == 1 else f"query {row} of the batch, counted from 0"
        more = "name more models, or " if self.requirements.models is not None and field != "models" else ""
        raise InputError(f"{field}: no model is left for {query} ({reasons or 'none is named'}); {more}{way_out}")

    def _reason(self, row: int, model: int) -> str:
        if self.failed[row, model] == FALLBACK_ONLY:
            return "fallback_only: it answers by name, or if no candidate does"
        match list(WAYS_OUT)[int(self.failed[row, model])]:
            case "models":
                return "not in the request's models"
            case "require":
                missing = self.requirements.capabilities - set(self.pool.models[model].capabilities)
                return f"does not declare {', '.join(sorted(missing))}"
            case "prompt":
                tokens = self.input_tokens[row, model], self.output_tokens[row, model]
                return (
                    f"about {tokens[0]:,.0f} input and {tokens[1]:,.0f} output tokens exceed the context window of "
                    f"{self.pool.models[model].context_tokens:,}"
                )
            case _:
                return (
                    f"estimated cost {self.cost[row, model]:.3g} USD exceeds the maximum of "
                    f"{self.requirements.max_cost_usd:g} USD"
                )


def eligibility(
    pool: Pool,
    requirements: Requirements,
    input_tokens: Float[np.ndarray, "queries models"],
    expected_output: Float[np.ndarray, "queries models"],
    cost: Float[np.ndarray, "queries models"],
) -> Eligibility:
    """The eligible models of every query. `input_tokens`, `expected_output` (tokens) and `cost` (USD) are estimates.

    A model without declared context window has no limit; a model without declared capabilities has none. Raises
    InputError for a name in `requirements.models` that is not in the pool, and for limits that are out of bounds.
    """
    listed = np.zeros(len(pool.models), dtype=bool)
    listed[pool.indices(pool.names if requirements.models is None else requirements.models)] = True
    capable = np.array([requirements.capabilities <= set(model.capabilities) for model in pool.models])
    window = np.array([model.context_tokens or np.inf for model in pool.models])
    given = requirements.max_output_tokens
    output = expected_output if given is None else np.full(cost.shape, float(given))
    if given is not None and given < 1:
        raise InputError(f"max_output_tokens: got {given}, allowed is at least 1, or None for the expected tokens")
    limit = np.inf if requirements.max_cost_usd is None else requirements.max_cost_usd
    if not limit >= 0:
        raise InputError(f"max_cost_usd: got {limit}, allowed is a number of at least 0, or None for no limit")
    passed: Sequence[np.ndarray] = (listed, capable, input_tokens + output <= window, cost <= limit)
    failed = np.full(cost.shape, -1)
    for index, fine in reversed(list(enumerate(passed))):
        failed = np.where(fine, failed, index)
    fallback_only = np.array([model.fallback_only for model in pool.models])
    others = ((failed < 0) & ~fallback_only).any(axis=1, keepdims=True)
    failed = np.where((failed < 0) & fallback_only & others, FALLBACK_ONLY, failed)
    return Eligibility(pool, requirements, input_tokens, output, cost, failed)
