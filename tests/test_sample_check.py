"""A run stops before hours of work if its sample shows that most rows would have an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_models import prompts, save_model, scale_mlp

from jobs import features
from jobs.prefill import _preflight
from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.local import prefill_prompts
from prefill_router.prefill.sample_check import check_sample
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.semantic.finetune import LoRARouter
from prefill_router.semantic.perplexity import Perplexity, PerplexityConfig

OVERFLOW = "last_L2 overflows float16 (max 1.0e+06); use states_dtype float32"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scale_mlp(save_model("llama", tmp_path_factory.mktemp("overflowing")), 1, 1e6)


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def test_overflow_of_most_rows_is_refused_with_the_way_out() -> None:
    for errors in ([OVERFLOW] * 4, [OVERFLOW] * 3 + [None] * 2, [OVERFLOW, "prompt is null", "prompt is null"]):
        with pytest.raises(
            InputError, match=r"^encoder: . of . sampled prompts have no states: last_L2 overflows.*32$"
        ):
            check_sample(errors, "encoder", "states")
    with pytest.raises(InputError, match=r"non-finite state in last_L2; use dtype float32 or another model$"):
        check_sample(["non-finite state in last_L2"], "encoder", "states")


def test_one_reason_for_every_row_is_refused_and_some_errors_give_a_warning() -> None:
    with pytest.raises(
        InputError, match=r"^encoder: none of the 2 sampled prompts has states: prompt is null; correct"
    ):
        check_sample(["prompt is null"] * 2, "encoder", "states")
    assert check_sample([None, None], "encoder", "states") is None
    assert check_sample([], "encoder", "states") is None
    warning = "2 of 4 sampled prompts have no states; the first reason: prompt is null"
    assert check_sample([None, None, "prompt is null", OVERFLOW], "encoder", "states") == warning


def test_the_preflight_reports_the_errors_of_its_prompts(overflowing: Path) -> None:
    found = _preflight(EncoderConfig(model=str(overflowing)), table([*prompts(3), None]))
    assert [error and error.split(" (max")[0] for error in found.errors] == [
        *["last_L2 overflows float16"] * 3,
        "prompt is null",
    ]


def test_prefill_in_one_process_stops_after_the_first_shard(overflowing: Path, tmp_path: Path) -> None:
    config = EncoderConfig(model=str(overflowing))
    with pytest.raises(
        InputError, match=r"^encoder: 5 of 5 sampled prompts have no states: .*use states_dtype float32"
    ):
        prefill_prompts(table(prompts(5)), config, tmp_path / "states")
    wide = config.model_copy(update={"states_dtype": "float32"})
    assert prefill_prompts(table(prompts(5)), wide, tmp_path / "states").manifest.counts.errors == 0


def test_one_prompt_without_states_can_be_added_to_a_dataset(tmp_path: Path) -> None:
    config = EncoderConfig(model=str(save_model("gpt2", tmp_path / "model")))
    prefill_prompts(table(["ba"]), config, tmp_path / "states")
    assert prefill_prompts(table(["ba", None]), config, tmp_path / "states").manifest.counts.errors == 1


def test_the_features_job_stops_if_the_language_model_overflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PerplexityConfig(model=str(save_model("llama", tmp_path)))
    monkeypatch.setattr(Perplexity, "_read", lambda self, ids: np.full((len(ids), 4), np.inf))
    with pytest.raises(InputError, match=r"^perplexity: 3 of 3 sampled prompts have no text features: .*not finite"):
        features._preflight(config, table(prompts(3)))
    preflight = features._preflight(None, table([*prompts(3), None]))
    assert list(preflight.families) == ["complexity"]
    assert preflight.warning == "1 of 4 sampled prompts have no text features; the first reason: prompt is null"


def test_weights_that_are_not_finite_are_refused_in_one_line(tmp_path: Path) -> None:
    model = str(scale_mlp(save_model("llama", tmp_path), 0, float("nan")))
    for load in (
        lambda: TransformersEncoder(EncoderConfig(model=model)),
        lambda: Perplexity(PerplexityConfig(model=model)),
        lambda: LoRARouter(model=model)._load(2),
    ):
        with pytest.raises(InputError, match=f"^model: the values of {model} are not finite; use dtype float32"):
            load()
