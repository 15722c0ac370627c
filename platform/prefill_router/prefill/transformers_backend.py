"""The transformers backend: pooled hidden states of any causal LM or bidirectional encoder, read by forward hooks.

In: a table (query_id, prompt). Out: a table of `activations_schema`, in the same order. Forward hooks on the
transformer blocks pool `last` and `mean` on the device: no [batch, tokens, hidden] tensor is kept after its block, and
only [batch, hidden] leaves the device. Blocks above the highest configured layer are not loaded, and an exception ends
the forward pass at that layer. The final norm and poolers are therefore not computed for any architecture, and layer L
is the output of the last block before the final norm (docs/equations.md, Hidden-state index). With an adapter, the
poolings read the probe tokens after the prompt instead of the prompt. Independent of files and clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from prefill_router.errors import InputError
from prefill_router.prefill.adapter import read_manifest
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import EncoderInfo, activations_table, parse_column
from prefill_router.prefill.loading import (
    columns,
    embedding_rows,
    find_blocks,
    find_device,
    identify,
    load_lower_blocks,
    max_positions,
    read_config,
    weights_digest,
)
from prefill_router.prefill.locating import locate
from prefill_router.prefill.probe_tokens import Prefix, ProbeTokens, load_adapter, require_suffix
from prefill_router.prefill.sample_check import require_finite
from prefill_router.prefill.tokens import PromptTokenizer, token_batches


class _StopForward(Exception):
    """Ends a forward pass after all configured layers have been pooled."""


class TransformersEncoder:
    """A `PrefillEncoder`. The constructor loads the model. Calls are not thread-safe: hooks share the current batch.

    Raises InputError if the model does not exist, is an encoder-decoder or has no safetensors weights, if the layers,
    max_length or device are invalid, or if the adapter does not fit the model.
    """

    def __init__(self, config: EncoderConfig) -> None:
        if config.adapter is not None and config.max_length is None:  # the limit of the training
            config = config.model_copy(update={"max_length": read_manifest(config.adapter).base.max_length})
        folder = locate(config)
        model_config = read_config(folder)
        text = model_config.get_text_config()
        self.columns = columns(config, text.num_hidden_layers)
        digest = weights_digest(folder, config)
        self._device, self._folder = find_device(config.device), folder
        highest = max(parse_column(column)[1] for column in self.columns)
        model, self.loaded = load_lower_blocks(folder, model_config, getattr(torch, config.dtype), highest)
        self._model = model.to(self._device)
        vocabulary = embedding_rows(self._model, text)
        self._positions = max_positions(self._model, text)
        self._tokenizer = PromptTokenizer(folder, config, self._positions, vocabulary)
        self._blocks = find_blocks(self._model, self.loaded.blocks)
        self._batch_tokens = config.batch_tokens
        self.on_rows: Callable[[int], None] | None = None  # called with the rows of every batch that was encoded
        attention = self._measure_attention(vocabulary)
        self._first_token = attention == "bidirectional"
        self._columns_at: dict[int, list[tuple[int, str]]] = {}
        for index, column in enumerate(self.columns):
            pooling, layer = parse_column(column)
            self._columns_at.setdefault(layer, []).append((index, pooling))
        self._pooled: list[torch.Tensor] = []
        self._lengths = torch.zeros(0)
        self._mask: torch.Tensor | None = None
        self._hooks: Literal["pool", "stop", "idle"] = "pool"  # stop: end the forward pass without pooling
        self._highest = highest
        self._probe_tokens: ProbeTokens | None = None
        self._register_hooks(highest)
        self.info: EncoderInfo = identify(
            config,
            folder,
            text,
            self._tokenizer,
            architecture=type(self._model).__name__,
            attention=attention,
            digest=digest,
            backend=f"transformers {transformers.__version__}",
        )
        if config.adapter is not None:
            tokens = load_adapter(config.adapter, self.info)
            self.attach(tokens)
            digest, last = read_manifest(config.adapter).digest, f"last of {tokens.count} probe tokens"
            self.info = self.info.model_copy(update={"adapter": digest, "last_token": last})

    @property
    def device(self) -> torch.device:
        """The device that runs the model."""
        return self._device

    @property
    def blocks(self) -> nn.ModuleList:
        """The loaded transformer blocks."""
        return self._blocks

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the prompts."""
        return self._tokenizer

    @property
    def positions(self) -> int | None:
        """The model's maximum number of tokens; None: unlimited."""
        return self._positions

    @property
    def token_embeddings(self) -> torch.Tensor:
        """The model's input embeddings [vocabulary, hidden]."""
        table: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        return table.weight.detach()

    def attach(self, tokens: ProbeTokens) -> None:
        """Adds probe tokens after every prompt; `info` stays that of the encoder without them.

        Raises InputError if the model cannot have a suffix, or if max_length leaves no room for it.
        """
        config: Any = self._model.config
        longest = self._tokenizer.max_length + tokens.count
        require_suffix(self._model, config.get_text_config(), self.info.attention, longest)
        if self._highest < 1:
            raise InputError("layers: got only layer 0, at which probe tokens have read no prompt; add a higher layer")
        if self._positions is not None and longest > self._positions:
            raise InputError(
                f"max_length: got {self._tokenizer.max_length}, but {tokens.count} probe tokens follow the prompt and "
                f"the model takes {self._positions} tokens; set max_length to {self._positions - tokens.count} or less"
            )
        tokens.attach(self._blocks)
        self._probe_tokens = tokens

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`."""
        tokens = self._tokenizer(prompts.column("prompt").to_pylist())
        readable = np.asarray([i for i, t in enumerate(tokens) if t.error is None], dtype=np.int64)
        lengths = np.asarray([len(tokens[i].ids) for i in readable], dtype=np.int64)
        states = np.zeros((len(self.columns), len(tokens), self.info.hidden_size), dtype=self.info.states_dtype)
        peaks = np.zeros((len(self.columns), len(tokens)), dtype=np.float32)
        # All batches are queued before the first result is copied, so that the GPU does not wait for the host.
        batches = []
        for batch in token_batches(lengths, self._batch_tokens):
            batches.append((readable[batch], *self._read([tokens[i].ids for i in readable[batch]])))
            if self.on_rows is not None:
                self.on_rows(len(batch))
        for rows, pooled, peak in batches:
            states[:, rows] = pooled.cpu().numpy()
            peaks[:, rows] = peak.cpu().numpy()
        return activations_table(
            prompts.column("query_id"), prompts.column("prompt"), tokens, self.columns, states, peaks
        )

    def close(self) -> None:
        """See `PrefillEncoder`. There is nothing to release."""

    @torch.inference_mode()
    def bare_seconds(self, prompts: pa.Table) -> float | None:
        """See `PrefillEncoder`. Covers the loaded blocks. None if upper blocks were freed after loading: such a model
        cannot complete a forward pass."""
        ids = [token.ids for token in self._tokenizer(prompts.column("prompt").to_pylist()) if token.error is None]
        config: Any = self._model.config
        if not ids or config.get_text_config().num_hidden_layers != self.loaded.blocks:
            return None
        batches = []
        for rows in token_batches(np.asarray([len(row) for row in ids], dtype=np.int64), self._batch_tokens):
            padded, mask, _ = self._padded([ids[row] for row in rows])
            batches.append((padded.to(self._device), mask.to(self._device).long()))
        self._hooks = "idle"
        try:
            self._wait()
            started = time.perf_counter()
            for padded, mask in batches:
                self._model(input_ids=padded, attention_mask=mask)
            self._wait()
            return time.perf_counter() - started
        finally:
            self._hooks = "pool"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and mask, both [batch, tokens], and lengths [batch]."""
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.full((len(ids), int(lengths.max())), self._tokenizer.pad_id, dtype=torch.long)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        padded[mask] = torch.tensor([token for row in ids for token in row])
        return padded, mask, lengths

    @torch.inference_mode()
    def _read(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """States [columns, batch, hidden] in the stored dtype, and the largest magnitude of each [columns, batch]."""
        if self._probe_tokens is not None:
            pooled = self.suffix_states(self.prefill(ids))
        else:
            padded, mask, lengths = self._padded(ids)
            device_mask = mask.to(self._device)
            pooled = self._pooled_states(
                lengths.to(self._device),
                None if bool(mask.all()) else device_mask[..., None],
                input_ids=padded.to(self._device),
                attention_mask=device_mask.long(),
            )
        return pooled.to(getattr(torch, self.info.states_dtype)), pooled.abs().amax(dim=-1)

    def prefill(self, ids: Sequence[Sequence[int]]) -> Prefix:
        """Keys and values of a batch of prompts in the blocks up to the highest configured layer.

        The low-rank matrices of attached probe tokens apply if their `positions` are `all`.
        """
        padded, mask, _ = self._padded(ids)
        device_mask, cache, tokens = mask.to(self._device).long(), DynamicCache(), self._probe_tokens
        self._hooks = "stop"  # the poolings read the probe tokens only
        try:
            with tokens.active() if tokens is not None and tokens.positions == "all" else nullcontext():
                self._forward(
                    input_ids=padded.to(self._device), attention_mask=device_mask, past_key_values=cache, use_cache=True
                )
        finally:
            self._hooks = "pool"
        layers: list[Any] = cache.layers
        return Prefix(tuple((layer.keys, layer.values) for layer in layers), device_mask)

    def suffix_states(self, prefix: Prefix) -> torch.Tensor:
        """Pooled states [columns, batch, hidden] of the attached probe tokens after these prompts, float32."""
        tokens = self._probe_tokens
        assert tokens is not None
        inputs = tokens.inputs(prefix.mask, next(self._blocks.parameters()).dtype)
        lengths = torch.full((len(prefix.mask),), tokens.count, device=self._device)
        with tokens.active():
            return self._pooled_states(lengths, None, past_key_values=prefix.cache(), use_cache=True, **inputs)

    def _pooled_states(self, lengths: torch.Tensor, mask: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """Pooled states [columns, batch, hidden] of a forward pass over rows of these lengths, float32.

        `mask` [batch, tokens, 1] is True at real tokens; None: every position is a real token.
        """
        self._lengths, self._mask, self._pooled = lengths, mask, [torch.empty(0)] * len(self.columns)
        self._forward(**inputs)
        pooled, self._pooled = torch.stack(self._pooled), []
        return pooled

    def _forward(self, **inputs: Any) -> None:
        try:
            self._model(**inputs)
        except _StopForward:
            return
        raise AssertionError(f"{type(self._model).__name__} did not reach the block at which the forward pass stops")

    def _register_hooks(self, highest: int) -> None:
        """Registers pooling hooks for the configured layers; the hook of layer `highest` ends the forward pass."""

        def pool(layer: int, states: torch.Tensor) -> None:
            if self._hooks == "idle":
                return
            if self._hooks == "pool":
                for index, pooling in self._columns_at[layer]:
                    self._pooled[index] = self._pool(states, pooling)
            if layer == highest:
                raise _StopForward

        if 0 in self._columns_at:
            self._blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: pool(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        for layer in self._columns_at:
            if layer > 0:
                self._blocks[layer - 1].register_forward_hook(
                    lambda _, __, output, layer=layer: pool(layer, _states(output))
                )

    def _pool(self, states: torch.Tensor, pooling: str) -> torch.Tensor:
        """[batch, tokens, hidden] to [batch, hidden], float32."""
        if pooling == "last":
            rows = torch.arange(len(states), device=states.device)
            return states[:, 0].float() if self._first_token else states[rows, self._lengths - 1].float()
        if self._mask is not None:
            states = states.masked_fill(~self._mask, 0)  # not a product: padded positions may hold NaN
        return states.sum(dim=1, dtype=torch.float32) / self._lengths[:, None]

    @torch.inference_mode()
    def _measure_attention(self, vocabulary: int) -> Literal["causal", "bidirectional"]:
        """`bidirectional` if the last token changes the first position's state after one block, else `causal`."""
        first = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            first.append(_states(output)[0, 0].float())
            raise _StopForward

        handle = self._blocks[0].register_forward_hook(keep)
        middle = vocabulary // 2  # special tokens are usually at the ends of the vocabulary
        for last in (middle + 2, middle + 3):
            ids = torch.tensor([[middle, middle + 1, last]], device=self._device) % vocabulary
            self._forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        handle.remove()
        largest = require_finite(float(first[0].abs().max()), self._folder)
        same = torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-5 * largest)
        return "causal" if same else "bidirectional"


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
