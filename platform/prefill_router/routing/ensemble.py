"""A trained SharedTrunkNet ensemble: weights and the forward pass in NumPy, so that a router needs no torch.

In: features [queries, features]. Out: logits per kept member and target. trunk.py trains ensembles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit


@dataclass(frozen=True)
class Ensemble:
    """Weights of the kept members, float32: (weight [members, in, out], bias [members, out]) per layer of the network.

    `validation_loss` is the best validation loss of each kept member, ascending.
    """

    layers: tuple[tuple[Float[np.ndarray, "members _ _"], Float[np.ndarray, "members _"]], ...]
    validation_loss: Float[np.ndarray, " members"]

    def logits(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "members queries models"]:
        """The logits of each member."""
        return self.output(self.hidden(features))

    def hidden(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "members queries units"]:
        """The last hidden layer of each member; the features if the network has none."""
        hidden = np.broadcast_to(features.astype(np.float32), (len(self.validation_loss), *features.shape))
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(hidden @ weight + bias[:, None, :], 0)
        return hidden

    def output(self, hidden: Float[np.ndarray, "members queries units"]) -> Float[np.ndarray, "members queries models"]:
        """The logits of each member, from its last hidden layer."""
        weight, bias = self.layers[-1]
        return hidden @ weight + bias[:, None, :]

    def probabilities(self, features: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "queries models"]:
        """The mean of the members' probabilities, before calibration."""
        return expit(self.logits(features).astype(np.float64)).mean(axis=0)
