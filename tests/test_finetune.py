"""LoRA router on tiny models: it learns a planted rule, leaves its base alone, and comes back the same."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from tiny_models import save_model, words

from prefill_router.errors import InputError
from prefill_router.semantic.finetune import LoRARouter, bucketed
from prefill_router.semantic.router import Features

pytestmark = pytest.mark.train

SMALL: dict[str, Any] = {
    "rank": 4,
    "max_length": 64,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "head_learning_rate": 1e-2,
    "max_epochs": 8,
    "patience": 8,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny base models by kind."""
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("roberta", "llama", "gpt2")}


def planted(n: int, seed: int = 0) -> tuple[Features, np.ndarray]:
    """Texts, half of which hold a certain word: then model 0 is right, else model 1."""
    rng, lexicon = np.random.default_rng(seed), words(60, 3)
    texts = [list(rng.choice(lexicon, size=rng.integers(2, 8))) for _ in range(n)]
    holds = rng.random(n) < 0.5
    for row in np.flatnonzero(holds):
        texts[row].insert(int(rng.integers(len(texts[row]) + 1)), "zux")
    correct = np.column_stack([holds, ~holds]).astype(np.float32)
    prompts = np.array([" ".join(text) for text in texts], dtype=object)
    return Features(np.zeros((n, 0), np.float32), np.zeros((n, 2, 0), np.float32), prompts), correct


def every_fifth(n: int) -> np.ndarray:
    return np.arange(n) % 5 == 0


def loss(correct: np.ndarray, p: np.ndarray) -> float:
    return float(-np.mean(np.log(np.where(correct == 1, p, 1 - p))))


@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_a_planted_rule_is_learned_while_the_base_stays_as_it_was(bases: dict[str, Path], kind: str):
    features, correct = planted(250)
    train, test = np.arange(250) < 200, np.arange(250) >= 200
    router = LoRARouter(model=str(bases[kind]), **SMALL)
    router.fit(features.take(train), correct[train], every_fifth(200))
    p = router.predict(features.take(test))
    assert roc_auc_score(correct[test, 0], p[:, 0]) > 0.9
    assert roc_auc_score(correct[test, 1], p[:, 1]) > 0.9
    assert loss(correct[test], p) < math.log(2) - 0.2
    stored = load_file(bases[kind] / "model.safetensors")
    now = {
        name.removeprefix("base.").replace(".base_layer", ""): tensor
        for name, tensor in router._loaded.named_parameters()
        if not tensor.requires_grad
    }
    assert len(now) > 10
    for name, tensor in now.items():
        kept = next(stored[prefix + name] for prefix in ("", "model.", "transformer.") if prefix + name in stored)
        assert torch.equal(tensor, kept), name
    assert router._loaded.causal == (kind != "roberta")
    learned = {name.split(".")[-3] for name in router.arrays_ if name.startswith("base.")}
    assert learned == {"lora_A", "lora_B"}


def test_a_router_comes_back_from_a_folder_the_same_and_rows_stand_alone(bases: dict[str, Path], tmp_path: Path):
    features, correct = planted(60)
    correct[every_fifth(60), 1] = np.nan
    router = LoRARouter(model=str(bases["roberta"]), target_modules=("query", "value"), **{**SMALL, "max_epochs": 2})
    p = router.fit(features, correct, every_fifth(60)).predict(features)
    router.save(tmp_path)
    loaded = LoRARouter.load(tmp_path)
    assert loaded == router
    assert "_loaded" not in router.settings
    before = torch.get_rng_state()
    np.testing.assert_array_equal(loaded.predict(features), p)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(loaded.predict(features.take(np.array([5, 2, 40]))), p[[5, 2, 40]], atol=1e-5)


def test_a_seed_decides_everything(bases: dict[str, Path]):
    features, correct = planted(40)
    correct[every_fifth(40)] = np.nan  # no validation labels: all epochs are run
    first, again, other = (
        LoRARouter(model=str(bases["llama"]), **{**SMALL, "max_epochs": 1})
        .fit(features, correct, every_fifth(40), seed)
        .predict(features)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_prediction_reads_arrays_alone_and_refuses_another_base(bases: dict[str, Path], tmp_path: Path):
    base = shutil.copytree(bases["roberta"], tmp_path / "base")
    features, correct = planted(40)
    routers = [
        LoRARouter(model=str(base), **{**SMALL, "max_epochs": 1}).fit(features, correct, every_fifth(40), seed)
        for seed in (0, 1)
    ]
    expected = routers[1].predict(features)
    routers[0].arrays_ = routers[1].arrays_
    np.testing.assert_array_equal(routers[0].predict(features), expected)
    routers[0].save(tmp_path / "router")
    weights = dict(load_file(base / "model.safetensors"))
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = weights[name] + 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="other weights or another tokenizer"):
        LoRARouter.load(tmp_path / "router").predict(features)


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_pooling_is_that_of_each_prompt_read_alone(bases: dict[str, Path], kind: str):
    network = LoRARouter(model=str(bases[kind]), **SMALL)._load(3).eval()
    features, _ = planted(8)
    ids = network.ids(features)
    with torch.no_grad():
        logits = network(ids)
        for row, own in enumerate(ids):
            states = network.base(input_ids=torch.tensor([own])).last_hidden_state[0]
            pooled = states[-1] if kind == "llama" else states.mean(dim=0)
            torch.testing.assert_close(logits[row], network.head(pooled), atol=1e-4, rtol=1e-4)


def test_untrained_matrices_change_nothing_and_merge_as_the_paper_says(bases: dict[str, Path]):
    """W x + (alpha / rank) B A x."""
    network = LoRARouter(model=str(bases["roberta"]), alpha=6.0, **SMALL)._load(1).eval()
    layer = next(module for module in network.modules() if hasattr(module, "lora_A"))
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        layer.lora_B["default"].weight.normal_()
        change = 6.0 / 4 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer(x), layer.base_layer(x) + change, atol=1e-4, rtol=1e-4)


def test_dropout_while_learning_is_of_the_matrices_alone(bases: dict[str, Path]):
    network = LoRARouter(model=str(bases["roberta"]), **SMALL)._load(1)
    network.learn()
    drops = {name: module.training for name, module in network.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {"lora_dropout" in name for name in drops} == {True, False}
    assert all(training == ("lora_dropout" in name) for name, training in drops.items())


def test_batches_hold_every_row_once_and_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 500, 1010)
    batches = list(bucketed(lengths, 20, np.random.default_rng(1)))
    assert sorted(np.concatenate(batches)) == list(range(1010))
    assert max(len(batch) for batch in batches) == 20
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches if len(batch) == 20])
    assert spread < 30  # 450 for batches of any rows
    first = [lengths[batch].mean() for batch in batches]
    assert np.abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.5  # not from short to long
    assert [list(batch) for batch in bucketed(lengths, 20, np.random.default_rng(1))] == [list(b) for b in batches]


@pytest.mark.parametrize(("decay", "quarter"), [("linear", 0.75), ("cosine", 0.5 + 0.5 * math.sqrt(0.5))])
def test_the_learning_rate_rises_then_falls_to_nothing(decay: Any, quarter: float):
    router = LoRARouter(warmup=0.2, decay=decay)
    shares = [router._share(step, 100) for step in (0, 9, 19, 20, 40, 60, 100)]
    np.testing.assert_allclose(shares, [1 / 20, 10 / 20, 1, 1, quarter, 0.5, 0], atol=1e-12)


def test_what_cannot_be_read_or_adapted_is_named(bases: dict[str, Path]):
    features, correct = planted(20)
    router = LoRARouter(model=str(bases["roberta"]), **SMALL)
    with pytest.raises(InputError, match=r"lora: Features\.prompts is None"):
        router.fit(Features(features.shared, features.own), correct, every_fifth(20))
    blank = features.prompts.copy()
    blank[7] = " "
    with pytest.raises(InputError, match="prompts: query 7: prompt is empty"):
        router.fit(Features(features.shared, features.own, blank), correct, every_fifth(20))
    with pytest.raises(InputError, match=r"target_modules: .* cannot take \['nonesuch'\]"):
        LoRARouter(model=str(bases["roberta"]), target_modules=("nonesuch",), **SMALL).fit(
            features, correct, every_fifth(20)
        )
    with pytest.raises(InputError, match=r"model: .*no such folder"):
        LoRARouter(model="/nowhere/model", **SMALL).fit(features, correct, every_fifth(20))


def test_matrices_and_head_have_learning_rates_of_their_own(bases: dict[str, Path]):
    """With next to no learning rate the matrices stay, which begin at B = 0, and the head moves by its own."""
    features, correct = planted(40)
    tiny = {**SMALL, "max_epochs": 1, "learning_rate": 1e-12}
    router = LoRARouter(model=str(bases["roberta"]), **tiny).fit(features, correct, every_fifth(40))
    b = [array for name, array in router.arrays_.items() if "lora_B" in name]
    assert max(np.abs(array).max() for array in b) < 1e-9
    still = LoRARouter(model=str(bases["roberta"]), **{**tiny, "head_learning_rate": 1e-12})
    still.fit(features, correct, every_fifth(40))
    assert np.abs(still.arrays_["head.weight"] - router.arrays_["head.weight"]).max() > 1e-3
