"""GGUF encoders: the dequantised copy, its cache and its identity, and the bundled language model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors import SafetensorError
from tiny_gguf import save_gguf
from tiny_models import prompts, save_model

from prefill_router.errors import InputError
from prefill_router.files import sha256_file
from prefill_router.prefill import locating
from prefill_router.prefill.bundled import BUNDLED, bundled_weights
from prefill_router.prefill.config import SMOLLM2, EncoderConfig
from prefill_router.prefill.gguf import dequantise, gguf_digest
from prefill_router.prefill.loading import describe, weights_digest
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
        ({"pre": "llama-bpe"}, [1, "a"]),
        ({"pre": "llama-bpe", "add_bos": False}, ["a"]),
        ({"pre": "smollm"}, ["a"]),
    ],
)
def test_the_tokenizer_of_a_gguf_file_follows_its_flags(
    llama: Path, tmp_path: Path, own_cache: Path, flags: dict[str, object], expected: list[object]
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dequantise(save_gguf(llama, tmp_path / "tiny.gguf", **flags)))
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a")["input_ids"] == [a if token == "a" else token for token in expected]


def test_a_flag_without_its_token_gives_a_warning(
    llama: Path, tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
):
    dequantise(save_gguf(llama, tmp_path / "tiny.gguf", add_bos=True, bos_id=None))
    assert "should add a token of the kind BOS, but the file has none" in caplog.text


def test_files_next_to_a_gguf_file_are_not_read(llama: Path, tmp_path: Path, own_cache: Path):
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_text("{}")
    made = dequantise(save_gguf(llama, folder / "tiny.gguf", add_eos=True))
    (own_cache / made.name).rename(tmp_path / "first")
    alone = dequantise(save_gguf(llama, tmp_path / "tiny.gguf", add_eos=True))
    assert (alone / "tokenizer.json").read_bytes() == (tmp_path / "first" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"without": "blk.1.ffn_up.weight"}, r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight among them"),
        ({"rope_factors": (1, 1, 8, 8)}, r"scales its rotary positions \(rope_freqs\.weight\)"),
        ({"rope_scale": 4.0}, r"scales its rotary positions \(llama\.rope\.scaling\.factor\)"),
    ],
)
def test_files_that_transformers_reads_in_part_are_refused(
    llama: Path, tmp_path: Path, own_cache: Path, options: dict[str, object], reason: str
):
    with pytest.raises(InputError, match=reason):
        dequantise(save_gguf(llama, tmp_path / "tiny.gguf", **options))
    assert not list(own_cache.iterdir())


def test_tied_weights_and_rotary_factors_of_1_are_accepted(llama: Path, tmp_path: Path, own_cache: Path):
    path = save_gguf(llama, tmp_path / "tiny.gguf", without="output.weight", rope_factors=(1, 1, 1, 1), rope_scale=1.0)
    assert TransformersEncoder(EncoderConfig(model=str(path), layers=(3,))).info.weights_digest == gguf_digest(path)


def test_a_folder_with_a_missing_or_cut_file_is_made_again(llama: Path, tmp_path: Path, own_cache: Path):
    path = save_gguf(llama, tmp_path / "tiny.gguf")
    folder = dequantise(path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-8])
    assert (dequantise(path) / "model.safetensors").read_bytes() == weights
    (folder / "tokenizer.json").unlink()
    assert (dequantise(path) / "tokenizer.json").is_file()
    (folder / "gguf.json").write_text(json.dumps({"file": path.name, "sha256": gguf_digest(path)}))
    assert "files" in json.loads((dequantise(path) / "gguf.json").read_text())
    assert [one.name for one in own_cache.iterdir()] == [folder.name]


def test_changed_weights_lose_the_identity_of_the_gguf_file(llama: Path, tmp_path: Path, own_cache: Path):
    path = save_gguf(llama, tmp_path / "tiny.gguf")
    folder, copy = dequantise(path), tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = EncoderConfig(model=str(copy))
    assert weights_digest(copy, config) == gguf_digest(path)
    for place in (folder, copy):
        weights = bytearray((place / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (place / "model.safetensors").write_bytes(weights)
    assert weights_digest(copy, config) == sha256_file(copy / "model.safetensors")
    with pytest.raises(InputError, match=r"is damaged: model\.safetensors is not the file .* delete the folder"):
        weights_digest(folder, EncoderConfig(model=str(path)))


def test_another_user_can_read_the_files_of_the_cache(llama: Path, tmp_path: Path, own_cache: Path):
    before = os.umask(0o022)
    try:
        folder = dequantise(save_gguf(llama, tmp_path / "tiny.gguf"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_an_input_error(
    error: Exception, llama: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left.*free disk space"):
        dequantise(save_gguf(llama, tmp_path / "tiny.gguf"))
    assert not list(own_cache.iterdir())


def test_folders_of_interrupted_conversions_are_removed_after_a_day(llama: Path, tmp_path: Path, own_cache: Path):
    old, new = own_cache / ".converting-old", own_cache / ".converting-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    dequantise(save_gguf(llama, tmp_path / "tiny.gguf"))
    assert new.is_dir()
    assert not old.exists()


def test_a_conversion_shows_no_progress_bar(
    llama: Path, tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
):
    path = save_gguf(llama, tmp_path / "tiny.gguf")
    capfd.readouterr()
    dequantise(path)
    assert capfd.readouterr().err == ""


def test_names_with_the_suffix_of_gguf_files(
    llama: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model.gguf"
    shutil.copytree(llama, folder)
    assert locate(EncoderConfig(model=str(folder))) == folder
    assert locate(EncoderConfig(model=str(save_gguf(llama, tmp_path / "TINY.GGUF")))).parent == own_cache
    asked: list[str] = []
    monkeypatch.setattr(locating, "snapshot_download", lambda name, **_: asked.append(name) or str(llama))
    assert locate(EncoderConfig(model="owner/name.gguf")) == llama
    assert asked == ["owner/name.gguf"]


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
