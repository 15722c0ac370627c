"""The transformers backend: pooled hidden states of any causal LM or bidirectional encoder, read by forward hooks.

In: a table (query_id, prompt). Out: a table of `activations_schema`, in the same order. Forward hooks on the
transformer blocks pool `last` and `mean` on the device: no [batch, tokens, hidden] tensor is kept after its block, and
only [batch, hidden] leaves the device. Blocks above the highest configured layer are not loaded, and an exception ends
the forward pass at that layer. The final norm and poolers are therefore not computed for any architecture, and layer L
is the output of the last block before the final norm (docs/equations.md, Hidden-state index). Independent of files and
clusters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import nn

from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import activations_table, parse_column
from prefill_router.prefill.loading import (
    columns,
    embedding_rows,
    find_blocks,
    find_device,
    identify,
    load_lower_blocks,
    locate,
    max_positions,
    read_config,
    weights_digest,
)
from prefill_router.prefill.sample_check import require_finite
from prefill_router.prefill.tokens import PromptTokenizer, token_batches


class _StopForward(Exception):
    """Ends a forward pass after all configured layers have been pooled."""


class TransformersEncoder:
    """A `PrefillEncoder`. The constructor loads the model. Calls are not thread-safe: hooks share the current batch.

    Raises InputError if the model does not exist, is an encoder-decoder or has no safetensors weights, or if the
    layers, max_length or device are invalid.
    """

    def __init__(self, config: EncoderConfig) -> None:
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
        self._tokenizer = PromptTokenizer(folder, config, max_positions(self._model, text), vocabulary)
        self._blocks = find_blocks(self._model, self.loaded.blocks)
        self._batch_tokens = config.batch_tokens
        attention = self._measure_attention(vocabulary)
        self._first_token = attention == "bidirectional"
        self._columns_at: dict[int, list[tuple[int, str]]] = {}
        for index, column in enumerate(self.columns):
            pooling, layer = parse_column(column)
            self._columns_at.setdefault(layer, []).append((index, pooling))
        self._pooled: list[torch.Tensor] = []
        self._lengths = torch.zeros(0)
        self._mask: torch.Tensor | None = None
        self._bare = False  # whether the hooks do nothing, for `bare_seconds`
        self._register_hooks(highest)
        self.info = identify(
            config,
            folder,
            text,
            self._tokenizer,
            architecture=type(self._model).__name__,
            attention=attention,
            digest=digest,
            backend=f"transformers {transformers.__version__}",
        )

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """See `PrefillEncoder`."""
        tokens = self._tokenizer(prompts.column("prompt").to_pylist())
        readable = np.asarray([i for i, t in enumerate(tokens) if t.error is None], dtype=np.int64)
        lengths = np.asarray([len(tokens[i].ids) for i in readable], dtype=np.int64)
        states = np.zeros((len(self.columns), len(tokens), self.info.hidden_size), dtype=self.info.states_dtype)
        peaks = np.zeros((len(self.columns), len(tokens)), dtype=np.float32)
        # All batches are queued before the first result is copied, so that the GPU does not wait for the host.
        batches = [
            (readable[batch], *self._read([tokens[i].ids for i in readable[batch]]))
            for batch in token_batches(lengths, self._batch_tokens)
        ]
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
        self._bare = True
        try:
            self._wait()
            started = time.perf_counter()
            for padded, mask in batches:
                self._model(input_ids=padded, attention_mask=mask)
            self._wait()
            return time.perf_counter() - started
        finally:
            self._bare = False

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
        padded, mask, lengths = self._padded(ids)
        self._lengths, self._pooled = lengths.to(self._device), [torch.empty(0)] * len(self.columns)
        device_mask = mask.to(self._device)
        self._mask = None if bool(mask.all()) else device_mask[..., None]
        self._forward(padded.to(self._device), device_mask.long())
        pooled = torch.stack(self._pooled)
        self._pooled = []
        return pooled.to(getattr(torch, self.info.states_dtype)), pooled.abs().amax(dim=-1)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        try:
            self._model(input_ids=ids, attention_mask=mask)
        except _StopForward:
            return
        raise AssertionError(f"{type(self._model).__name__} did not reach the block at which the forward pass stops")

    def _register_hooks(self, highest: int) -> None:
        """Registers pooling hooks for the configured layers; the hook of layer `highest` ends the forward pass."""

        def pool(layer: int, states: torch.Tensor) -> None:
            if self._bare:
                return
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
            self._forward(ids, torch.ones_like(ids))
        handle.remove()
        largest = require_finite(float(first[0].abs().max()), self._folder)
        same = torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-5 * largest)
        return "causal" if same else "bidirectional"


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
