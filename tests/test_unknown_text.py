"""Text outside the encoder's vocabulary: its share per prompt, the warnings, and datasets without these columns."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import save_model

from jobs.prefill import Plan, PrefillConfig, _counts, _execute
from prefill_router.controller import encode_prompts
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import INDEX, MANIFEST, PARTIAL, Manifest, read_activations
from prefill_router.prefill.encoder import LATER_COLUMNS, unknown_share
from prefill_router.prefill.local import prefill_prompts
from prefill_router.prefill.shards import ActivationsHeader, open_dataset, read_header
from prefill_router.prefill.transformers_backend import TransformersEncoder

OLD = Path(__file__).parent / "data" / "d52bd7e"
THAI = "ก" * 3000


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def counts(rows: pa.Table) -> list[tuple[int, ...]]:
    return list(zip(*(rows.column(name).to_pylist() for name in ("n_tokens", *LATER_COLUMNS)), strict=True))


def test_unknown_text_is_counted_in_tokens_and_bytes(minilm: str) -> None:
    rows = TransformersEncoder(EncoderConfig(model=minilm, layers=(1,)))(
        table(["what is love", THAI, f"what is {THAI}", "fine 🦄", None, "f00d" * 40])
    )
    assert counts(rows) == [
        (5, 0, 0, 12),
        (3, 1, 9000, 9000),
        (5, 1, 9000, 9008),
        (4, 1, 4, 9),
        (0, 0, 0, 0),
        (3, 1, 160, 160),
    ]
    np.testing.assert_allclose(unknown_share(rows), [0, 1, 9000 / 9008, 4 / 9, 0, 1])


def test_a_prompt_that_is_not_unicode_is_refused_in_one_line(minilm: str) -> None:
    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(1,)))
    with pytest.raises(InputError, match=r"prompt: not Unicode text .*surrogates not allowed"):
        encode_prompts(encoder, ["fine", "half \ud83e"])


def test_byte_level_tokenizers_know_every_text(tmp_path: Path) -> None:
    rows = TransformersEncoder(EncoderConfig(model=str(save_model("gpt2", tmp_path)), layers=(1,)))(table(["ก" * 20]))
    assert rows.column("n_tokens")[0].as_py() > 20
    assert counts(rows)[0][1:] == (0, 0, 60)


def test_unknown_bytes_in_a_chat_template_are_those_of_the_prompt(minilm: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from prefill_router.prefill.bundled import bundled_weights
    from prefill_router.prefill.tokens import PromptTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_weights(minilm).parent)
    tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }} {% endfor %}assistant:"
    tokenizer.save_pretrained(tmp_path)
    (one,) = PromptTokenizer(tmp_path, EncoderConfig(chat_template=True, max_length=8), None, 30522)(
        [f"is {THAI} a word"]
    )
    assert (one.n_unknown, one.n_unknown_bytes) == (1, 9000)


def test_prefill_warns_of_prompts_that_the_tokenizer_does_not_know(
    minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EncoderConfig(model=minilm, layers=(1,))
    with caplog.at_level(logging.WARNING, logger="prefill_router"):
        activations = prefill_prompts(
            table(["what is love", THAI, "what 🦄 is it about love and peace and understanding?"]), config, tmp_path
        )
    assert activations.manifest.counts.unknown_rows == 1
    assert "cannot read 1 of 3 prompts: more than 10 % of their text is unknown to its tokenizer" in caplog.text
    caplog.clear()
    prefill_prompts(table(["what is love"]), config, tmp_path / "known")
    assert not caplog.text


def test_the_job_warns_at_the_end_and_counts_them_in_its_summary(
    minilm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, prompts = EncoderConfig(model=minilm, layers=(1,)), table(["what is love", THAI])
    prefill_prompts(prompts, encoder, tmp_path / "out")
    config = PrefillConfig(input=tmp_path / "in.parquet", output=tmp_path / "out", encoder=encoder)
    header = read_header(config.output, ActivationsHeader)
    _execute(Plan("prefill", config, None, 64, None, header, open_dataset(config.output, header, prompts)), prompts)
    assert "prefill: warning: the encoder cannot read 1 of 2 prompts: more than 10 % of" in capsys.readouterr().out
    assert "0 truncated, 1 unknown to the tokenizer, " in _counts({"": config})


def test_old_datasets_read_as_of_unknown_share() -> None:
    activations = read_activations(OLD / "activations")
    ids = activations._index.column("query_id").to_pylist()[:3]
    rows = activations.rows(ids)
    assert activations.manifest.counts.unknown_rows is None
    assert np.isnan(unknown_share(rows)).all()
    assert np.isnan(unknown_share(rows.drop_columns(list(LATER_COLUMNS)))).all()
    assert activations.n_tokens(ids).min() > 0


def test_an_interrupted_old_dataset_is_completed(minilm: str, tmp_path: Path) -> None:
    texts = ["what is love", THAI, "to be", "or not to be"]
    config = EncoderConfig(model=minilm, layers=(1, 2))
    whole = prefill_prompts(table(texts), config, tmp_path / "whole")
    old = tmp_path / "old"
    prefill_prompts(table(texts[:2]), config, old)
    (shard,) = old.glob("*.parquet")
    pq.write_table(pq.read_table(shard).drop_columns(list(LATER_COLUMNS)), shard)
    manifest = json.loads((old / MANIFEST).read_text())
    write_json(old / PARTIAL, {name: manifest[name] for name in ("encoder", "columns", "config")})
    (old / MANIFEST).unlink()
    resumed = prefill_prompts(table(texts), config, old)
    ids = [f"q{row}" for row in range(4)]
    assert resumed.digest == whole.digest
    rows, expected = resumed.rows(ids), whole.rows(ids)
    assert rows.schema.equals(expected.schema)
    kept = [name for name in INDEX if name not in LATER_COLUMNS]
    assert rows.select(kept).equals(expected.select(kept))
    assert rows.column("last_L2").null_count == 0
    assert rows.column("n_bytes").to_pylist() == [None, None, 5, 12]
    np.testing.assert_array_equal(unknown_share(rows), [np.nan, np.nan, 0, 0])
    assert resumed.manifest.counts.unknown_rows == 0


def test_manifests_without_the_count_of_unknown_rows_are_valid(tmp_path: Path) -> None:
    shutil.copytree(OLD / "activations", tmp_path / "old")
    assert Manifest.model_validate(json.loads((tmp_path / "old" / MANIFEST).read_text())).counts.unknown_rows is None
