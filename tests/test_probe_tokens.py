"""Probe tokens: the adapter in the encoder, its folder, and its training on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import make_pool, make_table
from tiny_models import POSITIONS, prompts, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from jobs.prefill import PrefillConfig, _is_finished
from prefill_router.adapt.batches import PrefixStore, make_batches
from prefill_router.adapt.train import Learner, ProbeTokensConfig, attach_new
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import save_pool
from prefill_router.prefill import encoder as encoders
from prefill_router.prefill.adapter import MANIFEST, WEIGHTS, read_manifest
from prefill_router.prefill.backends import load_encoder
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.local import prefill_prompts
from prefill_router.prefill.probe_tokens import ProbeTokens, new_probe_tokens, save_adapter
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.signals.join import join
from prefill_router.workflows.adapt import AdaptConfig, _check_place, load_base, run
from prefill_router.workflows.inputs import check_adapters, refuse_adapters

LAYER, COUNT = 2, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, folder / kind) for kind in ("llama", "gpt2", "gemma3", "roberta")}


def config(folder: Path, **options: object) -> EncoderConfig:
    return EncoderConfig(
        model=str(folder), **{"layers": (1, LAYER), "states_dtype": "float32", "max_length": 200, **options}
    )


def random_tokens(encoder: TransformersEncoder, positions: str = "suffix", maps: str = "feed_forward") -> ProbeTokens:
    """Probe tokens with random matrices, as after training."""
    tokens = new_probe_tokens(encoder.token_embeddings[10 : 10 + COUNT], encoder.blocks, 4, maps, positions, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tokens.parameters.items():
        if name.endswith(".up"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return tokens


def save(folder: Path, encoder: TransformersEncoder, tokens: ProbeTokens, read: tuple[str, ...] = ()) -> Path:
    training = {"layer": LAYER, "targets": ("a",), "prompts": read, "training": {}}
    save_adapter(folder, tokens, {"weight": torch.zeros(1, 2)}, {"base": encoder.info, **training})
    return folder


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = TransformersEncoder(config(models["llama"]))
    return save(tmp_path_factory.mktemp("adapter") / "adapter", encoder, random_tokens(encoder))


def table(texts: list[str]) -> pa.Table:
    return pa.table({"query_id": [f"q{row}" for row in range(len(texts))], "prompt": texts})


def matrix(rows: pa.Table, column: str) -> np.ndarray:
    return np.asarray(rows.column(column).to_pylist(), dtype=np.float32)


def reference(folder: Path, text: str, tokens: ProbeTokens) -> np.ndarray:
    """States [layers, suffix, hidden] of one prompt: merged weights run the suffix on the plain model's cache."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    plain, merged = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.eval() for _ in range(2))
    for name in tokens.adapted_maps:
        block, _, path = name.partition(".")
        weight = merged.layers[int(block)].get_submodule(path).weight
        weight.data += tokens.parameters[f"{name}.up"].data @ tokens.parameters[f"{name}.down"].data
    with torch.no_grad():
        cache = DynamicCache()
        plain(input_ids=ids, past_key_values=cache, use_cache=True)
        suffix = tokens.parameters["embeddings"].data[None]
        hidden = merged(inputs_embeds=suffix, past_key_values=cache, output_hidden_states=True).hidden_states
    return torch.cat(hidden).numpy()


@pytest.mark.parametrize("maps", ["feed_forward", "all"])
def test_states_equal_merged_weights_on_the_plain_prompt_cache(
    maps: str, models: dict[str, Path], tmp_path: Path
) -> None:
    base = TransformersEncoder(config(models["llama"]))
    tokens = random_tokens(base, maps=maps)
    made = TransformersEncoder(config(models["llama"], adapter=str(save(tmp_path / "a", base, tokens))))
    texts = prompts(5)
    rows = made(table(texts))
    for row, text in enumerate(texts):
        want = reference(models["llama"], text, tokens)
        for layer in (1, LAYER):
            for pooling, states in (("last", want[layer][-1]), ("mean", want[layer].mean(axis=0))):
                got = matrix(rows, f"{pooling}_L{layer}")[row]
                np.testing.assert_allclose(got, states, rtol=0, atol=1e-5 * np.abs(states).max())


def test_keys_and_values_of_the_prompt_are_bit_equal_without_adapter(models: dict[str, Path], adapter: Path) -> None:
    plain = TransformersEncoder(config(models["llama"]))
    adapted = TransformersEncoder(config(models["llama"], adapter=str(adapter)))
    ids = [one.ids for one in plain.tokenizer(prompts(6))]
    with torch.no_grad():
        without, before = plain.prefill(ids), adapted.prefill(ids)
        first = adapted.suffix_states(before)
        after = adapted.prefill(ids)
        torch.testing.assert_close(adapted.suffix_states(before), first, rtol=0, atol=0)  # the suffix left it as it was
    for prefix in (before, after):
        for got, want in zip(prefix.keys_values, without.keys_values, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def test_adaption_of_all_positions_changes_keys_of_the_prompt(models: dict[str, Path]) -> None:
    encoder = TransformersEncoder(config(models["llama"]))
    ids = [one.ids for one in encoder.tokenizer(prompts(2))]
    with torch.no_grad():
        plain = encoder.prefill(ids)
        encoder.attach(random_tokens(encoder, positions="all"))
        assert not torch.allclose(encoder.prefill(ids).keys_values[1][0], plain.keys_values[1][0], atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_do_not_depend_on_batch_and_padding(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    base = TransformersEncoder(config(models[kind]))
    folder = save(tmp_path / "a", base, random_tokens(base))
    texts = prompts(12)
    together = TransformersEncoder(config(models[kind], adapter=str(folder), batch_tokens=10_000))(table(texts))
    alone = TransformersEncoder(config(models[kind], adapter=str(folder), batch_tokens=1))(table(texts))
    for column in ("last_L2", "mean_L1"):
        scale = np.abs(matrix(alone, column)).max()
        np.testing.assert_allclose(matrix(together, column), matrix(alone, column), rtol=0, atol=1e-5 * scale)


def test_only_an_adapter_changes_fingerprint_and_written_configuration(models: dict[str, Path], adapter: Path) -> None:
    plain, adapted = (TransformersEncoder(config(models["llama"], adapter=one)).info for one in (None, str(adapter)))
    assert plain.fingerprint != adapted.fingerprint
    assert adapted.adapter == read_manifest(adapter).digest
    assert adapted.last_token == f"last of {COUNT} probe tokens"
    assert "adapter" not in plain.model_dump()
    assert "adapter" not in config(models["llama"]).model_dump(mode="json")


def test_an_adapter_of_another_encoder_is_refused(models: dict[str, Path], adapter: Path) -> None:
    with pytest.raises(InputError, match=r"trained on another encoder: architecture was 'LlamaModel', is now 'GPT2"):
        load_encoder(config(models["gpt2"], adapter=str(adapter)))
    with pytest.raises(InputError, match=r"another encoder: truncation_side was 'left', is now 'right'"):
        load_encoder(config(models["llama"], adapter=str(adapter), truncation_side="right"))


def test_damaged_and_missing_adapters_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    base = TransformersEncoder(config(models["llama"]))
    folder = save(tmp_path / "a", base, random_tokens(base))
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(InputError, match=r"adapter.safetensors is missing or damaged"):
        load_encoder(config(models["llama"], adapter=str(folder)))
    with pytest.raises(InputError, match=rf"has no {MANIFEST}; give a folder that jobs.adapt has written"):
        load_encoder(config(models["llama"], adapter=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "reason"), [("roberta", "its attention is bidirectional"), ("gemma3", "blocks of the kind sliding")]
)
def test_models_without_full_causal_attention_are_refused(kind: str, reason: str, models: dict[str, Path]) -> None:
    encoder = TransformersEncoder(config(models[kind]))
    with pytest.raises(InputError, match=reason):
        encoder.attach(random_tokens(encoder))


@pytest.mark.parametrize("backend", ["vllm", "vllm_server"])
def test_vllm_backends_refuse_an_adapter(backend: str, models: dict[str, Path], adapter: Path) -> None:
    with pytest.raises(InputError, match=rf"with backend {backend}; probe tokens need backend transformers"):
        load_encoder(config(models["llama"], adapter=str(adapter), backend=backend))


def test_a_limit_without_room_for_the_suffix_is_refused(models: dict[str, Path]) -> None:
    encoder = TransformersEncoder(config(models["llama"], max_length=POSITIONS))
    with pytest.raises(InputError, match=rf"set max_length to {POSITIONS - COUNT} or less"):
        encoder.attach(random_tokens(encoder))


def test_batches_hold_every_row_once_within_size_and_budget() -> None:
    lengths, rows = np.random.default_rng(0).integers(1, 60, 100), np.arange(0, 100, 2)
    batches = make_batches(lengths, rows, 8, 100)
    assert sorted(row for batch in batches for part in batch for row in part) == rows.tolist()
    for batch in batches:
        assert sum(map(len, batch)) <= 8
        assert all(len(part) * lengths[part].max() <= 100 for part in batch)


def test_a_stored_prefix_equals_a_computed_one(models: dict[str, Path], tmp_path: Path) -> None:
    encoder = TransformersEncoder(config(models["llama"]))
    ids = [one.ids for one in encoder.tokenizer(prompts(4))]
    part = np.arange(4)
    kept, none = PrefixStore(encoder, ids, tmp_path, 10**9), PrefixStore(encoder, ids, tmp_path / "none", 0)
    first, stored, computed = kept(part), kept(part), none(part)
    assert kept.tokens == sum(map(len, ids))  # prefilled once
    for prefix in (stored, computed):
        assert torch.equal(prefix.mask, first.mask)
        for got, want in zip(prefix.keys_values, first.keys_values, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


@pytest.fixture(scope="module")
def task(models: dict[str, Path]) -> tuple[list[list[int]], np.ndarray]:
    """Token ids of prompts, and labels that depend on their words; one label is missing."""
    texts = prompts(160)
    ids = [one.ids for one in TransformersEncoder(config(models["llama"])).tokenizer(texts)]
    labels = np.array([[("ba" in text) != ("do" in text), len(row) > 50] for text, row in zip(texts, ids, strict=True)])
    correct = labels.astype(np.float64)
    correct[3, 0] = np.nan
    return ids, correct


@pytest.mark.parametrize(("positions", "limit"), [("suffix", 10**9), ("suffix", 0), ("all", 10**9)])
def test_training_lowers_the_validation_loss_and_leaves_the_encoder(
    positions: str, limit: int, task: tuple[list[list[int]], np.ndarray], models: dict[str, Path], tmp_path: Path
) -> None:
    ids, correct = task
    encoder = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    before = {name: value.clone() for name, value in encoder.blocks.state_dict().items()}
    settings = ProbeTokensConfig(rank=4, max_epochs=3, positions=positions, learning_rate=3e-3)
    tokens = attach_new(encoder, settings, 0)
    learner = Learner(encoder, ids, correct, PrefixStore(encoder, ids, tmp_path, limit), 2048)
    rows = np.arange(len(ids))
    lines: list[str] = []
    trained = learner.train(tokens, rows[40:], rows[:40], settings, 0, lines.append)
    losses = [epoch.validation_loss for epoch in trained.epochs]
    assert min(losses) < losses[0] - 0.02
    assert lines[0].startswith("before training")
    for name, value in encoder.blocks.state_dict().items():
        assert torch.equal(value, before[name])
    kept = learner._loss(trained.head, learner.states(tokens, learner.batches(rows[:40], 40)), rows[:40])
    assert kept == pytest.approx(min(losses), abs=1e-5)


def test_the_parameters_of_the_best_epoch_are_kept(
    task: tuple[list[list[int]], np.ndarray], models: dict[str, Path], tmp_path: Path
) -> None:
    ids, correct = task
    encoder = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    settings = ProbeTokensConfig(rank=2, max_epochs=2, learning_rate=3.0)  # so high that training fails
    tokens = attach_new(encoder, settings, 0)
    before = {name: value.detach().clone() for name, value in tokens.parameters.items()}
    learner = Learner(encoder, ids, correct, PrefixStore(encoder, ids, tmp_path, 10**9), 2048)
    rows = np.arange(len(ids))
    trained = learner.train(tokens, rows[40:], rows[:40], settings, 0, lambda line: None)
    losses = [epoch.validation_loss for epoch in trained.epochs]
    assert min(losses) == losses[0]
    assert all(torch.equal(value, before[name]) for name, value in tokens.parameters.items())


def test_stored_prefixes_are_not_used_for_adapted_prompts(
    task: tuple[list[list[int]], np.ndarray], models: dict[str, Path], tmp_path: Path
) -> None:
    ids, correct = task
    encoder = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    learner = Learner(encoder, ids, correct, PrefixStore(encoder, ids, tmp_path, 10**9), 2048)
    batches = learner.batches(np.arange(6), 6)
    for positions in ("suffix", "all"):  # the first fills the store with the prompts' own keys and values
        tokens = random_tokens(encoder, positions)
        encoder.attach(tokens)
        got = learner.states(tokens, batches)[:6]
        with torch.no_grad():
            want = encoder.suffix_states(encoder.prefill(ids[:6]))[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_missing_labels_do_not_count(task: tuple[list[list[int]], np.ndarray], models: dict[str, Path]) -> None:
    ids, correct = task
    encoder = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    learner = Learner(encoder, ids, correct, PrefixStore(encoder, ids, Path("none"), 0), 2048)
    logits = torch.zeros(2, 2)
    one = learner._summed_loss(logits, np.array([3, 4]))
    assert float(one) == pytest.approx(3 * np.log(2))


def test_a_fixed_suffix_trains_the_head_only(
    task: tuple[list[list[int]], np.ndarray], models: dict[str, Path], tmp_path: Path
) -> None:
    ids, correct = task
    encoder = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    settings = ProbeTokensConfig(text="ba do", rank=0, learn_tokens=False)
    tokens = attach_new(encoder, settings, 0)
    suffix = encoder.tokenizer.bare_ids("ba do")
    learner = Learner(encoder, ids, correct, PrefixStore(encoder, ids, tmp_path, 10**9), 2048)
    rows = np.arange(len(ids))
    trained = learner.train(tokens, rows[40:], rows[:40], settings, 0, lambda line: None)
    assert len(trained.epochs) == 1
    assert torch.equal(tokens.parameters["embeddings"], encoder.token_embeddings[suffix])
    with torch.no_grad():
        got = learner.states(tokens, learner.batches(rows, len(rows)))[:5]
    plain = TransformersEncoder(config(models["llama"], layers=(LAYER,), poolings=("last",)))
    want = plain._read([[*row, *suffix] for row in ids[:5]])[0][0]
    torch.testing.assert_close(got, want.clone(), rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.fixture(scope="module")
def adapted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptConfig, str]:
    """A configuration of the job, and its summary after a run."""
    folder = tmp_path_factory.mktemp("job")
    made, _ = make_table(120)
    texts = dict(zip(sorted(set(made.column("query_id").to_pylist())), prompts(120, longest=8), strict=True))
    prompt = pa.array([texts[one] for one in made.column("query_id").to_pylist()])
    made = made.set_column(made.column_names.index("prompt"), "prompt", prompt)
    pq.write_table(made, folder / "outcomes.parquet")
    save_pool(make_pool(), folder / "pool.yaml")
    settings = AdaptConfig(
        outcomes=folder / "outcomes.parquet",
        pool=folder / "pool.yaml",
        output=folder / "out",
        queries=60,
        encoder=EncoderConfig(model=str(models["llama"])),
        probe_tokens=ProbeTokensConfig(rank=2, max_epochs=1),
    )
    return settings, run(settings)


def test_the_job_reads_training_queries_only(adapted: tuple[AdaptConfig, str]) -> None:
    settings, summary = adapted
    manifest = read_manifest(settings.output / "adapter")
    outcomes = load_outcomes(settings.outcomes, make_pool())
    training = {outcomes.prompt_digests[row] for row in split_queries(outcomes, 0).train}
    assert len(manifest.prompts) == 60
    assert set(manifest.prompts) <= training
    assert manifest.layer == 2  # two thirds of three blocks
    assert manifest.base.max_length == POSITIONS - manifest.tokens
    assert "validation AUC" in summary
    assert sorted(path.name for path in settings.output.iterdir()) == ["adapter"]  # stored prefixes are deleted


def test_an_adapted_encoder_makes_a_dataset_that_refuses_other_splits(
    adapted: tuple[AdaptConfig, str], tmp_path: Path
) -> None:
    settings, _ = adapted
    outcomes = load_outcomes(settings.outcomes, make_pool())
    encoder = settings.encoder.model_copy(update={"adapter": str(settings.output / "adapter"), "layers": (2,)})
    written = tmp_path / "activations"
    pairs = pa.table({"query_id": outcomes.query_ids.tolist(), "prompt": outcomes.prompts.tolist()})
    signals = join(outcomes, [prefill_prompts(pairs, encoder, written)])
    check_adapters(signals, split_queries(outcomes, 0))
    with pytest.raises(InputError, match=r"seed: the training of the adapter .* read \d+ of the 18 calibration and"):
        check_adapters(signals, split_queries(outcomes, 1))
    job = PrefillConfig(input=settings.outcomes, output=written, encoder=encoder)
    assert _is_finished(job, pairs)
    manifest = settings.output / "adapter" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"weights_digest": "0" * 64}))
    try:
        assert not _is_finished(job, pairs)  # another adapter in the same folder
    finally:
        manifest.write_text(text)


def test_the_job_refuses_other_files_and_an_adapted_encoder(adapted: tuple[AdaptConfig, str], tmp_path: Path) -> None:
    settings, _ = adapted
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="exists and is not an adapter"):
        run(settings.model_copy(update={"output": tmp_path}))
    encoder = settings.encoder.model_copy(update={"adapter": "x"})
    with pytest.raises(InputError, match="encoder: got adapter 'x' and backend transformers"):
        run(settings.model_copy(update={"encoder": encoder, "output": tmp_path / "new"}))


def test_a_window_shorter_than_prompt_and_probe_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 203}
    (folder / "config.json").write_text(json.dumps(settings | kind))
    TransformersEncoder(config(folder)).attach(random_tokens(TransformersEncoder(config(folder))))
    encoder = TransformersEncoder(config(folder, max_length=201))
    with pytest.raises(InputError, match="window of 203 tokens is shorter than prompt and probe tokens, 204"):
        encoder.attach(random_tokens(encoder))


def test_the_job_removes_files_of_an_interrupted_run(tmp_path: Path) -> None:
    folder, prefixes = tmp_path / "adapter", tmp_path / ".prefixes-old"
    prefixes.mkdir()
    folder.mkdir()
    (folder / f".{WEIGHTS}.17.tmp").touch()
    _check_place(folder)
    assert not prefixes.exists()
    assert not list(folder.iterdir())


def test_a_dataset_keeps_the_prompts_of_a_deleted_adapter(adapted: tuple[AdaptConfig, str], tmp_path: Path) -> None:
    settings, _ = adapted
    folder = tmp_path / "adapter"
    shutil.copytree(settings.output / "adapter", folder)
    outcomes = load_outcomes(settings.outcomes, make_pool())
    encoder = settings.encoder.model_copy(update={"adapter": str(folder), "layers": (2,)})
    pairs = pa.table({"query_id": outcomes.query_ids.tolist(), "prompt": outcomes.prompts.tolist()})
    signals = join(outcomes, [prefill_prompts(pairs, encoder, tmp_path / "activations")])
    shutil.rmtree(folder)
    check_adapters(signals, split_queries(outcomes, 0))
    with pytest.raises(InputError, match="seed: the training of the adapter"):
        check_adapters(signals, split_queries(outcomes, 1))
    with pytest.raises(InputError, match=r"unseen: encoder .* has an adapter, whose training read labels"):
        refuse_adapters(signals, "unseen", "set it to 0")
    (tmp_path / "activations" / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"no longer holds the adapter of encoder .* copy its adapter\.json to"):
        check_adapters(signals, split_queries(outcomes, 0))


def test_a_dataset_with_the_former_limit_is_resumed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(6)
    monkeypatch.setattr(encoders, "FORMER_DEFAULT_LIMIT", 100)
    first = prefill_prompts(table(texts[:3]), config(models["llama"], max_length=100), tmp_path / "a")
    second = prefill_prompts(table(texts), config(models["llama"], max_length=None), tmp_path / "a")
    assert (second.fingerprint, second.encoder.max_length) == (first.fingerprint, 100)
    assert second.manifest.counts.rows == 6
    assert second.manifest.config["encoder"]["max_length"] is None


def test_a_layer_that_the_encoder_lacks_is_named(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"layer: got 99, allowed are hidden-state indices 1\.\.3"):
        load_base(config(models["llama"]), 99, ProbeTokensConfig())
