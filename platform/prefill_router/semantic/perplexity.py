"""Perplexity features of prompts under a frozen causal language model, the bundled SmolLM2 by default.

In: texts. Out: [queries, 4] in the order of `NAMES`, and a reason per unreadable prompt. For tokens x_1..x_n and the
model's distribution q_t of x_t given x_<t, in nats (paper 4.2; Radford et al. 2019):

    mean_log_probability  mean_t ln q_t(x_t)             max_surprise  max_t -ln q_t(x_t)
    perplexity            exp(-mean_log_probability)     entropy       mean_t of the entropy of q_t

The tokenizer's BOS token is put before every prompt, so that x_1 is predicted too. Without a BOS token, t starts at 2
and a prompt of fewer than two tokens has no features. Special tokens that the tokenizer adds count as tokens. Chat
templates are not used. Does not handle dataset files or clusters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import transformers
from jaxtyping import Float
from pydantic import Field

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.prefill.config import SMOLLM2, EncoderConfig, TruncationSide
from prefill_router.prefill.loading import (
    embedding_rows,
    find_device,
    load_language_model,
    max_positions,
    read_config,
    weights_digest,
)
from prefill_router.prefill.locating import locate
from prefill_router.prefill.sample_check import require_finite
from prefill_router.prefill.tokens import PromptTokenizer, token_batches

NAMES = ("mean_log_probability", "perplexity", "max_surprise", "entropy")
LOGITS = 2**24  # computed at once: 64 MiB of float32, 341 positions with SmolLM2's vocabulary


class PerplexityConfig(FrozenModel):
    """The language model and its run-time settings."""

    model: Annotated[
        str, Field(description="causal language model: smollm2 (bundled), model folder, .gguf file, or hub id")
    ] = SMOLLM2
    revision: Annotated[str | None, Field(description="hub revision; None is the default branch")] = None
    max_length: Annotated[
        int | None,
        Field(
            ge=2,
            description="tokens kept of a prompt, without an added BOS token; "
            "None: one less than the model's maximum, at most 8,192",
        ),
    ] = None
    truncation_side: Annotated[
        TruncationSide,
        Field(description="part of a longer prompt that is cut off; prompts usually end with the question"),
    ] = "left"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="of weights and forward pass; distributions are computed in float32"),
    ] = "float32"
    batch_tokens: Annotated[int, Field(ge=1, description="tokens per padded batch")] = 8192
    device: Annotated[str, Field(description="torch device; `auto` is cuda if available, else cpu")] = "auto"

    def as_encoder(self) -> EncoderConfig:
        """The same settings as an encoder configuration, for the functions that load encoders."""
        return EncoderConfig(**self.model_dump())


class LanguageModelInfo(FrozenModel):
    """A loaded language model; `fingerprint` identifies everything that the features depend on."""

    model: str
    revision: str | None
    architecture: str
    weights_digest: str
    tokenizer_digest: str
    adds_bos: Annotated[bool, Field(description="whether a BOS token is put before the tokenizer's output")]
    max_length: int
    truncation_side: TruncationSide
    dtype: Literal["float32", "bfloat16"]
    backend: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal if and only if two models' features are interchangeable."""
        what = self.model_dump(exclude={"model", "revision", "backend"})
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


class Perplexity:
    """Computes the features with a frozen language model, which is loaded on construction.

    Raises InputError for a model that does not exist, is not a causal language model with safetensors weights, computes
    logits by more than a linear head, or does not support the configured length or device.
    """

    def __init__(self, config: PerplexityConfig) -> None:
        encoder = config.as_encoder()
        folder = locate(encoder)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        digest = weights_digest(folder, encoder)
        self._device = find_device(config.device)
        self._model = load_language_model(folder, model_config, getattr(torch, config.dtype)).to(self._device)
        self._head = self._model.get_output_embeddings()
        vocabulary = embedding_rows(self._model, text)
        self._check(folder, vocabulary, 1e-4 if config.dtype == "float32" else 3e-2)
        positions = max_positions(self._model, text)
        self._tokenizer = PromptTokenizer(folder, encoder, None if positions is None else positions - 1, vocabulary)
        self._batch_tokens = config.batch_tokens
        self._chunk = max(1, LOGITS // text.vocab_size)
        self.info = LanguageModelInfo(
            model=config.model,
            revision=folder.name if folder.parent.name == "snapshots" else None,
            architecture=type(self._model).__name__,
            weights_digest=digest,
            tokenizer_digest=self._tokenizer.digest,
            adds_bos=self._tokenizer.bos_id is not None,
            max_length=self._tokenizer.max_length,
            truncation_side=config.truncation_side,
            dtype=config.dtype,
            backend=f"transformers {transformers.__version__}",
        )

    def __call__(self, prompts: Sequence[object]) -> tuple[Float[np.ndarray, "queries 4"], list[str | None]]:
        """(features in float64, reasons); a prompt with a reason has NaN features, others have the reason None.

        A prompt has no features if it is null, not a string, blank, shorter than two tokens with BOS, or if the model's
        values for it are not finite.
        """
        tokens = self._tokenizer(prompts)
        errors = [token.error for token in tokens]
        ids = [self._with_bos(token.ids) for token in tokens]
        for row, sequence in enumerate(ids):
            if errors[row] is None and len(sequence) < 2:
                errors[row] = "fewer than two tokens, and the tokenizer has no BOS token to put before them"
        readable = np.asarray([row for row, error in enumerate(errors) if error is None], dtype=np.int64)
        lengths = np.asarray([len(ids[row]) for row in readable], dtype=np.int64)
        values = np.full((len(tokens), len(NAMES)), np.nan)
        for batch in token_batches(lengths, self._batch_tokens):
            rows = readable[batch]
            values[rows] = self._read([ids[row] for row in rows])
        for row in readable[~np.isfinite(values[readable]).all(axis=1)]:
            errors[row] = f"the language model's values are not finite: {values[row].tolist()}"
            values[row] = np.nan
        return values, errors

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_id
        return [bos, *ids] if ids and bos is not None else ids

    @torch.inference_mode()
    def _read(self, ids: Sequence[Sequence[int]]) -> Float[np.ndarray, "batch 4"]:
        """Features of one padded batch. Logits are computed in chunks of positions, because those of the batch would
        take batch_tokens x vocabulary."""
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.full((len(ids), int(lengths.max())), self._tokenizer.pad_id, dtype=torch.long)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        padded[mask] = torch.tensor([token for row in ids for token in row])
        states = self._states(padded.to(self._device), mask.long().to(self._device))
        followed = mask[:, 1:].to(self._device)  # positions with a next token
        states, targets = states[:, :-1][followed], padded[:, 1:].to(self._device)[followed]
        surprises, entropies = torch.empty((2, len(targets)), dtype=torch.float64, device=self._device)
        for start in range(0, len(targets), self._chunk):
            part = slice(start, start + self._chunk)
            log_q = self._head(states[part]).float().log_softmax(dim=-1)
            surprises[part] = -log_q.gather(1, targets[part, None])[:, 0].double()
            entropies[part] = torch.special.entr(log_q.exp_()).sum(dim=-1).double()
        rows = [
            (one.mean(), one.max(), other.mean())
            for one, other in zip(
                surprises.cpu().split((lengths - 1).tolist()),
                entropies.cpu().split((lengths - 1).tolist()),
                strict=True,
            )
        ]
        mean, most, entropy = np.asarray([[float(number) for number in row] for row in rows]).T
        with np.errstate(over="ignore"):  # an overflow is reported as not finite
            return np.stack([-mean, np.exp(mean), most, entropy], axis=1)

    def _states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state

    @torch.inference_mode()
    def _check(self, folder: Path, vocabulary: int, tolerance: float) -> None:
        """Tests that later tokens do not change earlier logits, and that the head alone computes the logits."""
        middle = vocabulary // 2  # ids in the middle avoid special tokens
        ids = torch.tensor([[middle, middle + 1, last] for last in (middle + 2, middle + 3)], device=self._device)
        ids %= vocabulary
        mask = torch.ones_like(ids)
        logits = self._model(input_ids=ids, attention_mask=mask).logits.float()
        tolerance *= require_finite(float(logits.abs().max()), folder)
        if not torch.allclose(logits[0, :2], logits[1, :2], rtol=0, atol=tolerance):
            raise InputError(f"model: {folder} is bidirectional, allowed are causal language models")
        if not torch.allclose(self._head(self._states(ids, mask)).float(), logits, rtol=0, atol=tolerance):
            raise InputError(
                f"model: {folder} scales or caps the logits of its head, allowed are causal language "
                "models with a plain linear head, for example GPT-2, Llama or Qwen"
            )
