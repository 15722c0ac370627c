"""Eligibility and costs of decisions: context windows, capabilities, reasons, prompts beyond the training range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from builders import ENCODER, make_router, rows_of

from prefill_router.errors import InputError
from prefill_router.pool import Pool
from prefill_router.routing.eligibility import Excluded, Requirements, check_capabilities
from prefill_router.routing.router import Router

EXTRA = {
    "small": {"context_tokens": 1_000, "capabilities": ["tools"]},
    "medium": {"context_tokens": 8_192, "capabilities": ["tools", "json"]},
    "large": {},
}


@pytest.fixture(scope="module")
def made() -> tuple[Router, dict[str, pa.Table]]:
    """A router over small (1,000 tokens), medium (8,192 tokens) and large (no limit), and the rows of two queries."""
    fitted, _, states = make_router()
    models = [model.model_dump(exclude_unset=True) | EXTRA[model.name] for model in fitted.router.pool.models]
    costs = replace(fitted.router.costs, token_ratio=np.ones(3))
    return replace(fitted.router, pool=Pool.model_validate({"models": models}), costs=costs), rows_of(states, [0, 1])


def with_counts(rows: dict[str, pa.Table], **counts: list[int]) -> dict[str, pa.Table]:
    table = rows[ENCODER]
    for name, values in counts.items():
        column = pa.array(values, pa.int32())
        index = table.column_names.index(name) if name in table.column_names else -1
        table = table.append_column(name, column) if index < 0 else table.set_column(index, name, column)
    return {ENCODER: table}


def test_a_prompt_beyond_a_context_window_excludes_the_model_with_the_reason(made):
    router, rows = made
    short, long = router.decide(with_counts(rows, n_tokens=[12, 40_000]), 1.0)
    assert short.excluded == ()
    assert [one.model for one in long.excluded] == ["small", "medium"]
    assert long.model == "large"
    assert long.excluded[1].reason == (
        f"about 40,000 input and {router.costs.median_output[1]:,.0f} output tokens exceed the context window of 8,192"
    )


def test_cached_input_costs_less_and_counts_in_the_score(made):
    router, rows = made
    one = {name: table.slice(0, 1) for name, table in with_counts(rows, n_tokens=[1_000, 1_000]).items()}
    models = list(router.pool.models)
    models[2] = models[2].model_copy(update={"cached_input_usd_per_mtok": 0.25 * models[2].input_usd_per_mtok})
    cheaper = replace(router, pool=Pool(models=tuple(models)))

    def of(router: Router, cached: tuple[str, int] | None) -> dict[str, tuple[float, float]]:
        (decision,) = router.decide(one, 0.4, Requirements(cached=cached))
        return {each.model: (each.cost_usd, each.score) for each in decision.candidates}

    plain = of(cheaper, None)
    saved = 0.75 * router.costs.per_input_token[2] * 800
    found = of(cheaper, ("large", 800))
    assert found["large"][0] == pytest.approx(plain["large"][0] - saved)
    assert found["large"][1] > plain["large"][1]
    assert {name: found[name] for name in found if name != "large"} == {
        name: plain[name] for name in plain if name != "large"
    }
    more = of(cheaper, ("large", 10**9))["large"][0]  # at most all input
    assert more == pytest.approx(plain["large"][0] - 0.75 * router.costs.per_input_token[2] * 1_000)
    assert of(router, ("large", 800)) == of(router, None)  # without a price of cached input


def test_the_answer_counts_towards_the_context_window(made):
    router, rows = made
    at = with_counts(rows, n_tokens=[900, 900])
    room = 1_000 - 900
    assert router.decide(at, 0.0, Requirements(max_output_tokens=room))[0].excluded == ()
    excluded = router.decide(at, 0.0, Requirements(max_output_tokens=room + 1))[0].excluded
    assert [one.model for one in excluded] == ["small"]
    assert [one.model for one in router.decide(at, 0.0, Requirements(added_tokens=200))[0].excluded] == ["small"]


def test_only_models_that_declare_a_capability_are_candidates(made):
    router, rows = made
    decision = router.decide(rows, 0.0, Requirements(capabilities=frozenset({"tools", "json"})))[0]
    assert [c.model for c in decision.candidates] == ["medium"]
    assert decision.excluded == (
        Excluded("small", "does not declare json"),
        Excluded("large", "does not declare json, tools"),
    )


def test_a_query_without_candidates_is_refused_naming_what_is_missing(made):
    router, rows = made
    with pytest.raises(InputError, match=r"require: no model is left .*large: does not declare vision.*pool.yaml"):
        router.decide(rows, 0.0, Requirements(capabilities=frozenset({"vision"})))
    long = with_counts(rows, n_tokens=[12, 40_000])
    with pytest.raises(
        InputError, match=r"prompt: no model is left .*context window of 8,192\); name more models, or shorten"
    ):
        router.decide(long, 0.0, Requirements(models=("small", "medium")))
    with pytest.raises(InputError, match=r"prompt: .*small: about 40,000.*large: does not declare tools"):
        router.decide(long, 0.0, Requirements(capabilities=frozenset({"tools"})))
    with pytest.raises(InputError, match=r"models: no model is left for .* \(none is named\); name more"):
        router.decide(rows, 0.0, Requirements(models=()))


def test_an_unknown_capability_is_refused():
    with pytest.raises(InputError, match="require: got 'sight', allowed are tools, vision, json"):
        check_capabilities(["tools", "sight"])


def test_a_text_read_as_one_unknown_token_is_charged_by_its_bytes(made):
    router, rows = made
    read, unread = router.decide(with_counts(rows, n_tokens=[12, 3], n_bytes=[40, 189_000]), 0.0)
    per_model = dict(zip(router.pool.names, router.costs.per_input_token, strict=True))
    large = next(c for c in unread.candidates if c.model == "large")
    output = router.costs.fixed[router.pool.names.index("large")]
    assert large.cost_usd == pytest.approx(output + 189_000 / 8 * per_model["large"])
    assert [one.model for one in unread.excluded] == ["small", "medium"]
    assert read.excluded == ()
    cheap = Requirements(max_cost_usd=max(c.cost_usd for c in read.candidates))
    with pytest.raises(InputError, match="max_cost_usd"):
        router.decide(with_counts(rows, n_tokens=[3, 3], n_bytes=[189_000] * 2), 0.0, cheap)


def test_costs_above_the_training_range_still_count_in_a_decision(made):
    router, rows = made
    router = replace(
        router, pool=Pool(models=tuple(m.model_copy(update={"context_tokens": None}) for m in router.pool.models))
    )
    near, far = (router.decide(with_counts(rows, n_tokens=[n] * 2), 0.1)[0] for n in (12, 1_000_000))
    assert not near.extrapolated
    assert far.extrapolated
    cost = np.array([[c.cost_usd for c in far.candidates]])
    assert router.costs.normalise(cost).max() == 1.0  # Eq. 4, for figures
    assert router.costs.normalise(cost, extrapolate=True).max() > 10
    cheapest = min(far.candidates, key=lambda c: c.cost_usd)
    assert far.model == cheapest.model  # a thousandth of confidence does not pay for a hundred times the cost
    within = np.array([[router.costs.c_min, router.costs.c_max]])
    np.testing.assert_array_equal(router.costs.normalise(within), router.costs.normalise(within, extrapolate=True))


@pytest.mark.parametrize(("field", "value"), [("max_output_tokens", 0), ("max_cost_usd", float("nan"))])
def test_a_limit_out_of_bounds_is_refused(made, field: str, value: float):
    router, rows = made
    with pytest.raises(InputError, match=f"{field}: got {value}, allowed is"):
        router.decide(rows, 0.0, Requirements(**{field: value}))


def test_a_row_without_bytes_leaves_the_bound_of_the_others(made):
    router, rows = made
    table = with_counts(rows, n_tokens=[3, 3])[ENCODER].append_column("n_bytes", pa.array([None, 80_000], pa.int32()))
    old, new = router.decide({ENCODER: table}, 0.0)
    assert len(old.candidates) > len(new.candidates)


def test_the_refusal_of_a_batch_names_the_query(made):
    router, rows = made
    with pytest.raises(InputError, match=r"prompt: no model is left for query 1 of the batch, counted from 0"):
        router.decide(with_counts(rows, n_tokens=[12, 40_000]), 0.0, Requirements(models=("small",)))


def test_a_request_that_names_models_is_told_that_others_may_be_named(made):
    router, rows = made
    with pytest.raises(InputError, match=r"require: .*; name more models, or add a model with these capabilities"):
        router.decide(rows, 0.0, Requirements(models=("small",), capabilities=frozenset({"json"})))
