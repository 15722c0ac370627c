"""Perplexity features: equal to one prompt at a time by the model's own logits, whatever the batch; and refusals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import POSITIONS, prompts, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

import prefill_router.semantic.perplexity as module
from prefill_router.errors import InputError
from prefill_router.files import read_json, write_json
from prefill_router.semantic.perplexity import NAMES, Perplexity, PerplexityConfig

TEXTS = [*prompts(12, longest=25), "a", "ba", "<bos>", "<bos> ba"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("gpt2", "llama", "qwen3", "roberta")}


def without_bos(folder: Path, target: Path) -> Path:
    """The model with a tokenizer that names no BOS token."""
    save_model("llama", target)
    settings = read_json(target / "tokenizer_config.json")
    settings.pop("bos_token")
    write_json(target / "tokenizer_config.json", settings)
    assert AutoTokenizer.from_pretrained(target).bos_token is None
    return target


@cache
def load(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def reference(folder: Path, text: str, keep: slice = slice(None), add_bos: bool = True) -> list[float]:
    """Slow reference: one prompt at a time, full logits, float64."""
    tokenizer, model = load(folder)
    ids = tokenizer(text)["input_ids"][keep]
    if add_bos:
        ids = [tokenizer.bos_token_id, *ids]
    with torch.no_grad():
        q = model(torch.tensor([ids])).logits[0].double().softmax(dim=-1)
    surprises = [-float(q[t - 1, ids[t]].log()) for t in range(1, len(ids))]
    entropies = [-float((q[t - 1] * q[t - 1].log()).sum()) for t in range(1, len(ids))]
    mean = sum(surprises) / len(surprises)
    return [-mean, float(np.exp(mean)), max(surprises), sum(entropies) / len(entropies)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_features_equal_one_prompt_at_a_time_in_any_batch_and_chunk(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [reference(folders[kind], text) for text in TEXTS]
    for batch_tokens, logits in ((8192, 2**24), (100, 600 * 7), (1, 1)):
        monkeypatch.setattr(module, "LOGITS", logits)
        got, errors = Perplexity(PerplexityConfig(model=str(folders[kind]), batch_tokens=batch_tokens))(TEXTS)
        assert errors == [None] * len(TEXTS)
        np.testing.assert_allclose(got, want, rtol=2e-4)


def test_features_obey_their_bounds(folders: dict[str, Path]) -> None:
    values, _ = Perplexity(PerplexityConfig(model=str(folders["gpt2"])))(TEXTS)
    mean, perplexity, most, entropy = values.T
    np.testing.assert_allclose(perplexity, np.exp(-mean))
    assert (most >= -mean - 1e-9).all()
    assert ((entropy >= 0) & (entropy <= np.log(600))).all()


@pytest.mark.parametrize(("side", "keep"), [("left", slice(-5, None)), ("right", slice(5))])
def test_truncation_keeps_the_side_asked_for_and_bos(side: str, keep: slice, folders: dict[str, Path]) -> None:
    text = "ba do gi ta lo ka ne pi san ru be"
    config = PerplexityConfig.model_validate({"model": str(folders["gpt2"]), "max_length": 5, "truncation_side": side})
    np.testing.assert_allclose(Perplexity(config)([text])[0][0], reference(folders["gpt2"], text, keep), rtol=2e-4)


def test_the_longest_prompt_leaves_a_position_for_bos(folders: dict[str, Path]) -> None:
    reader = Perplexity(PerplexityConfig(model=str(folders["gpt2"])))
    assert reader.info.max_length == POSITIONS - 1
    text = "ba do gi ta " * 300
    values, errors = reader([text])
    assert errors == [None]
    np.testing.assert_allclose(values[0], reference(folders["gpt2"], text, slice(1 - POSITIONS, None)), rtol=2e-4)


def test_a_prompt_that_cannot_be_read_gets_its_reason_and_leaves_the_others_alone(folders: dict[str, Path]) -> None:
    reader = Perplexity(PerplexityConfig(model=str(folders["gpt2"])))
    values, errors = reader([None, "ba do", "  ", 7])
    assert errors == ["prompt is null", None, "prompt is empty", "prompt is not a string but int"]
    assert np.isnan(values[[0, 2, 3]]).all()
    np.testing.assert_allclose(values[1], reference(folders["gpt2"], "ba do"), rtol=2e-4)
    assert reader([])[0].shape == (0, len(NAMES))


def test_without_a_bos_token_the_first_token_is_not_predicted_and_one_token_is_too_few(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = without_bos(folders["llama"], tmp_path / "model")
    reader = Perplexity(PerplexityConfig(model=str(folder)))
    assert not reader.info.adds_bos
    values, errors = reader(["a", "ba do gi"])
    assert errors == ["fewer than two tokens, and the tokenizer has no BOS token to put before them", None]
    np.testing.assert_allclose(values[1], reference(folder, "ba do gi", add_bos=False), rtol=2e-4)


def test_a_tokenizer_that_puts_bos_itself_is_given_no_second(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    AutoTokenizer.from_pretrained(folders["roberta"]).save_pretrained(folder)  # <bos> .. <eos>
    reader = Perplexity(PerplexityConfig(model=str(folder)))
    assert not reader.info.adds_bos
    values, errors = reader(["a", "ba do gi"])
    assert errors == [None, None]
    np.testing.assert_allclose(
        values, [reference(folder, text, add_bos=False) for text in ("a", "ba do gi")], rtol=2e-4
    )


def test_numbers_that_are_not_finite_are_an_error_of_the_row(folders: dict[str, Path]) -> None:
    reader = Perplexity(PerplexityConfig(model=str(folders["gpt2"])))
    with torch.no_grad():
        reader._head.weight.fill_(torch.nan)
    values, errors = reader(["ba do"])
    assert "not finite" in str(errors[0])
    assert np.isnan(values).all()


def test_models_that_read_both_ways_or_bend_their_logits_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"lacks \d+ weights"):
        Perplexity(PerplexityConfig(model=str(folders["roberta"])))  # it has no head
    AutoTokenizer.from_pretrained(folders["roberta"]).save_pretrained(tmp_path)
    RobertaForMaskedLM(RobertaConfig.from_pretrained(folders["roberta"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is bidirectional"):
        Perplexity(PerplexityConfig(model=str(tmp_path)))
    real = module.load_language_model

    def changed(*args: object) -> torch.nn.Module:
        model = real(*args)
        forward = model.forward

        def capped(**inputs: torch.Tensor) -> object:
            output = forward(**inputs)
            output.logits = output.logits.tanh()
            return output

        model.forward = capped
        return model

    monkeypatch.setattr(module, "load_language_model", changed)
    with pytest.raises(InputError, match="scales or caps the logits"):
        Perplexity(PerplexityConfig(model=str(folders["gpt2"])))


def test_a_length_beyond_the_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=f"max_length: got {POSITIONS}, the model takes {POSITIONS - 1} tokens"):
        Perplexity(PerplexityConfig(model=str(folders["gpt2"]), max_length=POSITIONS))


def test_the_fingerprint_is_of_what_the_features_depend_on(folders: dict[str, Path]) -> None:
    gpt2, llama = str(folders["gpt2"]), str(folders["llama"])
    first, again, shorter, other = (
        Perplexity(PerplexityConfig.model_validate(options)).info.fingerprint
        for options in (
            {"model": gpt2},
            {"model": gpt2, "batch_tokens": 9},
            {"model": gpt2, "max_length": 9},
            {"model": llama},
        )
    )
    assert first == again
    assert len({first, shorter, other}) == 3
