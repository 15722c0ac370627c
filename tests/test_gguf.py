"""GGUF encoders: the dequantised copy, its cache and its identity, and the bundled language model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_gguf import save_gguf
from tiny_models import prompts, save_model

from prefill_router.errors import InputError
from prefill_router.prefill.bundled import BUNDLED, bundled_weights
from prefill_router.prefill.config import SMOLLM2, EncoderConfig
from prefill_router.prefill.gguf import dequantise, gguf_digest
from prefill_router.prefill.loading import describe
from prefill_router.prefill.locating import locate
from prefill_router.prefill.transformers_backend import TransformersEncoder

COLUMN = "mean_L3"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefill-router" / "gguf"


def states(model: Path, **settings: object) -> tuple[TransformersEncoder, np.ndarray, list[int]]:
    encoder = TransformersEncoder(EncoderConfig(model=str(model), layers=(3,), states_dtype="float32", **settings))
    texts = prompts(6)
    rows = encoder(pa.table({"query_id": [str(row) for row in range(6)], "prompt": texts}))
    assert rows.column("error").null_count == 6
    return encoder, np.stack(rows.column(COLUMN).to_pylist()), rows.column("n_tokens").to_pylist()


def test_a_gguf_file_gives_the_states_of_the_model_that_it_was_made_from(llama: Path, tmp_path: Path, own_cache: Path):
    path = save_gguf(llama, tmp_path / "tiny.gguf", add_bos=False)
    encoder, got, tokens = states(path)
    original, expected, expected_tokens = states(llama)
    assert tokens == expected_tokens
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert encoder.info.weights_digest == gguf_digest(path) != original.info.weights_digest
    assert (encoder.info.n_layers, encoder.info.max_length) == (original.info.n_layers, original.info.max_length)


def test_a_gguf_file_is_dequantised_once_for_its_content(llama: Path, tmp_path: Path, own_cache: Path):
    first = dequantise(save_gguf(llama, tmp_path / "tiny.gguf"))
    weights = first / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert first.parent == own_cache
    assert dequantise(save_gguf(llama, tmp_path / "copy.gguf")) == first
    assert weights.stat().st_mtime_ns == 1
    assert [path.name for path in own_cache.iterdir()] == [first.name]  # no temporary folder is left
    assert dequantise(save_gguf(llama, tmp_path / "other.gguf", add_bos=True)) != first


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"add_bos": True}, [1, "a"]),
        ({"add_bos": True, "add_eos": True}, [1, "a", 2]),
        ({"add_eos": True}, ["a", 2]),
        ({"add_bos": False}, ["a"]),
        ({}, ["a"]),
    ],
)
def test_the_tokenizer_of_a_gguf_file_follows_its_flags(
    llama: Path, tmp_path: Path, own_cache: Path, flags: dict[str, bool], expected: list[object]
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dequantise(save_gguf(llama, tmp_path / "tiny.gguf", **flags)))
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a")["input_ids"] == [a if token == "a" else token for token in expected]


def test_the_messages_for_gguf_files_that_cannot_be_read(llama: Path, tmp_path: Path, own_cache: Path):
    (tmp_path / "notes.gguf").write_text("not a model")
    with pytest.raises(InputError, match=r"notes\.gguf is not a GGUF file"):
        locate(EncoderConfig(model=str(tmp_path / "notes.gguf")))
    with pytest.raises(InputError, match="no such file; allowed are the path"):
        locate(EncoderConfig(model=str(tmp_path / "missing.gguf")))
    cut = save_gguf(llama, tmp_path / "cut.gguf")
    cut.write_bytes(cut.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"cut\.gguf is not a GGUF file, or damaged"):
        locate(EncoderConfig(model=str(cut)))
    with pytest.raises(InputError, match=r"for a GGUF encoder give the file \(cut\.gguf"):
        locate(EncoderConfig(model=str(tmp_path)))
    assert not list(own_cache.iterdir())


def test_a_cache_that_cannot_be_written_is_an_input_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        dequantise(save_gguf(llama, tmp_path / "tiny.gguf"))


def test_an_altered_package_of_the_bundled_language_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package = tmp_path / "altered_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / BUNDLED[SMOLLM2].weights).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        BUNDLED, SMOLLM2, BUNDLED[SMOLLM2].__class__(**{**vars(BUNDLED[SMOLLM2]), "module": package.name})
    )
    with pytest.raises(InputError, match="the official SmolLM2-135M-Instruct has"):
        locate(EncoderConfig(model=SMOLLM2))


@pytest.mark.train
def test_the_bundled_language_model_is_a_causal_encoder_that_knows_a_capital():
    """The copy that `make install` brings: shape, identity, and a next token that only intact weights give."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = EncoderConfig(model=SMOLLM2)
    shape = describe(config)
    assert (shape.n_layers, shape.hidden_size) == (30, 576)
    folder = locate(config)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert bundled_weights(SMOLLM2).suffix == ".gguf"
