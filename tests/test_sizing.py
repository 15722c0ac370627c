"""The cost of a prefill run, against figures computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.cost import CostConfig, run
from prefill_router.errors import InputError
from prefill_router.prefill.sizing import Fleet, Workload, estimate

# 100,000 prompts of 200 tokens are 20 million tokens. At 1,000 tokens/s a prompt takes 0.2 s, a shard of 150 30 s.
WORK = Workload(prompts=100_000, tokens_per_prompt=200.0, row_bytes=1_000.0)
FLEET = Fleet(tokens_per_s=1_000.0, usd_per_gpu_hour=2.0)


def test_one_gpu_takes_its_tokens_at_its_speed() -> None:
    found = estimate(WORK, FLEET, 1)
    assert (found.rows_per_shard, found.shards, found.shard_s) == (150, 667, 30.0)
    assert found.hours == pytest.approx(667 * 30 / 3600)
    assert found.usd == pytest.approx(2 * 667 * 30 / 3600)
    assert WORK.bytes == 100e6


def test_the_last_round_of_shards_counts_in_full() -> None:
    found = estimate(WORK, FLEET, 64)
    assert found.hours == pytest.approx(11 * 30 / 3600)  # 667 / 64 = 10.4 rounds
    assert found.gpu_hours == pytest.approx(64 * 11 * 30 / 3600)


def test_start_head_and_efficiency_are_paid() -> None:
    fleet = Fleet(1_000.0, 2.0, usd_per_hour=0.5, efficiency=0.8, start_s=360.0)
    found = estimate(WORK, fleet, 8)
    assert found.hours == pytest.approx(0.1 + 84 * 30 / 0.8 / 3600)  # 667 / 8 = 83.4 rounds
    assert found.usd == pytest.approx(found.hours * (8 * 2 + 0.5))


def test_several_encoders_on_a_gpu_share_its_speed() -> None:
    found = estimate(WORK, Fleet(4_000.0, 2.0, actors_per_gpu=4), 1)
    assert (found.shard_s, found.shards_per_slot) == (30.0, 667 / 4)
    assert found.hours == pytest.approx(167 * 30 / 3600)


def test_an_interruption_costs_half_a_shard_and_the_restart() -> None:
    stays = estimate(WORK, FLEET, 1)
    fleet = Fleet(1_000.0, 2.0, interruptions_per_hour=2.0, restart_s=165.0)
    lost = 2 * (15 + 165) / 3600
    assert estimate(WORK, fleet, 1).hours == pytest.approx(stays.hours / (1 - lost))
    with pytest.raises(InputError, match="interruptions_per_hour: got 20"):
        estimate(WORK, Fleet(1_000.0, 2.0, interruptions_per_hour=20.0, restart_s=165.0), 1)


@given(st.integers(1, 10**7), st.floats(1, 5_000), st.floats(100, 1e6), st.integers(1, 64))
def test_more_gpus_are_never_slower_and_never_waste_less(prompts: int, tokens: float, speed: float, gpus: int) -> None:
    work, fleet = Workload(prompts, tokens, 100.0), Fleet(speed, 1.0)
    few, many = estimate(work, fleet, gpus), estimate(work, fleet, 2 * gpus)
    assert many.hours <= few.hours * (1 + 1e-9)
    assert many.gpu_hours >= few.gpu_hours * (1 - 1e-9)
    assert few.hours * gpus * speed * 3600 >= work.tokens * (1 - 1e-9)  # no faster than the GPUs


def test_the_memory_of_the_driver_does_not_depend_on_the_gpus_but_on_the_prompts() -> None:
    twice = Workload(200_000, 200.0, 1_000.0)
    empty = Workload(0, 200.0, 1_000.0)
    assert twice.driver_bytes - WORK.driver_bytes == pytest.approx(WORK.driver_bytes - empty.driver_bytes)


def test_the_job_prints_a_line_per_number_of_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = CostConfig(
        prompts=100_000, tokens_per_prompt=200.0, tokens_per_s=1_000.0, usd_per_gpu_hour=2.0, gpus=(1, 64),
        efficiency=1.0, start_s=0.0, encoder={"model": str(_encoder(tmp_path))},
    )  # fmt: skip
    summary = run(config)
    printed = capsys.readouterr().out
    assert "| 64 | 0.09 | 5.9 | 11.73 | 10.4 |" in printed
    assert "20.0 million tokens" in printed
    assert summary == "least cost 11.12 USD in 5.56 h on 1 GPUs; least time 0.09 h on 64 GPUs for 11.73 USD"


def test_the_job_refuses_no_prompts_and_two_sources_of_prompts() -> None:
    with pytest.raises(ValidationError, match="give input or activations"):
        CostConfig(prompts=5, tokens_per_s=1.0, usd_per_gpu_hour=1.0)
    with pytest.raises(ValidationError, match="both given"):
        CostConfig(input=Path("a"), activations=Path("b"), tokens_per_s=1.0, usd_per_gpu_hour=1.0)


def _encoder(folder: Path) -> Path:
    from tiny_models import save_model

    return save_model("gpt2", folder)
