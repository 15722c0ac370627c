"""Prompts to tokens: middle truncation, the default limit, and the BOS and EOS tokens that a tokenizer declares."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from builders import ENCODER, make_router
from tiny_models import prompts, save_model
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.files import read_json, write_json
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations, Manifest
from prefill_router.prefill.encoder import FORMER_DEFAULT_LIMIT, EncoderInfo, with_recorded_limit
from prefill_router.prefill.tokens import DEFAULT_LIMIT, PromptTokenizer
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint

BOS, EOS = 1, 2
LONG = " ".join(prompts(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind, chat_template=True) for kind in ("gpt2", "roberta", "gemma3")}


def tokenizer(folder: Path, positions: int | None = None, **options: Any) -> PromptTokenizer:
    return PromptTokenizer(folder, EncoderConfig(model=str(folder), **options), positions, 10_000)


def with_flags(folder: Path, copy: Path, **flags: object) -> Path:
    """A copy of the tokenizer's and the model's configuration with `flags` in tokenizer_config.json."""
    copy.mkdir(exist_ok=True)
    for path in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        (copy / path.name).write_bytes(path.read_bytes())
    write_json(copy / "tokenizer_config.json", read_json(copy / "tokenizer_config.json") | flags)
    return copy


@pytest.mark.parametrize("length", [20, 21])
@pytest.mark.parametrize(("kind", "template"), [("gpt2", False), ("roberta", False), ("gpt2", True)])
def test_middle_truncation_keeps_both_ends_of_the_prompt_and_all_other_tokens(
    kind: str, template: bool, length: int, folders: dict[str, Path]
) -> None:
    long = tokenizer(folders[kind], chat_template=template)
    (complete,) = long([LONG])
    body = AutoTokenizer.from_pretrained(folders[kind])(LONG, add_special_tokens=False)["input_ids"]
    head = complete.ids.index(body[0])
    before, after = complete.ids[:head], complete.ids[head + len(body) :]
    room = length - len(before) - len(after)
    (cut,) = tokenizer(folders[kind], chat_template=template, max_length=length, truncation_side="middle")([LONG])
    assert cut.ids == [*before, *body[: room // 2], *body[-(room - room // 2) :], *after]
    assert (len(cut.ids), cut.n_tokens) == (length, complete.n_tokens)


@pytest.mark.parametrize("side", ["left", "middle", "right"])
def test_one_token_of_room_is_kept_on_every_side(side: str, folders: dict[str, Path]) -> None:
    body = AutoTokenizer.from_pretrained(folders["roberta"])(LONG, add_special_tokens=False)["input_ids"]
    (cut,) = tokenizer(folders["roberta"], max_length=3, truncation_side=side)([LONG])
    assert cut.ids == [BOS, body[0 if side == "right" else -1], EOS]


@pytest.mark.parametrize(
    ("positions", "limit"), [(None, DEFAULT_LIMIT), (256, 256), (4096, 4096), (5000, 5000), (131_072, 8192)]
)
def test_the_default_limit_is_that_of_the_model_and_at_most_8192(
    positions: int | None, limit: int, folders: dict[str, Path]
) -> None:
    assert tokenizer(folders["gpt2"], positions).max_length == limit
    with pytest.raises(InputError, match="max_length: got 300, the model takes 256 tokens at most"):
        tokenizer(folders["gpt2"], 256, max_length=300)


@pytest.mark.parametrize(("configured", "recorded", "limit"), [(None, 4096, 4096), (None, 512, None), (64, 4096, 64)])
def test_artefacts_made_with_the_former_default_limit_keep_it(
    configured: int | None, recorded: int, limit: int | None
) -> None:
    assert with_recorded_limit(EncoderConfig(max_length=configured), recorded).max_length == limit


def test_datasets_and_checkpoints_of_the_former_default_limit_load_with_it(tmp_path: Path) -> None:
    info = EncoderInfo.model_construct(max_length=FORMER_DEFAULT_LIMIT)
    manifest = Manifest.model_construct(config={"encoder": {}}, encoder=info)
    assert Activations(tmp_path, manifest).encoder_config.max_length == FORMER_DEFAULT_LIMIT == 4096
    fitted, _, _ = make_router(lineage={"encoders": {ENCODER: {"max_length": FORMER_DEFAULT_LIMIT}}})
    save_checkpoint(fitted.router, tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path / "checkpoint").encoders[ENCODER].max_length == FORMER_DEFAULT_LIMIT


def test_declared_bos_and_eos_are_added_and_change_the_digest(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = tokenizer(folders["gpt2"])
    (plain,) = bare([LONG])
    digests = {bare.digest}
    for flags, before, after in (
        ({"add_bos_token": True}, [BOS], []),
        ({"add_eos_token": True}, [], [EOS]),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
    ):
        changed = tokenizer(with_flags(folders["gpt2"], tmp_path / "changed", **(NO_FLAGS | flags)), max_length=300)
        assert changed([LONG])[0].ids == [*before, *plain.ids, *after]
        digests.add(changed.digest)
    assert len(digests) == 4
    (cut,) = tokenizer(tmp_path / "changed", max_length=10)([LONG])
    assert cut.ids == [BOS, *plain.ids[-8:], EOS]
    assert tokenizer(tmp_path / "changed").bos_id is None  # nothing is left for the caller to add


def test_a_declared_bos_token_is_added_to_the_tokens_that_the_tokenizer_adds(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_flags(folders["gpt2"], tmp_path / "changed", add_bos_token=True)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    backend.save(str(folder / "tokenizer.json"))
    assert tokenizer(folder)([LONG])[0].ids == [BOS, *tokenizer(folders["gpt2"])([LONG])[0].ids, EOS]


NO_FLAGS = {"add_bos_token": False, "add_eos_token": False}


@pytest.mark.parametrize(
    ("kind", "flags"), [("gpt2", NO_FLAGS), ("roberta", NO_FLAGS), ("roberta", dict.fromkeys(NO_FLAGS, True))]
)
def test_a_tokenizer_that_does_what_its_flags_say_keeps_its_digest_and_warns_of_nothing(
    kind: str, flags: dict[str, bool], folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = tokenizer(with_flags(folders[kind], tmp_path / "changed", **flags))
    assert changed.digest == tokenizer(folders[kind]).digest
    assert changed([LONG]) == tokenizer(folders[kind])([LONG])
    tokenizer(folders["gpt2"], chat_template=True)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("kind", "flags", "template", "message"),
    [
        ("gemma3", {}, False, "Gemma models expect a BOS token before every prompt, and the tokenizer adds none; set"),
        ("gemma3", {}, True, "the chat template does not start with the BOS token '<bos>' that the model expects"),
        ("gpt2", {"add_bos_token": True}, True, "the chat template does not start with the BOS token '<bos>'"),
        ("gpt2", {"add_eos_token": True, "eos_token": None}, False, "sets add_eos_token, but the tokenizer has no su"),
    ],
)
def test_a_missing_bos_or_eos_token_gives_a_warning_with_the_remedy(
    kind: str,
    flags: dict[str, object],
    template: bool,
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = with_flags(folders[kind], tmp_path / "changed", **flags)
    with caplog.at_level(logging.WARNING):
        changed = tokenizer(folder, chat_template=template)
    assert [message in line for line in caplog.messages] == [True]
    assert changed.digest == tokenizer(folders[kind], chat_template=template).digest or "eos_token" in flags


def test_a_declared_token_without_an_embedding_is_not_added(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_flags(folders["gpt2"], tmp_path / "changed", add_eos_token=True)
    with caplog.at_level(logging.WARNING):
        small = PromptTokenizer(folder, EncoderConfig(model=str(folder)), None, EOS)
    assert "the model has no embedding of the token" in caplog.text
    assert small.digest == tokenizer(folders["gpt2"]).digest


def test_a_gemma_tokenizer_that_declares_or_adds_bos_gives_no_warning(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = tokenizer(with_flags(folders["gemma3"], tmp_path / "changed", add_bos_token=True))
    assert declared(["ba"])[0].ids[0] == BOS
    assert caplog.messages == []
