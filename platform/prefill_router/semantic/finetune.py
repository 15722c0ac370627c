"""LoRA router: an encoder or causal language model fine-tuned to say from a prompt which models will be right.

In: `Features.prompts` alone; a base model by folder, hub id or `minilm`, any that the prefill encoder takes. Out:
p(right) of every model, by one linear head on the pooled last hidden state: the mean over real tokens of a
bidirectional encoder, the last real token of a causal model. The base stays as it is; what learns are low-rank matrices
beside its linear maps, W x + (alpha / rank) B A x (Hu et al., 2022, LoRA, section 4.1), and the head. Those alone are
kept in `arrays_`: the base is loaded again for prediction and must be the same, weights and tokenizer, by its digest.
Knows nothing of other features, costs or calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm import tqdm

from prefill_router.errors import InputError
from prefill_router.files import sha256_strings
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.prefill.loading import find_device, load_model, locate, max_positions, read_config, weights_digest
from prefill_router.prefill.tokens import PromptTokenizer, token_batches
from prefill_router.semantic.router import Count, Features, Positive, SemanticRouter, Share, Weight
from prefill_router.semantic.stopping import Labels, train

POOL = 50  # batches that are shuffled together, then sorted by length


@dataclass
class LoRARouter(SemanticRouter):
    """LoRA on a base model and a linear head, by AdamW on the masked log loss; the learning rate warms up and decays.

    Raises InputError as the prefill encoder does for a base that is not there or not fit for use, for prompts that are
    missing or cannot be read, and where the base has none of the target modules.
    """

    kind: ClassVar[str] = "lora"

    model: str = MINILM
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.1  # probability, of what enters the low-rank matrices
    target_modules: str | tuple[str, ...] = "all-linear"  # or names' endings
    learning_rate: Positive = 5e-4  # of the low-rank matrices
    head_learning_rate: Positive = 2e-3
    weight_decay: Weight = 0.01
    batch_size: Count = 32  # prompts
    max_length: int = 256  # tokens kept of a prompt, its end
    max_epochs: Count = 5
    patience: Count = 2
    max_grad_norm: Positive = 1.0
    warmup: Share = 0.1  # share of all steps
    decay: Literal["linear", "cosine"] = "linear"
    device: str = "auto"
    _loaded: _Network | None = field(default=None, init=False, repr=False, compare=False)  # from fit to predict

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
            labels, learning, watching = (
                Labels.of(correct, network.device),
                *map(np.flatnonzero, (~validation, validation)),
            )
            lengths = np.array([len(row) for row in ids])[learning]
            learned = network.learned()
            groups: list[dict[str, Any]] = [
                {"params": [parameter for name, parameter in learned.items() if not name.startswith("head.")]},
                {"params": list(network.head.parameters()), "lr": self.head_learning_rate},
            ]
            optimiser = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
            steps = self.max_epochs * math.ceil(len(learning) / self.batch_size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: self._share(step, steps))
            rng = np.random.default_rng(seed)

            def epoch() -> None:
                network.learn()
                batches = list(bucketed(lengths, self.batch_size, rng))
                for batch in tqdm(batches, desc="LoRA", unit="batch", disable=None, leave=False):
                    rows = learning[batch]
                    optimiser.zero_grad(set_to_none=True)
                    labels.loss(network([ids[row] for row in rows]), torch.from_numpy(rows)).backward()
                    nn.utils.clip_grad_norm_(learned.values(), self.max_grad_norm)
                    optimiser.step()
                    schedule.step()

            def validation_loss() -> float | None:
                rows = torch.from_numpy(watching)
                if not labels.labelled[rows].any():
                    return None
                return float(labels.loss(self._logits(network, [ids[row] for row in watching]), rows))

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
                f"model: {self.model} has other weights, or another tokenizer, than the one that this "
                "router was fine-tuned on; put that one in its place, or fit again"
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
        """The base with new low-rank matrices, which change nothing yet, and a new head."""
        config = EncoderConfig(model=self.model, max_length=self.max_length, device=self.device)
        folder = locate(config)
        base_config = read_config(folder)
        text = base_config.get_text_config()
        digest = weights_digest(folder, config)
        base = load_model(folder, base_config, torch.float32).to(find_device(self.device))
        tokenizer = PromptTokenizer(folder, config, max_positions(base, text))
        causal = _is_causal(base, text.vocab_size)
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
        """Of the learning rate at a step, counted from 0: up to all of it in the warm-up, then down to nothing."""
        rising = max(round(self.warmup * steps), 1)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(steps - rising, 1)
        return 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class _Network(nn.Module):
    """The base with its low-rank matrices, the head, and the tokenizer that reads for them."""

    def __init__(
        self, base: nn.Module, head: nn.Linear, tokenizer: PromptTokenizer, causal: bool, digest: np.ndarray
    ) -> None:
        super().__init__()
        self.device: torch.device = next(base.parameters()).device
        self.base, self.head = base, head.to(self.device)
        self.tokenizer, self.causal, self.digest = tokenizer, causal, digest

    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn: injecting the matrices froze all others of the base."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def learn(self) -> None:
        """Dropout for the low-rank matrices alone: the base computes as in prediction, and so much faster on a CPU."""
        self.eval()
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train()

    def ids(self, features: Features) -> list[list[int]]:
        """The prompts' token ids. Raises InputError naming the first that cannot be read."""
        if features.prompts is None:
            raise InputError("lora: the features have no prompts; this router reads nothing else")
        tokens = self.tokenizer(features.prompts.tolist())
        for row, read in enumerate(tokens):
            if read.error is not None:
                raise InputError(f"prompts: query {row}: {read.error}; leave the query out")
        return [read.ids for read in tokens]

    def forward(self, ids: Sequence[list[int]]) -> Tensor:
        """[prompts, models] logits, from token ids of any lengths."""
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
    """Every row once, in batches of similar length and random order: sorting stays within shuffled pools of rows."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    for batch in rng.permutation(len(batches)):
        yield batches[batch]


@torch.no_grad()
def _is_causal(base: nn.Module, vocabulary: int) -> bool:
    """Measured, not guessed: does the first state stay as it is when the last token changes?"""
    device, middle = next(base.parameters()).device, vocabulary // 2  # clear of padding and other special tokens
    first = []
    for last in (middle + 2, middle + 3):
        ids = torch.tensor([[middle, middle + 1, last]], device=device) % vocabulary
        first.append(base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0])
    return torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-5 * float(first[0].abs().max()))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, from which new matrices and dropout draw, seeded within and as before after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
