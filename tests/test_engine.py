"""Times of an engine, measured on a stub and fitted."""

from __future__ import annotations

import pytest
from stub_upstream import USAGE, stub_upstream

from prefill_router.collect.engine import Timing, constants, timed
from prefill_router.errors import InputError, UnavailableError
from prefill_router.pool import Endpoint, TargetModel


def model_at(url: str | None, **given: object) -> TargetModel:
    endpoint = {"base_url": url, "model": "small"} | given
    return TargetModel(
        name="m", input_usd_per_mtok=1.0, output_usd_per_mtok=1.0, endpoint=Endpoint.model_validate(endpoint)
    )


def test_constants_give_back_the_times_they_were_made_from() -> None:
    timings = [Timing(n, out, 0.002 * n, 0.03 * (out - 1)) for n, out in ((100, 5), (400, 20), (50, 1))]
    found = constants(timings, 2.0)
    assert found.ttft_s_per_1k_tokens == pytest.approx(2.0)
    assert found.itl_s == pytest.approx(0.03)
    assert found.gpu_usd_per_hour == 2.0


def test_times_are_those_of_the_chunks_and_the_warm_up_is_left_out() -> None:
    with stub_upstream() as stub:
        stub.script = ["slow:0.5", "slow:0.1", "slow:0.1"]
        timings = timed(model_at(stub.url), ["a", "b", "c"], 16)
        assert len(stub.seen) == 3
    assert [one.input_tokens for one in timings] == [USAGE["prompt_tokens"]] * 2
    for one in timings:
        assert one.output_tokens == USAGE["completion_tokens"]
        assert one.first_s > 0
        assert one.rest_s >= 0.2  # two pauses between three chunks


def test_servers_that_fail_are_named() -> None:
    with stub_upstream() as stub:
        stub.script = ["500"]
        with pytest.raises(UnavailableError, match=r"/v1/chat/completions: status 500, .*status 500"):
            timed(model_at(stub.url), ["a", "b"], 16)
        stub.script = ["break"]
        with pytest.raises(UnavailableError, match="no complete answer"):
            timed(model_at(stub.url), ["a", "b"], 16)


def test_a_model_that_cannot_be_timed_is_refused() -> None:
    with pytest.raises(InputError, match="'m' needs an endpoint with base_url"):
        timed(model_at(None, provider="anthropic"), ["a", "b"], 16)
    with stub_upstream() as stub, pytest.raises(InputError, match="at least 2 are needed"):
        timed(model_at(stub.url), ["a"], 16)
