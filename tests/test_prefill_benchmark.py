"""benchmarks.prefill: every variant processes the same tokens, and the printed ratios follow from the measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import prefill
from prefill_router.files import read_json

pytestmark = pytest.mark.usefixtures("minilm")  # its tokenizer is used


def test_every_variant_processes_the_same_tokens(tmp_path: Path):
    config = prefill.PrefillBenchmarkConfig(prompts=9, median_words=6)
    folder = prefill.save_qwen3(tmp_path, "small", 0)
    tokens = {variant: prefill._make(variant, config, folder, 64)() for variant in prefill.VARIANTS}
    assert len(set(tokens.values())) == 1
    assert tokens["bare"] > 9


def test_ratios_are_ratios_of_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seconds = {
        "extraction": [2.0, 9.0, 2.0],
        "half": [1.0, 1.0, 9.0],
        "bare": [1.9] * 3,
        "loop": [5.0] * 3,
        "sorted": [2.5] * 3,
    }
    monkeypatch.setattr(
        prefill,
        "_measure",
        lambda *_: {variant: prefill.Measured(values, 100, 7.0) for variant, values in seconds.items()},
    )
    summary = prefill.run(prefill.PrefillBenchmarkConfig(output=tmp_path, models=("minilm",)))
    assert summary.startswith("extraction at 0.95 of the bare forward")
    table = capsys.readouterr().out
    assert "| loop | 20 | 2.50 | 7 |" in table
    assert "Up to half of the depth: 0.50 of the time." in table
    assert read_json(tmp_path / "prefill.json")["minilm, 8,192 tokens a batch"]["sorted"]["tokens_per_s"] == 40
