"""A trained SharedTrunkNet ensemble: weights and the forward pass, in NumPy, so that a router needs no torch.

In: features [queries, features]. Out: logits per kept member and target. Training is trunk.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit


@dataclass(frozen=True)
class Ensemble:
    """Kept members' weights, one (weight, bias) per layer: [members, in, out] and [members, out], float32."""

    layers: tuple[tuple[Float[np.ndarray, "members _ _"], Float[np.ndarray, "members _"]], ...]
    validation_loss: Float[np.ndarray, " members"]

    def logits(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "members queries models"]:
        """Each member's logits."""
        hidden = np.broadcast_to(features.astype(np.float32), (len(self.validation_loss), *features.shape))
        for index, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight + bias[:, None, :]
            if index + 1 < len(self.layers):
                hidden = np.maximum(hidden, 0)
        return hidden

    def probabilities(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "queries models"]:
        """The members' probabilities, averaged, before calibration."""
        return expit(self.logits(features).astype(np.float64)).mean(axis=0)
