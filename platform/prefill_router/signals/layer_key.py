"""The key of one candidate layer: encoder, pooling and hidden-state index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, order=True)
class LayerKey:
    """One candidate: the states of one encoder (by fingerprint) at one layer and pooling."""

    encoder: str
    pooling: str
    layer: int

    @property
    def column(self) -> str:
        """The column's name in the activations dataset."""
        return f"{self.pooling}_L{self.layer}"


LayerStates = Callable[[LayerKey], Float[np.ndarray, "queries hidden"]]


def unique_layer_keys(targets: Sequence[Sequence[LayerKey]]) -> tuple[LayerKey, ...]:
    """The distinct blocks of all targets in a fixed order: phi concatenates each once (Eq. 1)."""
    return tuple(sorted({key for layer_keys in targets for key in layer_keys}))
