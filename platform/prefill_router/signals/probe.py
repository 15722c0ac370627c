"""Blocks, what the layer search says of them, and the choice of layers per target.

In: `ProbeScores` of every block, from search.py. Out: a `Selection`. Also ROC-AUC of many scores at once, and the
threads that measure blocks side by side. Knows nothing of how a probe is fitted, nor of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from prefill_router.errors import InputError

Strategy = Literal["cv", "fisher", "fixed"]
MAX_BLOCKS = 4


@dataclass(frozen=True, order=True)
class Block:
    """One candidate: the states of one encoder (by fingerprint) at one layer and pooling."""

    encoder: str
    pooling: str
    layer: int

    @property
    def column(self) -> str:
        """The column's name in the activations dataset."""
        return f"{self.pooling}_L{self.layer}"


Result = TypeVar("Result")
States = Callable[[Block], Float[np.ndarray, "queries hidden"]]


@dataclass(frozen=True)
class ProbeScores:
    """One block's scores. NaN where a target has one class only.

    `auc_without[f]`, `fisher_without[f]` come from the folds other than f alone; inside them the probe is validated
    on each remaining fold in turn.
    """

    auc: Float[np.ndarray, " models"]
    auc_without: Float[np.ndarray, "folds models"]
    fisher: Float[np.ndarray, " models"]
    fisher_without: Float[np.ndarray, "folds models"]


def auc_per_model(
    correct: Float[np.ndarray, "queries models"], score: Float[np.ndarray, "queries models"]
) -> Float[np.ndarray, " models"]:
    """ROC-AUC over labelled rows, ties counted half; NaN where one class is missing."""
    return area_under_curve(correct, score.T[None])[0]


def area_under_curve(
    correct: Float[np.ndarray, "queries models"], scores: Float[np.ndarray, "ks models queries"]
) -> Float[np.ndarray, "ks models"]:
    """As `auc_per_model`, of several scores of the same queries at once."""
    labelled, is_right = ~np.isnan(correct).T, (correct == 1).T
    scores = scores.copy()
    scores[:, ~labelled] = np.inf  # unlabelled rows rank above all others and count for nothing
    order = np.argsort(scores, axis=-1)
    ranked = np.take_along_axis(scores, order, axis=-1)
    right = is_right[np.arange(len(is_right))[:, None], order]
    n_right, n_wrong = is_right.sum(axis=1), (labelled & ~is_right).sum(axis=1)
    above = right @ np.arange(1.0, len(correct) + 1)
    tied = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] < np.inf)
    for place in zip(*np.nonzero(tied.any(axis=-1)), strict=True):
        ends = np.append(np.flatnonzero(~tied[place]), len(correct) - 1) + 1
        starts = np.append(0, ends[:-1])
        above[place] = np.repeat((starts + 1 + ends) / 2, ends - starts)[right[place]].sum()
    return np.where(
        (n_right > 0) & (n_wrong > 0), (above - n_right * (n_right + 1) / 2) / np.maximum(n_right * n_wrong, 1), np.nan
    )


def probe_blocks(
    blocks: Sequence[Block], measure: Callable[[Block], Result], progress: str | None = None
) -> dict[Block, Result]:
    """`measure` of every block, several blocks at once with a core each: one block's matrices are too small to share.

    At most MAX_BLOCKS blocks are in memory.
    """
    workers = min(MAX_BLOCKS, os.cpu_count() or 1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as threads:
        results = tqdm(
            threads.map(measure, blocks),
            total=len(blocks),
            desc=progress,
            unit="block",
            disable=progress is None,
            leave=False,
        )
        return dict(zip(blocks, results, strict=True))


@dataclass(frozen=True)
class Selection:
    """The chosen blocks per target, for the whole training split and, from a nested probe, without each fold."""

    blocks: tuple[tuple[Block, ...], ...]
    blocks_without: tuple[tuple[tuple[Block, ...], ...], ...]


def select(
    scores: Mapping[Block, ProbeScores],
    strategy: Literal["cv", "fisher"],
    models: Sequence[str],
    each_pooling: bool = False,
    n: int = 1,
    candidates: Sequence[Sequence[Block]] | None = None,
) -> Selection:
    """Chooses for each target its best `n` blocks, or `n` of each pooling; `cv` by AUC, `fisher` by J.

    `candidates` are the blocks that each target may have; all where it is not given. Of equal scores the lower layer
    wins, for it is cheaper to compute. Raises InputError for a target of one class.
    """
    blocks = sorted(scores, key=lambda block: (block.layer, block.encoder, block.pooling))
    full, without = ("auc", "auc_without") if strategy == "cv" else ("fisher", "fisher_without")
    table = np.stack(
        [np.concatenate([getattr(scores[block], full)[None], getattr(scores[block], without)]) for block in blocks]
    )  # [blocks, 1 + folds, models]
    if np.isnan(table[:, 1:]).all():  # the probe was not nested
        table = table[:, :1]
    undefined = np.isnan(table).all(axis=0).any(axis=0)
    if undefined.any():
        names = ", ".join(name for name, bad in zip(models, undefined, strict=True) if bad)
        raise InputError(
            f"outcomes: the labels of {names} on the training split are of one class only (or too few); "
            "leave the model out of the pool or add outcomes"
        )
    table = np.where(np.isnan(table), -np.inf, table)
    groups = [{pooling} for pooling in sorted({block.pooling for block in blocks})] if each_pooling else [None]

    def best(view: int, model: int) -> tuple[Block, ...]:
        own = [index for index, block in enumerate(blocks) if candidates is None or block in candidates[model]]
        parts = [[index for index in own if group is None or blocks[index].pooling in group] for group in groups]
        return tuple(
            blocks[part[place]] for part in parts for place in np.argsort(-table[view, part, model], kind="stable")[:n]
        )

    table = table.transpose(1, 0, 2)
    picks = [tuple(best(view, model) for model in range(len(models))) for view in range(len(table))]
    return Selection(picks[0], tuple(picks[1:]))


def unique_blocks(targets: Sequence[Sequence[Block]]) -> tuple[Block, ...]:
    """The distinct blocks of all targets in a fixed order: phi concatenates each once (Eq. 1)."""
    return tuple(sorted({block for blocks in targets for block in blocks}))
