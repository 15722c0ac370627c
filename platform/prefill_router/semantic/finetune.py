"""LoRA router: an encoder or causal language model, fine-tuned to predict from a prompt which models answer correctly.

In: `Features.prompts`; a base model as for the prefill encoder (folder, hub id or `minilm`). Out: p(right) of every
model, from one linear head on the pooled last hidden state: the mean over real tokens of a bidirectional encoder, or
the last real token of a causal model. The base is frozen. Trained are the head and low-rank matrices A and B of the
base's linear maps, W x + (alpha / rank) B A x (Hu et al. 2022, LoRA, section 4.1). `arrays_` holds only these and a
digest of the base's weights and tokenizer; prediction loads the base and compares the digest. Does not handle other
features, costs or calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from prefill_router.errors import InputError
from prefill_router.files import sha256_strings
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.loading import (
    embedding_rows,
    find_device,
    load_model,
    max_positions,
    read_config,
    weights_digest,
)
from prefill_router.prefill.locating import locate
from prefill_router.prefill.sample_check import require_finite
from prefill_router.prefill.tokens import PromptTokenizer, token_batches
from prefill_router.progress import tqdm
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Share, Weight
from prefill_router.semantic.stopping import Labels, train

POOL = 50  # batches per pool; the rows of a pool are sorted by length


@dataclass
class LoRARouter(SemanticRouter):
    """LoRA and a linear head, trained by AdamW on the masked log loss with warm-up and decay of the learning rate.

    Raises InputError for a base that the prefill encoder refuses, for missing or unreadable prompts, and for a base
    without the target modules.
    """

    kind: ClassVar[str] = "lora"

    model: str = MINILM
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.1  # probability, on the inputs of the low-rank matrices
    target_modules: str | tuple[str, ...] = "all-linear"  # or suffixes of module names
    learning_rate: Positive = 5e-4  # of the low-rank matrices
    head_learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.01
    batch_size: Count = 32  # prompts
    max_length: int = 256  # tokens; longer prompts keep their end
    max_epochs: Count = 5
    patience: Count = 2
    max_grad_norm: Positive = 1.0
    warmup: Share = 0.1  # of all steps
    decay: Literal["linear", "cosine"] = "linear"
    device: str = "auto"
    _loaded: _Network | None = field(
        default=None, init=False, repr=False, compare=False
    )  # cache, so that predict after fit does not reload the base

    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        with _seeded(seed, find_device(self.device)):
            network = self._load(correct.shape[1])
            with torch.no_grad():
                prior = torch.from_numpy(self.arrays_["prior"][self.arrays_["fitting"]])
                network.head.bias.copy_(torch.logit(prior))
            ids = network.ids(features)
            labels, training_rows, validation_rows = (
                Labels.of(correct, network.device),
                *map(np.flatnonzero, (~validation, validation)),
            )
            lengths = np.array([len(row) for row in ids])[training_rows]
            learned = network.learned()
            groups: list[dict[str, Any]] = [
                {"params": [parameter for name, parameter in learned.items() if not name.startswith("head.")]},
                {"params": list(network.head.parameters()), "lr": self.head_learning_rate},
            ]
            optimiser = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
            steps = self.max_epochs * math.ceil(len(training_rows) / self.batch_size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: self._share(step, steps))
            rng = np.random.default_rng(seed)

            def epoch() -> None:
                network.learn()
                batches = list(bucketed(lengths, self.batch_size, rng))
                for batch in tqdm(batches, desc="LoRA", unit=" batches", disable=None, leave=False):
                    rows = training_rows[batch]
                    optimiser.zero_grad(set_to_none=True)
                    labels.loss(network([ids[row] for row in rows]), torch.from_numpy(rows)).backward()
                    nn.utils.clip_grad_norm_(learned.values(), self.max_grad_norm)
                    optimiser.step()
                    schedule.step()

            def validation_loss() -> float | None:
                rows = torch.from_numpy(validation_rows)
                if not labels.labelled[rows].any():
                    return None
                return float(labels.loss(self._logits(network, [ids[row] for row in validation_rows]), rows))

            train(list(learned.values()), epoch, validation_loss, self.max_epochs, self.patience, "LoRA")
        self._loaded = network
        self.arrays_ |= {
            "digest": network.digest,
            **{name: parameter.detach().cpu().numpy().copy() for name, parameter in learned.items()},
        }

    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        if self._loaded is None:
            with _seeded(0, find_device(self.device)):
                self._loaded = self._load(len(self.arrays_["head.bias"]))
        network = self._loaded
        if not np.array_equal(network.digest, self.arrays_["digest"]):
            raise InputError(
                f"model: {self.model} has other weights or another tokenizer than the base model that "
                "this router was fine-tuned on; restore that base model, or fit the router to this one"
            )
        network.load_state_dict(
            {name: torch.from_numpy(self.arrays_[name]) for name in network.learned()}, strict=False
        )
        return torch.sigmoid(self._logits(network, network.ids(features)).double()).cpu().numpy()

    @torch.no_grad()
    def _logits(self, network: _Network, ids: Sequence[list[int]]) -> Tensor:
        network.eval()
        logits = torch.empty(len(ids), network.head.out_features, device=network.device)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        for rows in token_batches(lengths, self.batch_size * self.max_length):
            logits[torch.from_numpy(rows)] = network([ids[row] for row in rows])
        return logits

    def _load(self, models: int) -> _Network:
        """The base with a new head and new low-rank matrices, which start as the identity (B = 0)."""
        config = EncoderConfig(model=self.model, max_length=self.max_length, device=self.device)
        folder = locate(config)
        base_config = read_config(folder)
        text = base_config.get_text_config()
        digest = weights_digest(folder, config)
        base = load_model(folder, base_config, torch.float32).to(find_device(self.device))
        vocabulary = embedding_rows(base, text)
        tokenizer = PromptTokenizer(folder, config, max_positions(base, text), vocabulary)
        causal = _is_causal(base, vocabulary, folder)
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
        )
        try:
            inject_adapter_in_model(lora, base)
        except ValueError as error:
            raise InputError(
                f"target_modules: {self.model} cannot take {targets!r} "
                f"({' '.join(str(error).split())[:200]}); allowed are 'all-linear' or names of its linear "
                "modules"
            ) from None
        both = sha256_strings([digest, tokenizer.digest])
        return _Network(
            base,
            nn.Linear(text.hidden_size, models),
            tokenizer,
            causal,
            np.frombuffer(bytes.fromhex(both), dtype=np.uint8).copy(),
        )

    def _share(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step, counted from 0: rises to 1 during the warm-up, then falls to 0."""
        rising = max(round(self.warmup * steps), 1)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(steps - rising, 1)
        return 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class _Network(nn.Module):
    """The base with its low-rank matrices, the head and the tokenizer."""

    def __init__(
        self, base: nn.Module, head: nn.Linear, tokenizer: PromptTokenizer, causal: bool, digest: np.ndarray
    ) -> None:
        super().__init__()
        self.device: torch.device = next(base.parameters()).device
        self.base, self.head = base, head.to(self.device)
        self.tokenizer, self.causal, self.digest = tokenizer, causal, digest

    def learned(self) -> dict[str, nn.Parameter]:
        """The trainable parameters; injecting the low-rank matrices has frozen the rest of the base."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def learn(self) -> None:
        """Enables dropout of the low-rank matrices only; the base stays in evaluation mode, which is faster."""
        self.eval()
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train()

    def ids(self, features: Features) -> list[list[int]]:
        """The prompts' token ids. Raises InputError that names the first unreadable prompt."""
        if features.prompts is None:
            raise InputError("lora: Features.prompts is None; use the family text")
        tokens = self.tokenizer(features.prompts.tolist())
        for row, read in enumerate(tokens):
            if read.error is not None:
                raise InputError(f"prompts: query {row}: {read.error}; leave the query out")
        return [read.ids for read in tokens]

    def forward(self, ids: Sequence[list[int]]) -> Tensor:
        """Logits [prompts, models] of token ids of any lengths."""
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.full((len(ids), int(lengths.max())), self.tokenizer.pad_id)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        padded[mask] = torch.tensor([token for row in ids for token in row])
        mask, lengths = mask.to(self.device), lengths.to(self.device)
        states = self.base(input_ids=padded.to(self.device), attention_mask=mask.long()).last_hidden_state
        if self.causal:
            return self.head(states[torch.arange(len(ids), device=self.device), lengths - 1])
        return self.head(states.masked_fill(~mask[..., None], 0).sum(dim=1) / lengths[:, None])


def bucketed(
    lengths: Int[np.ndarray, " rows"], size: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Yields every row once, in batches of similar length and random order. Rows are shuffled, cut into pools of POOL
    batches, and sorted by length within a pool."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    for batch in rng.permutation(len(batches)):
        yield batches[batch]


@torch.no_grad()
def _is_causal(base: nn.Module, vocabulary: int, folder: Path) -> bool:
    """Tests whether the first token's state stays the same when the last token changes.

    Raises InputError if the states are not finite.
    """
    device, middle = next(base.parameters()).device, vocabulary // 2  # ids in the middle avoid special tokens
    first = []
    for last in (middle + 2, middle + 3):
        ids = torch.tensor([[middle, middle + 1, last]], device=device) % vocabulary
        first.append(base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0])
    largest = require_finite(float(first[0].abs().max()), folder)
    return torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-5 * largest)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators, used by new matrices and dropout, and restores their states on exit."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
