"""Trains probe tokens through a frozen encoder to predict which models answer a prompt correctly (IntroLM,
arXiv 2601.03511).

In: an encoder with one layer, token ids of prompts, labels [prompts, models] (NaN: unlabelled), training and validation
rows. Out: `Trained`. The prediction is a linear head on the state of the last probe token. The loss is the mean binary
cross-entropy over labelled (prompt, model) pairs. The head starts as a logistic regression on the states before
training; the parameters of the epoch with the lowest validation loss are kept, epoch 0 (before training) included.
Independent of outcomes tables, splits and files of adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from prefill_router.adapt.batches import Part, PrefixStore, make_batches
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.prefill.adapter import Positions
from prefill_router.prefill.probe_tokens import Maps, ProbeTokens, new_probe_tokens
from prefill_router.prefill.transformers_backend import TransformersEncoder
from prefill_router.progress import tqdm
from prefill_router.signals.logistic import fit_logistic

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # inverse penalties c of the initial head
MIN_STD = 1e-6  # of a state's component


class ProbeTokensConfig(FrozenModel):
    """Shape and training of probe tokens."""

    text: Annotated[
        str,
        Field(min_length=1, description="the initial embeddings of the probe tokens are those of this text's tokens"),
    ] = "Will the answer be right?"
    tokens: Annotated[
        int | None, Field(ge=1, description="number of probe tokens, the text repeated or cut; None: that of the text")
    ] = None
    learn_tokens: Annotated[bool, Field(description="train the embeddings; false: the text is a fixed suffix")] = True
    rank: Annotated[int, Field(ge=0, description="rank of the low-rank matrices; 0: none")] = 32
    maps: Annotated[Maps, Field(description="linear maps with low-rank matrices: feed_forward, or all of a block")] = (
        "feed_forward"
    )
    positions: Annotated[
        Positions,
        Field(
            description="positions at which low-rank matrices apply: suffix (probe tokens only, the prompt's keys and "
            "values are unchanged) or all"
        ),
    ] = "suffix"
    learning_rate: Annotated[float, Field(gt=0, description="of embeddings and low-rank matrices")] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0, description="of the linear head")] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="of the low-rank matrices")] = 0.01
    batch_size: Annotated[int, Field(ge=1, description="prompts per optimiser step")] = 32
    max_epochs: Annotated[int, Field(ge=1, description="maximum number of epochs")] = 4
    patience: Annotated[
        int, Field(ge=1, description="epochs without a lower validation loss before training stops")
    ] = 2
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps in which the learning rate rises")] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0, description="gradients are scaled down to this norm")] = 1.0


class Head(nn.Module):
    """Logits of every model from states [prompts, hidden]: standardised components, then a linear map."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.weight, self.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear((states - self.mean) / self.std, self.weight, self.bias)


@dataclass(frozen=True)
class Epoch:
    """Losses of an epoch and its duration in seconds. Epoch 0 is the state before training."""

    epoch: int
    training_loss: float
    validation_loss: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """Trained probe tokens with their prediction head, and the losses by epoch."""

    tokens: ProbeTokens
    head: Head
    epochs: tuple[Epoch, ...]


def initial_ids(encoder: TransformersEncoder, config: ProbeTokensConfig) -> list[int]:
    """Ids of the tokens whose embeddings the probe tokens start with. Raises InputError for a text without tokens."""
    found = encoder.tokenizer.bare_ids(config.text)
    if not found or max(found) >= len(encoder.token_embeddings):
        raise InputError(f"text: got {config.text!r}, for which the encoder has no token embeddings; change the text")
    return [found[index % len(found)] for index in range(config.tokens or len(found))]


def attach_new(encoder: TransformersEncoder, config: ProbeTokensConfig, seed: int) -> ProbeTokens:
    """Attaches untrained probe tokens to the encoder. Raises InputError as `attach` and `new_probe_tokens` do."""
    embeddings = encoder.token_embeddings[initial_ids(encoder, config)]
    tokens = new_probe_tokens(embeddings, encoder.blocks, config.rank, config.maps, config.positions, seed)
    encoder.attach(tokens)
    return tokens


class Learner:
    """Encoder, prompts and labels of a training. `ids` and `correct` have one row per prompt."""

    def __init__(
        self,
        encoder: TransformersEncoder,
        ids: Sequence[Sequence[int]],
        correct: Float[np.ndarray, "prompts models"],
        store: PrefixStore,
        batch_tokens: int,
    ) -> None:
        self.encoder, self.store, self._batch_tokens = encoder, store, batch_tokens
        self._lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self._correct = torch.from_numpy(np.nan_to_num(correct).astype(np.float32)).to(encoder.device)
        self._labelled = torch.from_numpy(np.isfinite(correct).astype(np.float32)).to(encoder.device)
        self._labels = correct

    def batches(self, rows: Int[np.ndarray, " subset"], size: int) -> list[list[Part]]:
        """See `make_batches`."""
        return make_batches(self._lengths, rows, size, self._batch_tokens)

    @torch.no_grad()
    def states(self, tokens: ProbeTokens, batches: Sequence[Sequence[Part]], initial: bool = False) -> Tensor:
        """States [prompts, hidden] of the attached probe tokens after the prompts of `batches`; NaN for other prompts.

        `initial`: the low-rank matrices are zero, so that the stored prefixes are valid for all `positions`.
        """
        parts = [part for batch in batches for part in batch]
        states: Tensor | None = None
        for part in tqdm(parts, desc="states", unit=" batches", disable=None, leave=False):
            own = self._own_states(tokens, part, initial)
            states = own.new_full((len(self._lengths), own.shape[1]), torch.nan) if states is None else states
            states[torch.from_numpy(part).to(own.device)] = own
        assert states is not None
        return states

    def train(
        self,
        tokens: ProbeTokens,
        training: Int[np.ndarray, " training"],
        validation: Int[np.ndarray, " validation"],
        config: ProbeTokensConfig,
        seed: int,
        report: Callable[[str], None],
    ) -> Trained:
        """Trains the attached probe tokens in place. `report` receives a line per epoch."""
        began = time.perf_counter()
        batches = self.batches(training, config.batch_size)
        validation_batches = self.batches(validation, len(validation))
        states = self.states(tokens, [*batches, *validation_batches], initial=True)
        head, c = logistic_head(states, self._labels, training, validation)
        losses = [self._loss(head, states, rows) for rows in (training, validation)]
        epochs = [Epoch(0, losses[0], losses[1], time.perf_counter() - began)]
        report(_line(epochs[-1]))
        decay = 1 / (c * len(training))  # of the head: the penalty of its logistic regression, per training row
        learnt = _learnt(tokens, config)
        if not learnt:
            return Trained(tokens, head, tuple(epochs))
        parameters = [*learnt, *head.parameters()]
        optimiser = torch.optim.AdamW(
            [
                {"params": learnt, "lr": config.learning_rate, "weight_decay": config.weight_decay},
                {"params": list(head.parameters()), "lr": config.head_learning_rate, "weight_decay": 0.0},
            ]
        )
        steps = config.max_epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps, config.warmup))
        rng = np.random.default_rng(seed)
        best = [parameter.detach().clone() for parameter in parameters]
        for number in range(1, config.max_epochs + 1):
            began, total = time.perf_counter(), 0.0
            for batch in tqdm(
                _shuffled(batches, rng), f"epoch {number}", len(batches), False, unit=" batches", disable=None
            ):
                optimiser.zero_grad(set_to_none=True)
                total += self._backward(tokens, head, batch, decay)
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimiser.step()
                schedule.step()
            loss = self._loss(head, self.states(tokens, validation_batches), validation)
            epochs.append(Epoch(number, total / len(batches), loss, time.perf_counter() - began))
            report(_line(epochs[-1]))
            losses = [one.validation_loss for one in epochs]
            if loss == min(losses):
                best = [parameter.detach().clone() for parameter in parameters]
            if number - int(np.argmin(losses)) >= config.patience:
                break
        with torch.no_grad():
            for parameter, kept in zip(parameters, best, strict=True):
                parameter.copy_(kept)
        return Trained(tokens, head, tuple(epochs))

    def _own_states(self, tokens: ProbeTokens, part: Part, initial: bool = False) -> Tensor:
        stored = initial or tokens.positions == "suffix"
        return self.encoder.suffix_states(self.store(part) if stored else self.store.compute(part))[0]

    def _backward(self, tokens: ProbeTokens, head: Head, batch: Sequence[Part], decay: float) -> float:
        """Adds the gradients of a batch; returns its loss without the penalty on the head."""
        count = sum(float(self._labelled[torch.from_numpy(part)].sum()) for part in batch) or 1.0
        total = 0.0
        for part in batch:
            loss = self._summed_loss(head(self._own_states(tokens, part)), part) / count
            loss.backward()
            total += float(loss.detach())
        (0.5 * decay * head.weight.square().sum() / len(head.weight)).backward()
        return total

    def _summed_loss(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        at = torch.from_numpy(rows).to(logits.device)
        losses = functional.binary_cross_entropy_with_logits(logits, self._correct[at], reduction="none")
        return (losses * self._labelled[at]).sum()

    @torch.no_grad()
    def _loss(self, head: Head, states: Tensor, rows: np.ndarray) -> float:
        """Mean log loss over the labelled pairs of `rows`."""
        labelled = float(self._labelled[torch.from_numpy(rows)].sum())
        at = torch.from_numpy(rows).to(states.device)
        return float(self._summed_loss(head(states[at]), rows)) / max(labelled, 1.0)


def logistic_head(
    states: Float[Tensor, "prompts hidden"],
    correct: Float[np.ndarray, "prompts models"],
    training: Int[np.ndarray, " training"],
    validation: Int[np.ndarray, " validation"],
) -> tuple[Head, float]:
    """Logistic regression on the standardised states of the training rows, and its inverse penalty c.

    c is the one of `PENALTIES` with the lowest log loss over the labelled pairs of the validation rows.
    """
    own = states[torch.from_numpy(training).to(states.device)]
    mean, std = own.mean(dim=0), own.std(dim=0).clamp(min=MIN_STD)
    z = ((own - mean) / std).double().cpu().numpy()
    held_out, labels = states[torch.from_numpy(validation).to(states.device)], correct[validation]
    found = []
    for c in PENALTIES:
        weights = torch.from_numpy(fit_logistic(z, correct[training].astype(np.float64), c)).T
        head = Head(mean, std, weights[:, :-1], weights[:, -1]).to(states.device)
        with torch.no_grad():
            logits = head(held_out).double().cpu().numpy()
        losses = np.logaddexp(0, logits) - np.nan_to_num(correct[validation]) * logits
        found.append((float(losses[np.isfinite(labels)].sum()), c, head))
    _, c, head = min(found, key=lambda one: one[0])
    return head, c


def _learnt(tokens: ProbeTokens, config: ProbeTokensConfig) -> list[nn.Parameter]:
    return [one for name, one in tokens.parameters.items() if name != "embeddings" or config.learn_tokens]


def _shuffled(batches: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    for index in rng.permutation(len(batches)):
        yield batches[index]


def _share(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at a step, counted from 0: rises to 1 during the warm-up, then falls to 0."""
    rising = max(round(warmup * steps), 1)
    return (step + 1) / rising if step < rising else 1 - (step - rising) / max(steps - rising, 1)


def _line(epoch: Epoch) -> str:
    when = f"epoch {epoch.epoch}" if epoch.epoch else "before training"
    return (
        f"{when}: log loss {epoch.training_loss:.4f} on training rows, {epoch.validation_loss:.4f} on validation rows, "
        f"{epoch.seconds:.0f} s"
    )
