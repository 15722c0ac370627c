"""Layer selection: the best layers of each target, by the scores of the layer search.

In: `ProbeScores` of every layer key (from search.py). Out: a `Selection`. Knows nothing of how a probe is fitted.
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
    """Scores of one layer key per target. NaN for a target with labels of one class.

    `auc` is a cross-validated ROC-AUC, `fisher` is Fisher's J. `auc_without[f]` and `fisher_without[f]` use no row of
    fold f: the AUC is cross-validated over the other folds.
    """

    auc: Float[np.ndarray, " models"]
    auc_without: Float[np.ndarray, "folds models"]
    fisher: Float[np.ndarray, " models"]
    fisher_without: Float[np.ndarray, "folds models"]


@dataclass(frozen=True)
class Selection:
    """The chosen layer keys per target.

    `layer_keys` uses all training queries. `layer_keys_without[f]` uses no query of fold f; it is empty if the layer
    search was not nested.
    """

    layer_keys: tuple[tuple[LayerKey, ...], ...]
    layer_keys_without: tuple[tuple[tuple[LayerKey, ...], ...], ...]


def select_layers(
    scores: Mapping[LayerKey, ProbeScores],
    strategy: Literal["cv", "fisher"],
    models: Sequence[str],
    each_pooling: bool = False,
    n: int = 1,
    candidates: Sequence[Sequence[LayerKey]] | None = None,
    each_encoder: bool = False,
) -> Selection:
    """Chooses the best `n` layer keys of each target: `cv` by AUC, `fisher` by J.

    With `each_pooling` a target gets the best `n` of every pooling, with `each_encoder` the best `n` of every encoder,
    and with both the best `n` of every pooling of every encoder. `candidates` are the candidate layers of each target;
    None allows all. A tie goes to the lower layer, which is cheaper to compute. Raises InputError for a target with
    labels of one class.
    """
    layer_keys = sorted(scores, key=lambda key: (key.layer, key.encoder, key.pooling))
    full, without = ("auc", "auc_without") if strategy == "cv" else ("fisher", "fisher_without")
    table = np.stack(
        [np.concatenate([getattr(scores[key], full)[None], getattr(scores[key], without)]) for key in layer_keys]
    )  # [layer keys, 1 + folds, models]
    if np.isnan(table[:, 1:]).all():  # the layer search was not nested
        table = table[:, :1]
    undefined = np.isnan(table).all(axis=0).any(axis=0)
    if undefined.any():
        names = ", ".join(name for name, bad in zip(models, undefined, strict=True) if bad)
        raise InputError(
            f"outcomes: the labels of {names} on the training split are of one class only, or too few for every fold; "
            "both 0 and 1 are needed: leave the model out of the pool or add outcomes"
        )
    table = np.where(np.isnan(table), -np.inf, table)
    group_of = [(each_encoder and key.encoder, each_pooling and key.pooling) for key in layer_keys]

    def best(view: int, model: int) -> tuple[LayerKey, ...]:
        own = [index for index, key in enumerate(layer_keys) if candidates is None or key in candidates[model]]
        by_group = [[index for index in own if group_of[index] == group] for group in sorted(set(group_of))]
        return tuple(
            layer_keys[members[rank]]
            for members in by_group
            for rank in np.argsort(-table[view, members, model], kind="stable")[:n]
        )

    table = table.transpose(1, 0, 2)
    picks = [tuple(best(view, model) for model in range(len(models))) for view in range(len(table))]
    return Selection(picks[0], tuple(picks[1:]))
