"""The search space of a sweep, and the sampler of the next configuration.

In: a YAML file of lists (choices) and ranges, and the trials so far. Out: sampled parameters and their `FitConfig`. The
sampler keeps no state: the next configuration depends on the space, the seed and the earlier trials only, so that a
resumed sweep gives the trials of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import optuna
from optuna.trial import BaseTrial, FixedTrial, TrialState
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from prefill_router.config import FrozenModel
from prefill_router.prefill.config import EncoderConfig, Pooling
from prefill_router.prefill.encoder import parse_column
from prefill_router.routing.calibration import CalibratorName
from prefill_router.routing.candidates import Mode, encoder_names
from prefill_router.routing.config import FitConfig
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.selection import Strategy
from prefill_router.sweeps.objective import LOWER_IS_BETTER, Objective
from prefill_router.sweeps.trials import Parameter, Trial

BOTH = "both"  # the parameter for all poolings; None would mean that the parameter does not apply
# Parameters with the name of a field of FitConfig.
PLAIN = ("mode", "strategy", "fixed", "pooling", "each_pooling", "layers_per_target", "components", "calibrator")
NUMBERS = ("dropout", "weight_decay", "learning_rate")  # fields of TrunkConfig that can be ranges
ATTEMPTS = 50  # samples from TPE to find a new configuration, and then as many random ones


class Range(FrozenModel):
    """Numbers from `low` to `high`, sampled uniformly or, if `log`, log-uniformly."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"range: got {self.low:g} to {self.high:g}; low must be below high, and above 0 with log")
        return self


Choices = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Numbers = Range | Annotated[tuple[float, ...], Field(min_length=1)]


class SearchSpace(FrozenModel):
    """Allowed values of each parameter: a list of choices or, for numbers, a range {low, high, log}."""

    mode: Annotated[
        tuple[Mode, ...], Field(min_length=1, description="encoder modes; with one encoder, single and all are auto")
    ] = ("auto", "all", "single")
    encoders: Annotated[tuple[str, ...], Field(description="encoders of mode single; empty: all encoders")] = ()
    maps: Annotated[
        tuple[dict[str, str], ...], Field(description="mappings of mode per_model, from each target to its encoder")
    ] = ()
    pooling: Annotated[tuple[Pooling | None, ...], Field(min_length=1, description="poolings; null: all poolings")] = (
        None,
        "mean",
    )
    strategy: Annotated[tuple[Strategy, ...], Field(min_length=1, description="layer selection")] = ("cv", "fisher")
    fixed: Annotated[tuple[str, ...], Field(description="layers of strategy fixed, for example mean_L4")] = ()
    each_pooling: Annotated[
        tuple[bool, ...], Field(min_length=1, description="layers of every pooling, as in FitConfig")
    ] = (True,)
    layers_per_target: Annotated[Choices, Field(description="layers that a target reads")] = (1, 2)
    components: Annotated[Choices, Field(description="PCA components k of each layer key")] = (32, 64, 128)
    widths: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1, description="units of the hidden layers")] = (
        (128,),
        (256,),
        (512,),
        (256, 128),
    )
    dropout: Annotated[Numbers, Field(description="probability, after each hidden layer")] = Range(low=0.2, high=0.7)
    weight_decay: Annotated[Numbers, Field(description="L2 penalty in Adam's gradient")] = Range(
        low=1e-5, high=1e-2, log=True
    )
    learning_rate: Annotated[Numbers, Field(description="learning rate of Adam")] = Range(low=3e-4, high=3e-3, log=True)
    batch_size: Annotated[Choices, Field(description="queries per batch")] = (128, 256, 512)
    max_epochs: Annotated[Choices, Field(description="maximum number of epochs")] = (60,)
    members: Annotated[Choices, Field(description="trained members of the ensemble")] = (10,)
    kept: Annotated[Choices, Field(description="averaged members; at most the trained ones")] = (3, 5, 10)
    calibrator: Annotated[tuple[CalibratorName, ...], Field(min_length=1, description="calibrators")] = (
        "pooled",
        "platt",
        "isotonic",
    )

    @field_validator("fixed")
    @classmethod
    def _are_layers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            parse_column(name)
        return names

    @field_validator("widths", *NUMBERS)
    @classmethod
    def _can_be_trained(cls, tried: Any, field: ValidationInfo) -> Any:
        """Refuses the values that TrunkConfig would refuse, before the first trial."""
        for value in (tried.low, tried.high) if isinstance(tried, Range) else tried:
            try:
                TrunkConfig.model_validate({field.field_name: value})
            except ValidationError as error:
                raise ValueError(f"{value!r} is out of bounds: {error.errors()[0]['msg']}") from None
        return tried

    @model_validator(mode="after")
    def _complete(self) -> SearchSpace:
        if "per_model" in self.mode and not self.maps:
            raise ValueError("maps: mode per_model needs at least one mapping from each target to its encoder")
        if "fixed" in self.strategy and not self.fixed:
            raise ValueError("fixed: strategy fixed needs at least one layer, for example mean_L4")
        return self

    def resolve(self, encoders: Mapping[str, EncoderConfig]) -> SearchSpace:
        """The space for these encoders: fills in their names and, for one encoder, removes modes single and all."""
        names = tuple(encoder_names(encoders).values())
        mode = self.mode
        if len(encoders) == 1:
            mode = tuple(name for name in mode if name not in ("single", "all")) or ("auto",)
        return self.model_copy(update={"mode": mode, "encoders": self.encoders or names})

    def sample(self, trial: BaseTrial) -> dict[str, Parameter]:
        """Samples parameters. Parameters that do not apply are not sampled."""
        ask = trial.suggest_categorical
        values: dict[str, Any] = {"mode": ask("mode", self.mode)}
        if values["mode"] == "single":
            values["encoder"] = ask("encoder", self.encoders)
        elif values["mode"] == "per_model":
            values["map"] = ask("map", list(range(len(self.maps))))
        values["strategy"] = ask("strategy", self.strategy)
        if values["strategy"] == "fixed":
            values["fixed"] = ask("fixed", self.fixed)
        else:
            values["pooling"] = ask("pooling", [pooling or BOTH for pooling in self.pooling])
            for name in ("each_pooling", "layers_per_target"):
                values[name] = ask(name, getattr(self, name))
        values["components"] = ask("components", self.components)
        values["widths"] = ask("widths", ["x".join(map(str, widths)) for widths in self.widths])
        for name in NUMBERS:
            numbers = getattr(self, name)
            values[name] = (
                trial.suggest_float(name, numbers.low, numbers.high, log=numbers.log)
                if isinstance(numbers, Range)
                else ask(name, numbers)
            )
        for name in ("batch_size", "max_epochs", "members"):
            values[name] = ask(name, getattr(self, name))
        values["kept"] = ask("kept", self.kept)
        values["calibrator"] = ask("calibrator", self.calibrator)
        return values

    def fit_config(self, values: Mapping[str, Any], base: FitConfig) -> FitConfig:
        """The configuration with these parameters, and with the seed and scheme of `base`."""
        trunk = {name: values[name] for name in (*NUMBERS, "batch_size", "max_epochs", "members")}
        trunk |= {
            "widths": [int(width) for width in values["widths"].split("x") if width],
            "kept": min(values["kept"], values["members"]),
        }
        encoders = self.maps[values["map"]] if "map" in values else values.get("encoder")
        rest = {name: values[name] for name in PLAIN if values.get(name) not in (None, BOTH)}
        return FitConfig.model_validate(
            {"seed": base.seed, "scheme": base.scheme, "encoders": encoders, "trunk": trunk, **rest}
        )

    def parameters_of(self, fit: FitConfig) -> dict[str, Parameter]:
        """The parameters of `fit`; empty if it is outside the space."""
        trunk = fit.trunk
        values = {
            **fit.model_dump(include=set(PLAIN)),
            "pooling": fit.pooling or BOTH,
            "encoder": fit.encoders,
            **trunk.model_dump(),
            "widths": "x".join(map(str, trunk.widths)),
        }
        if isinstance(fit.encoders, dict):
            values["map"] = self.maps.index(fit.encoders) if fit.encoders in self.maps else None
        try:
            with warnings.catch_warnings(action="error"):  # Optuna only warns if a number is out of its range
                return self.sample(FixedTrial(values))
        except (ValueError, UserWarning):
            return {}

    def layer_choices(self, base: FitConfig) -> list[FitConfig]:
        """`base`, and one configuration for every choice of layers and k in the space: the input of `prepare`."""
        sources: list[dict[str, Any]] = []
        for mode in self.mode:
            named: Sequence[Any] = {"single": self.encoders, "per_model": self.maps}.get(mode, (None,))
            sources += [{"mode": mode, "encoders": name} for name in named]
        layers: list[dict[str, Any]] = [
            {"strategy": "fixed", "fixed": name} for name in self.fixed if "fixed" in self.strategy
        ]
        for strategy, *rest in itertools.product(
            self.strategy, self.pooling, self.each_pooling, self.layers_per_target
        ):
            if strategy != "fixed":
                layers.append(
                    dict(
                        zip(
                            ("strategy", "pooling", "each_pooling", "layers_per_target"), (strategy, *rest), strict=True
                        )
                    )
                )
        return [
            base,
            *(
                FitConfig.model_validate(
                    {"seed": base.seed, "scheme": base.scheme, "components": k, **source, **choice}
                )
                for source, choice, k in itertools.product(sources, layers, self.components)
            ),
        ]


def suggest(
    space: SearchSpace, trials: Sequence[Trial], objective: Objective, base: FitConfig, concurrent: int
) -> dict[str, Parameter] | None:
    """The parameters of the next trial, by Optuna's TPE (Bergstra et al. 2011); None if no new configuration is found.

    TPE concentrates on regions of good trials and may miss the rest of a small space, so random samples follow. With
    several concurrent trials, running trials count as bad ones ("constant liar"), so that new ones differ from them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = [trial.fit for trial in trials]
    known = [frozen for trial in trials if (frozen := _frozen(space, trial, objective)) is not None]
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        for attempt in range(2 * ATTEMPTS):
            seed = (base.seed * 1_000_003 + len(trials) * 2 * ATTEMPTS + attempt) % 2**32
            sampler = (
                optuna.samplers.TPESampler(seed=seed, constant_liar=concurrent > 1)
                if attempt < ATTEMPTS
                else optuna.samplers.RandomSampler(seed=seed)
            )
            study = optuna.create_study(
                direction="minimize" if objective in LOWER_IS_BETTER else "maximize", sampler=sampler
            )
            study.add_trials(known)
            found = space.sample(study.ask())
            if space.fit_config(found, base) not in tried:
                return found
    return None


def _frozen(space: SearchSpace, trial: Trial, objective: Objective) -> optuna.trial.FrozenTrial | None:
    """The trial for Optuna; None if it failed or its configuration is outside the space."""
    if not trial.parameters or trial.state == "failed":
        return None
    fixed = FixedTrial(dict(trial.parameters))
    space.sample(fixed)
    values = {
        number: value for number, epoch in enumerate(trial.epochs, 1) if (value := epoch.get(objective)) is not None
    }
    common: dict[str, Any] = {"params": trial.parameters, "distributions": fixed.distributions}
    if trial.state == "running" or not values:
        return optuna.trial.create_trial(state=TrialState.RUNNING, **common)
    if trial.state == "stopped":
        return optuna.trial.create_trial(
            state=TrialState.PRUNED, value=values[max(values)], intermediate_values=values, **common
        )
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE, value=values[max(values)], intermediate_values=values, **common
    )
