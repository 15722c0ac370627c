"""Batches of prompts for the training of probe tokens, and their keys and values, kept on disk.

In: token ids of prompts. Out: batches of prompts of similar length, each in parts of a token budget, and the `Prefix`
of every part. The encoder is frozen, so that a prefix is computed once; prefixes beyond the store's limit are computed
each time. Independent of labels.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file

from prefill_router.files import write_atomically
from prefill_router.prefill.probe_tokens import Prefix
from prefill_router.prefill.tokens import token_batches
from prefill_router.prefill.transformers_backend import TransformersEncoder

Part = Int[np.ndarray, " _"]  # rows of the prompts of one forward pass


def make_batches(
    lengths: Int[np.ndarray, " prompts"], rows: Int[np.ndarray, " subset"], size: int, budget: int
) -> list[list[Part]]:
    """Batches of `size` of the prompts `rows`, sorted by length; each in parts of at most `budget` padded tokens.

    `lengths` are the numbers of tokens of all prompts. A part of one long prompt may exceed the budget.
    """
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [[batch[part] for part in token_batches(lengths[batch], budget)] for batch in batches]


class PrefixStore:
    """The prefixes of parts of the prompts `ids`, as files of `folder` with at most `limit_bytes` in total.

    `seconds` and `tokens` are the time and the number of prompt tokens of the prefills so far. A folder may be used
    again for the same encoder and prompts.
    """

    def __init__(
        self, encoder: TransformersEncoder, ids: Sequence[Sequence[int]], folder: Path, limit_bytes: int
    ) -> None:
        self._encoder, self._ids, self._folder, self._left = encoder, ids, folder, limit_bytes
        self.seconds, self.tokens = 0.0, 0

    @torch.no_grad()
    def __call__(self, part: Part) -> Prefix:
        """The prefix of a part, without gradients."""
        path = self._folder / f"{hashlib.sha256(part.tobytes()).hexdigest()[:32]}.safetensors"
        if path.is_file():
            return _load(path, self._encoder.device)
        started = time.perf_counter()
        prefix = self.compute(part)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(len(self._ids[row]) for row in part)
        size = sum(one.nbytes for pair in prefix.keys_values for one in pair)
        if size <= self._left:
            self._left -= size
            _save(path, prefix)
        return prefix

    def compute(self, part: Part) -> Prefix:
        """The prefix of a part, computed now; with gradients if attached probe tokens change the prompt's states."""
        return self._encoder.prefill([self._ids[row] for row in part])


def _save(path: Path, prefix: Prefix) -> None:
    arrays = {"mask": prefix.mask}
    for layer, (keys, values) in enumerate(prefix.keys_values):
        arrays |= {f"{layer}.keys": keys.contiguous(), f"{layer}.values": values.contiguous()}
    write_atomically(path, lambda temporary: save_file(arrays, temporary))


def _load(path: Path, device: torch.device) -> Prefix:
    arrays = load_file(path, device=str(device))
    layers = range((len(arrays) - 1) // 2)
    return Prefix(tuple((arrays[f"{layer}.keys"], arrays[f"{layer}.values"]) for layer in layers), arrays["mask"])
