"""The key of one candidate layer: encoder, pooling and hidden-state index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, order=True)
class LayerKey:
    """One candidate layer: encoder (by fingerprint), pooling (last or mean) and hidden-state index (0: embeddings)."""

    encoder: str
    pooling: str
    layer: int

    @property
    def column(self) -> str:
        """Its column in the activations dataset, such as mean_L4."""
        return f"{self.pooling}_L{self.layer}"


LayerStates = Callable[[LayerKey], Float[np.ndarray, "queries hidden"]]  # reads the states of a layer key


def unique_layer_keys(targets: Sequence[Sequence[LayerKey]]) -> tuple[LayerKey, ...]:
    """The distinct layer keys of all targets, sorted: the order in which features are concatenated (Eq. 1)."""
    return tuple(sorted({key for layer_keys in targets for key in layer_keys}))
