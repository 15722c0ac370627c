"""Blocks, what the layer search says of them, and the choice of layers per target.

In: `ProbeScores` of every block, from search.py. Out: a `Selection`. Also ROC-AUC of many scores at once, and the
threads that measure blocks side by side. Knows nothing of how a probe is fitted, nor of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from prefill_router.errors import InputError
from prefill_router.signals.layer_key import LayerKey

Strategy = Literal["cv", "fisher", "fixed"]


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


@dataclass(frozen=True)
class Selection:
    """The chosen blocks per target, for the whole training split and, from a nested probe, without each fold."""

    layer_keys: tuple[tuple[LayerKey, ...], ...]
    layer_keys_without: tuple[tuple[tuple[LayerKey, ...], ...], ...]


def select(
    scores: Mapping[LayerKey, ProbeScores],
    strategy: Literal["cv", "fisher"],
    models: Sequence[str],
    each_pooling: bool = False,
    n: int = 1,
    candidates: Sequence[Sequence[LayerKey]] | None = None,
) -> Selection:
    """Chooses for each target its best `n` blocks, or `n` of each pooling; `cv` by AUC, `fisher` by J.

    `candidates` are the blocks that each target may have; all where it is not given. Of equal scores the lower layer
    wins, for it is cheaper to compute. Raises InputError for a target of one class.
    """
    layer_keys = sorted(scores, key=lambda key: (key.layer, key.encoder, key.pooling))
    full, without = ("auc", "auc_without") if strategy == "cv" else ("fisher", "fisher_without")
    table = np.stack(
        [np.concatenate([getattr(scores[key], full)[None], getattr(scores[key], without)]) for key in layer_keys]
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
    groups = [{pooling} for pooling in sorted({key.pooling for key in layer_keys})] if each_pooling else [None]

    def best(view: int, model: int) -> tuple[LayerKey, ...]:
        own = [index for index, key in enumerate(layer_keys) if candidates is None or key in candidates[model]]
        parts = [[index for index in own if group is None or layer_keys[index].pooling in group] for group in groups]
        return tuple(
            layer_keys[part[place]]
            for part in parts
            for place in np.argsort(-table[view, part, model], kind="stable")[:n]
        )

    table = table.transpose(1, 0, 2)
    picks = [tuple(best(view, model) for model in range(len(models))) for view in range(len(table))]
    return Selection(picks[0], tuple(picks[1:]))
