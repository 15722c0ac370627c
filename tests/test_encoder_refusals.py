"""Models that cannot be read as they are: tokens without an embedding, templates with a clock, own code, quantised."""

from __future__ import annotations

import io
import re
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers.utils.chat_template_utils as chat_templates
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_TEMPLATE, prompts, save_model
from transformers import AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.files import read_json, write_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import read_activations
from prefill_router.prefill.encoder import EncoderInfo
from prefill_router.prefill.local import prefill_prompts
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.prefill.vllm.server import ServerConfig, run
from prefill_router.semantic.perplexity import Perplexity, PerplexityConfig


def encoder(folder: Path | str, **options: object) -> TransformersEncoder:
    return TransformersEncoder(EncoderConfig(model=str(folder), **{"states_dtype": "float32", **options}))


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def with_added_tokens(kind: str, folder: Path, pad: bool = False) -> Path:
    """A model whose tokenizer has tokens that its embedding table of 600 rows lacks."""
    save_model(kind, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    if pad:
        tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > 600
    return folder


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_a_token_without_an_embedding_fails_its_row_only(kind: str, tmp_path: Path) -> None:
    reader = encoder(with_added_tokens(kind, tmp_path), batch_tokens=10_000)
    texts = prompts(4)
    rows = reader(table([texts[0], "ba <image> do", *texts[1:]]))
    error = "token '<image>' (id 600) is beyond the 600 rows of the model's embedding table"
    assert rows.column("error").to_pylist() == [None, error, None, None, None]
    kept = rows.take([0, 2, 3, 4])
    expected = reader(table(texts))
    for column in reader.columns:
        assert kept.column(column).equals(expected.column(column)), column


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path: Path) -> None:
    texts = table(["ba", "ba do gi ta ba do"])
    plain = encoder(save_model("gpt2", tmp_path / "plain"))(texts)
    padded = encoder(with_added_tokens("gpt2", tmp_path / "padded", pad=True))(texts)
    for column in (name for name in plain.column_names if "_L" in name):
        assert padded.column(column).equals(plain.column(column)), column


def test_perplexity_leaves_out_only_the_prompt_with_an_unknown_id(tmp_path: Path) -> None:
    features = Perplexity(PerplexityConfig(model=str(with_added_tokens("llama", tmp_path))))
    values, errors = features(["ba do", "ba <image> do", "gi ta"])
    alone, _ = features(["ba do", "gi ta"])
    assert [error is None for error in errors] == [True, False, True]
    assert "token '<image>' (id 600)" in str(errors[1])
    np.testing.assert_array_equal(values[[0, 2]], alone)


class _Clock:
    """`datetime` with another today."""

    def __init__(self, *date: int) -> None:
        self.date = date

    def now(self) -> datetime:
        return datetime(*self.date)  # type: ignore[arg-type]


def test_a_template_with_todays_date_gives_the_same_tokens_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model("llama", tmp_path / "model", chat_template=LLAMA_TEMPLATE)
    tokens, fingerprints = [], []
    for day in ((2026, 1, 2), (2031, 12, 30)):
        monkeypatch.setattr(chat_templates, "datetime", _Clock(*day))
        reader = encoder(folder, chat_template=True, layers=(1,))
        tokens.append(reader._tokenizer(["ba do", "ba" * 200]))
        fingerprints.append(reader.info.fingerprint)
    assert tokens[0] == tokens[1]
    assert fingerprints[0] == fingerprints[1]
    text = AutoTokenizer.from_pretrained(folder).decode(tokens[0][0].ids)
    assert "Today Date: 26 Jul 2024" in text
    prefill_prompts(table(["ba do"]), reader_config(folder), tmp_path / "states")
    assert read_activations(tmp_path / "states").encoder.template_date == "2024-07-26"


def reader_config(folder: Path) -> EncoderConfig:
    return EncoderConfig(model=str(folder), chat_template=True, layers=(1,))


def test_a_template_without_a_date_keeps_its_fingerprint(tmp_path: Path) -> None:
    info = encoder(save_model("gpt2", tmp_path, chat_template=True), chat_template=True, layers=(1,)).info
    assert info.template_date is None
    fixed = info.model_copy(update={"weights_digest": "w", "tokenizer_digest": "t"})
    assert fixed.fingerprint == FINGERPRINT
    dated = EncoderInfo(**{**fixed.model_dump(), "template_date": "2024-07-26"})
    assert dated.fingerprint != fixed.fingerprint


FINGERPRINT = "7788e4a992e79019"  # from before `template_date` existed


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ now() }}{{ messages[0]['content'] }}", r"cannot be rendered \('now' is undefined\); set chat_template"),
        ("{{ datetime.now() }}{{ messages[0]['content'] }}", "cannot be rendered"),
        ("{{ ['a', 'b'] | random }}{{ messages[0]['content'] }}", "is random"),
        ("{{ lipsum() }}{{ messages[0]['content'] }}", "is random"),
        ("{{ raise_exception('no user turn') }}", r"cannot be rendered \(no user turn\)"),
        ("{% if %}", "cannot be rendered"),
    ],
)
def test_templates_that_cannot_be_pinned_are_refused(template: str, message: str, tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path, chat_template=template)
    with pytest.raises(InputError, match=f"^chat_template: the tokenizer's template {message}"):
        encoder(folder, chat_template=True)


def test_a_prompt_that_the_template_refuses_has_an_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('a dodo') if 'do do' in messages[0]['content'] else messages[0]['content'] }}"
    reader = encoder(save_model("gpt2", tmp_path, chat_template=template), chat_template=True)
    rows = reader(table(["ba", "do do", "gi"]))
    assert rows.column("error").to_pylist() == [None, "the chat template refuses the prompt: a dodo", None]


def with_own_code(folder: Path, file: str) -> Path:
    """A model whose configuration or tokenizer names code in its folder; running it writes `folder/ran`."""
    save_model("gpt2", folder)
    settings = read_json(folder / file)
    if file == "config.json":
        settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    else:
        settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer.json").unlink()
    write_json(folder / file, settings)
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    return folder


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_repository_is_never_run_and_not_offered(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_own_code(tmp_path / "model", file)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))  # answers to a question on the terminal
    with pytest.raises(InputError, match=r"needs code of its own repository \(auto_map in .*\), which is never run"):
        encoder(folder)
    assert not (folder / "ran").exists()
    assert capsys.readouterr().out == ""


def test_own_code_is_ignored_if_transformers_has_the_architecture(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": {"AutoModel": "own.Own"}})
    assert encoder(folder)(table(["ba"])).column("error").null_count == 1


@pytest.mark.parametrize("option", ["--trust-remote-code", "--trust_remote_code=true"])
def test_the_vllm_server_refuses_to_run_code_of_the_repository(option: str) -> None:
    with pytest.raises(InputError, match=f"^{option}: .*code of the model's repository would run; leave it out"):
        run(ServerConfig(model="gpt2"), [option])


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}},
        },
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_a_quantised_checkpoint_is_refused_in_one_line(settings: dict[str, object], tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": settings})
    with pytest.raises(InputError) as error:
        encoder(folder)
    assert str(error.value).startswith(
        f"model: {folder} is quantised ({settings['quant_method']}) and cannot be loaded"
    )
    assert "use the original weights" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_embedding_table_of_another_size_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": 500})
    with pytest.raises(InputError, match="cannot be loaded"):
        encoder(folder)


@pytest.mark.parametrize("settings", [None, {"quant_method": "unheard_of"}, {"quant_method": "modelopt"}])
def test_quantised_weights_that_nothing_dequantises_are_refused(settings: object, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name] = (weights[name] * 127).round().to(torch.int8)
    weights[f"{name}_scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if settings:
        write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": settings})
    says = rf"{re.escape(name)} has dtype I8, .*use the original weights, which are not quantised"
    with pytest.raises(InputError, match=says):
        encoder(folder)
    with pytest.raises(InputError, match=says):
        Perplexity(PerplexityConfig(model=str(folder)))


def test_an_incomplete_quantisation_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": settings})
    with pytest.raises(InputError, match=r"is quantised \(compressed-tensors\) and cannot be loaded"):
        encoder(folder)


def test_weights_of_a_method_that_transformers_dequantises_are_read(tmp_path: Path) -> None:
    """FP8 in blocks of 128 x 128; the matrices of the small model are one block each."""
    plain, folder = save_model("llama", tmp_path / "plain"), save_model("llama", tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj.weight" in name]:
        scale = weights[name].abs().max() / 448  # the largest number of float8_e4m3fn
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": settings})
    states = [encoder(one, layers=(1,))(table(prompts(3))).column("mean_L1") for one in (plain, folder)]
    expected, read = (np.array(one.to_pylist(), dtype=np.float64) for one in states)
    np.testing.assert_allclose(read, expected, atol=0.1 * np.abs(expected).max())
