"""The interface of semantic routers: fitted on features and labels, they predict p [queries, models] (paper 4.2).

In: `Features` of the training queries, `correct` [queries, models] with NaN if unlabelled, and a mask of the validation
queries, which are used for early stopping or to choose a penalty. Out: raw probabilities; calibration, costs, policy
and report are shared with the prefill router. Does not handle splits, dataset files or encoders.

The dataclass fields of a router are its hyperparameters; everything learned is in `arrays_`. Saving and loading is
therefore the same for all routers, without pickle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field
from safetensors.numpy import load_file, save_file

from prefill_router.errors import InputError
from prefill_router.files import read_json, write_atomically, write_json
from prefill_router.locations import local_copy

FORMAT_VERSION = 1
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CLIP = 1e-6  # raw probabilities are clipped to [CLIP, 1 - CLIP]

Router = TypeVar("Router", bound="SemanticRouter")  # beartype does not know typing.Self in a decorated method


@dataclass(frozen=True)
class Features:
    """Inputs of a router, one row per query. Absent inputs have width 0 or are None.

    `shared`: features of the query. `own`: features of the pair (query, model). `prompts`: texts. `benchmarks`: the
    benchmark of each query. `judged`: a judge's difficulty, 0 easy to 1 hard, NaN if missing; it is a training target,
    not a feature. `groups`: number of the query's group, which splits keep together; neighbours within a group are
    excluded in training; None: every query is its own group. `ready`: the first `ready` columns of `shared` are
    principal components and are not scaled, because their variances carry information.
    """

    shared: Float[np.ndarray, "queries shared"]
    own: Float[np.ndarray, "queries models own"]
    prompts: np.ndarray | None = None
    benchmarks: np.ndarray | None = None
    judged: Float[np.ndarray, " queries"] | None = None
    groups: Int[np.ndarray, " queries"] | None = None
    ready: int = 0

    def __len__(self) -> int:
        return len(self.shared)

    def take(self, rows: np.ndarray) -> Features:
        """The features of some queries, by position or mask."""
        optional = ("prompts", "benchmarks", "judged", "groups")
        taken = {name: getattr(self, name)[rows] for name in optional if getattr(self, name) is not None}
        return replace(self, shared=self.shared[rows], own=self.own[rows], **taken)

    def of_model(self, model: int) -> Float[np.ndarray, "queries features"]:
        """The shared features and those of one model."""
        return np.concatenate([self.shared, self.own[:, model]], axis=1)

    def flat(self) -> Float[np.ndarray, "queries features"]:
        """The shared features and those of all models."""
        return np.concatenate([self.shared, self.own.reshape(len(self), -1)], axis=1)


@dataclass
class SemanticRouter(ABC):
    """Base class. A subclass sets `kind` and implements `_fit` and `_predict`.

    Unless `fits_one_class`, these do not get models whose training labels are all equal or missing; p of such a model
    is its smoothed accuracy, (right + 1) / (labels + 2). Raw p is clipped to [`clip`, 1 - `clip`].
    """

    kind: ClassVar[str]
    fits_one_class: ClassVar[bool] = False
    clip: ClassVar[float] = CLIP
    arrays_: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fit(
        self: Router,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int = 0,
    ) -> Router:
        """Fits on the queries outside `validation` and returns self. Deterministic for a given `seed`.

        Raises InputError for arrays of different lengths or models, a feature that is not finite, or if all queries are
        validation queries.
        """
        _check(features, correct, validation)
        self._reset(correct[~validation])
        fitting = self.arrays_["fitting"]
        if len(fitting):
            self._fit(_of_models(features, fitting), correct[:, fitting], validation, seed)
        return self

    def predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        """Raw p of every model; a row's p does not depend on the other rows, within rounding."""
        if not self.arrays_:
            raise InputError(f"{self.kind}: the router has not been fitted; call fit, or load a fitted router")
        prior, fitting = self.arrays_["prior"], self.arrays_["fitting"]
        p = np.tile(prior.astype(np.float64), (len(features), 1))
        if len(fitting) and len(features):
            p[:, fitting] = self._predict(_of_models(features, fitting))
        if not np.isfinite(p).all():
            raise InputError(
                f"{self.kind}: p of query {np.argwhere(~np.isfinite(p))[0][0]} is not finite; training "
                "diverged: lower the learning rate, or use other features"
            )
        return np.clip(p, self.clip, 1 - self.clip)

    def _reset(self, labels: Float[np.ndarray, "queries models"]) -> None:
        """Resets `arrays_` to each model's smoothed accuracy and the positions of the models to fit."""
        right, wrong = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
        fitting = np.ones(len(right), dtype=bool) if self.fits_one_class else (right > 0) & (wrong > 0)
        self.arrays_ = {"prior": (right + 1) / (right + wrong + 2), "fitting": np.flatnonzero(fitting)}

    @abstractmethod
    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        """Fits and puts everything learned into `arrays_`."""

    @abstractmethod
    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        """Raw p of the fitted models, computed from `arrays_` and the fields."""

    @property
    def settings(self) -> dict[str, Any]:
        """The hyperparameters: the fields that the constructor takes."""
        return {own.name: getattr(self, own.name) for own in fields(self) if own.init}

    def save(self, folder: Path) -> None:
        """Writes `router.json` and `router.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays_.items()}
        write_atomically(folder / "router.safetensors", lambda place: save_file(arrays, place))
        write_json(
            folder / "router.json", {"format_version": FORMAT_VERSION, "kind": self.kind, "settings": self.settings}
        )

    @classmethod
    def load(cls: type[Router], folder: Path) -> Router:
        """Loads a saved router of this class. Raises InputError for a router of another kind or format version."""
        record = read_json(folder / "router.json")
        if (record.get("format_version"), record.get("kind")) != (FORMAT_VERSION, cls.kind):
            raise InputError(
                f"{folder}: holds a router of kind {record.get('kind')!r}, format "
                f"{record.get('format_version')}; expected {cls.kind!r}, format {FORMAT_VERSION}"
            )
        router = cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
        )
        with local_copy(folder / "router.safetensors") as copy:
            router.arrays_ = load_file(copy)
        return router


@dataclass(frozen=True)
class Standardiser:
    """Centres columns, divides them by their standard deviation (by 1 if it is below 1e-6) and clips to +-10. The first
    `ready` columns stay unchanged."""

    mean: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]
    ready: int

    @classmethod
    def of(cls, x: Float[np.ndarray, "queries features"], ready: int) -> Standardiser:
        """Fits mean and scale on training rows."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale = np.where(scale > 1e-6, scale, 1)
        mean[:ready], scale[:ready] = 0, 1
        return cls(mean, scale.astype(np.float32), ready)

    def __call__(self, x: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, "queries features"]:
        scaled = (x - self.mean) / self.scale
        scaled[:, self.ready :] = np.clip(scaled[:, self.ready :], -10, 10)
        return scaled.astype(np.float32)


def _of_models(features: Features, models: np.ndarray) -> Features:
    return features if len(models) == features.own.shape[1] else replace(features, own=features.own[:, models])


def _check(features: Features, correct: np.ndarray, validation: np.ndarray) -> None:
    if not len(features) == len(correct) == len(validation) or features.own.shape[:2] != correct.shape:
        raise InputError(
            f"features: {len(features)} queries and own features {features.own.shape}, labels "
            f"{correct.shape}, validation {validation.shape}; they must be of the same queries and models"
        )
    for name, array in (("shared", features.shared), ("own", features.own)):
        if not np.isfinite(array).all():
            raise InputError(
                f"features: {name}, query {np.argwhere(~np.isfinite(array))[0][0]}: not finite; leave out "
                "the query or the feature family"
            )
    if validation.all():
        raise InputError(
            "validation: every query is a validation query, none is left for training; leave some out of the mask"
        )
