"""Configuration of a fit: split, encoders, layers, trunk and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefill_router.config import FrozenModel
from prefill_router.outcomes.splits import Scheme
from prefill_router.prefill.config import Pooling
from prefill_router.routing.calibration import CalibratorName
from prefill_router.routing.candidates import Mode
from prefill_router.routing.stack import StackPart
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.selection import Strategy

EARLIER = {"stack": (), "margin": False, "lengths": "median"}  # settings of fits before these fields existed


class FitConfig(FrozenModel):
    """Settings of `fit_router`."""

    seed: Annotated[int, Field(ge=0, description="seed of split, folds and ensemble")] = 0
    scheme: Annotated[Scheme, Field(description="85/15 calibrates out of fold, 75/10/15 on the calibration part")] = (
        "85/15"
    )
    mode: Annotated[
        Mode,
        Field(
            description="encoders of a target: auto, the encoder with the best probe; all, every encoder; single, one "
            "encoder for all targets; per_model, the map in `encoders`"
        ),
    ] = "auto"
    encoders: Annotated[
        str | dict[str, str] | None,
        Field(
            description="mode single: fingerprint or model name of the encoder; per_model: one for each target, "
            "{target: encoder}"
        ),
    ] = None
    pooling: Annotated[Pooling | None, Field(description="read only states with this pooling; none: all poolings")] = (
        None
    )
    strategy: Annotated[
        Strategy, Field(description="layer selection: cv, by AUC; fisher, by Fisher's J; fixed, the layers in `fixed`")
    ] = "cv"
    fixed: Annotated[
        str | tuple[str, ...] | None, Field(description="strategy fixed: a layer such as last_L4, or one per target")
    ] = None
    each_pooling: Annotated[
        bool, Field(description="a target reads its best layers of every pooling, not only of the best pooling")
    ] = True
    layers_per_target: Annotated[
        int,
        Field(ge=1, description="layers that a target reads: per pooling with each_pooling, per encoder in mode all"),
    ] = 1
    components: Annotated[int, Field(ge=1, description="PCA components k of each layer key")] = 64
    trunk: Annotated[TrunkConfig, Field(description="shape and training of the ensemble")] = TrunkConfig()
    stack: Annotated[
        tuple[StackPart, ...],
        Field(
            description="parts that are combined with the ensemble: domain, the targets' accuracies on the benchmark "
            "that is predicted from the features; neighbours, the labels of near training queries; empty: none"
        ),
    ] = ("domain", "neighbours")
    calibrator: Annotated[
        CalibratorName,
        Field(
            description="map from the predicted probability to the confidence: pooled, Platt scaling with deviations "
            "of each target that are penalised; platt, each target alone; isotonic"
        ),
    ] = "pooled"
    margin: Annotated[
        bool, Field(description="give the best static choice a bonus, of the size that is best on held-out predictions")
    ] = True

    lengths: Annotated[
        Literal["auto", "median"],
        Field(
            description="expected output tokens in costs: auto, predicted from the features for targets where that is "
            "better on held-out queries; median, each target's median"
        ),
    ] = "auto"

    @classmethod
    def recorded(cls, fit: Mapping[str, Any]) -> FitConfig:
        """The configuration in the manifest of a checkpoint, also of an earlier release."""
        return cls.model_validate(EARLIER | dict(fit))

    @model_validator(mode="after")
    def _encoders_fit_the_mode(self) -> FitConfig:
        if self.mode in ("auto", "all") and self.encoders is not None:
            raise ValueError(
                f"encoders: got {self.encoders!r} in mode {self.mode}, which uses all encoders; set mode to single or "
                "per_model, or leave encoders out"
            )
        if self.mode == "single" and isinstance(self.encoders, dict):
            raise ValueError("encoders: got a mapping in mode single; name one encoder, or set mode to per_model")
        if self.mode == "per_model" and not isinstance(self.encoders, dict):
            raise ValueError(
                f"encoders: got {self.encoders!r} in mode per_model; give a mapping from each target to its encoder"
            )
        return self
