"""The MLflow flavour: `mlflow.pyfunc.load_model` of a registered version returns a model that routes prompts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prefill_router.controller import LocalRouter
from prefill_router.routing.checkpoint import load_checkpoint


class PyfuncRouter:
    """Column `prompt` in, column `model` out, at the checkpoint's lambda. The constructor loads the encoders."""

    def __init__(self, folder: Path) -> None:
        self.router = LocalRouter(load_checkpoint(folder))
        self.router.load_encoders()

    def predict(self, prompts: pd.DataFrame) -> pd.DataFrame:
        """The chosen model of every prompt, in the order of `prompts`."""
        return pd.DataFrame({"model": [decision.model for decision in self.router.route_batch(prompts["prompt"])]})


def _load_pyfunc(data_path: str) -> PyfuncRouter:
    """Entry point of MLflow for a model that consists of a loader module and a data folder."""
    (manifest,) = Path(data_path).glob("**/manifest.json")
    return PyfuncRouter(manifest.parent)
