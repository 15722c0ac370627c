"""A router with random weights over the minilm encoder, for tests that need a checkpoint of any quality."""

from __future__ import annotations

import numpy as np

from prefill_router.pool import Pool, TargetModel
from prefill_router.prefill.config import MINILM, EncoderConfig
from prefill_router.routing.calibration import PlattScaling
from prefill_router.routing.cost import CostModel
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.router import Router
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.projection import Projection

MODELS = ("cheap", "middle", "dear")
USD_PER_MTOK = np.array([0.1, 1.0, 10.0])
HIDDEN = 384  # of the minilm encoder


def tiny_router(fingerprint: str, favourite: str = "cheap", layer: int = 2, hidden: int = HIDDEN) -> Router:
    """A router that always chooses `favourite` at lambda 0; its confidences depend on the prompt."""
    random = np.random.default_rng(layer)
    n, k, members = len(MODELS), 4, 2
    offset = np.where(np.array(MODELS) == favourite, 4.0, 0.0)
    return Router(
        pool=Pool(
            models=tuple(
                TargetModel(name=name, input_usd_per_mtok=usd, output_usd_per_mtok=4 * usd)
                for name, usd in zip(MODELS, USD_PER_MTOK, strict=True)
            )
        ),
        encoders={fingerprint: EncoderConfig(model=MINILM, layers=(layer,), poolings=("mean",), device="cpu")},
        layer_keys=(LayerKey(fingerprint, "mean", layer),),
        projections=(
            Projection(
                np.zeros(hidden, np.float32),
                np.ones(hidden, np.float32),
                random.normal(size=(hidden, k)).astype(np.float32),
            ),
        ),
        ensemble=Ensemble(
            ((random.normal(scale=0.1, size=(members, k, n)).astype(np.float32), np.zeros((members, n), np.float32)),),
            np.zeros(members),
        ),
        calibrator=PlattScaling(np.ones(n), offset),
        costs=CostModel(
            USD_PER_MTOK / 1e6,
            100 * 4 * USD_PER_MTOK / 1e6,
            np.full(n, 100.0),
            np.ones(n),
            1e-5,
            1e-2,
            4 * USD_PER_MTOK / 1e6,
        ),
        chosen_lambda=0.0,
        manifest={"outcomes_digest": "0" * 64, "activations_digest": {fingerprint: "1" * 64}, "code_version": "0.1.0"},
    )
