"""What every semantic router is: fitted on features of texts and labels, it predicts p [queries, models].

In: `Features` of the training queries, `correct` [queries, models] with NaN where unlabelled, and which of them may be
watched but not learned from: for early stopping, or to choose a penalty. Out: raw probabilities; calibration, costs,
policy and report are the prefill router's own. Paper 4.2. Knows nothing of splits, files of datasets or encoders.

A router's hyperparameters are its dataclass fields; all it learns stands in `arrays_`, so that saving and loading are
the same few lines for every router and nothing is pickled.
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

FORMAT_VERSION = 1
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CLIP = 1e-6  # raw probabilities are kept this far from 0 and 1

Router = TypeVar("Router", bound="SemanticRouter")  # beartype does not know typing.Self in a decorated method


@dataclass(frozen=True)
class Features:
    """What a router reads of queries, float32. `own` holds features of each (query, model), `prompts` the texts for a
    router that reads them itself; `judged` is no feature but a judge's difficulty, 0 easy to 1 hard, NaN where there is
    none, that a network may learn beside the labels. `groups` numbers queries that splits never part, which a router of
    neighbours must part from each other too; None: each is its own. The first `ready` columns of `shared` are principal
    components, whose variances say something: they are not scaled. What a family does not have has width 0, or is None.
    """

    shared: Float[np.ndarray, "queries shared"]
    own: Float[np.ndarray, "queries models own"]
    prompts: np.ndarray | None = None
    judged: Float[np.ndarray, " queries"] | None = None
    groups: Int[np.ndarray, " queries"] | None = None
    ready: int = 0

    def __len__(self) -> int:
        return len(self.shared)

    def take(self, rows: np.ndarray) -> Features:
        """Some of the queries, by position or mask."""
        prompts, judged, groups = (
            None if part is None else part[rows] for part in (self.prompts, self.judged, self.groups)
        )
        return Features(self.shared[rows], self.own[rows], prompts, judged, groups, self.ready)

    def of_model(self, model: int) -> Float[np.ndarray, "queries features"]:
        """What a router of one model reads: the shared features and its own."""
        return np.concatenate([self.shared, self.own[:, model]], axis=1)

    def flat(self) -> Float[np.ndarray, "queries features"]:
        """What a router of all models reads: the shared features and every model's own."""
        return np.concatenate([self.shared, self.own.reshape(len(self), -1)], axis=1)


@dataclass
class SemanticRouter(ABC):
    """Base of the routers. A subclass sets `kind` and writes `_fit` and `_predict`, which never see a model whose
    training labels are of one class only, or none: such a model gets its smoothed share of right answers."""

    kind: ClassVar[str]
    arrays_: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fit(
        self: Router,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int = 0,
    ) -> Router:
        """Learns from the queries that are not `validation`. Deterministic under `seed`.

        Raises InputError for arrays that do not fit together, a feature that is not finite, or nothing to learn from.
        """
        _check(features, correct, validation)
        learned = correct[~validation]
        right, wrong = (learned == 1).sum(axis=0), (learned == 0).sum(axis=0)
        fitting = np.flatnonzero((right > 0) & (wrong > 0))
        self.arrays_ = {"prior": (right + 1) / (right + wrong + 2), "fitting": fitting}
        if len(fitting):
            self._fit(_of_models(features, fitting), correct[:, fitting], validation, seed)
        return self

    def predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        """p of every model, in (0, 1); a row's p does not depend on the other rows."""
        if not self.arrays_:
            raise InputError(f"{self.kind}: it has not been fitted; call fit, or load one that has")
        prior, fitting = self.arrays_["prior"], self.arrays_["fitting"]
        p = np.tile(prior.astype(np.float64), (len(features), 1))
        if len(fitting) and len(features):
            p[:, fitting] = self._predict(_of_models(features, fitting))
        if not np.isfinite(p).all():
            raise InputError(
                f"{self.kind}: p of query {np.argwhere(~np.isfinite(p))[0][0]} is not finite; it did not "
                "learn: lower its learning rate, or give it other features"
            )
        return np.clip(p, CLIP, 1 - CLIP)

    @abstractmethod
    def _fit(
        self,
        features: Features,
        correct: Float[np.ndarray, "queries models"],
        validation: Bool[np.ndarray, " queries"],
        seed: int,
    ) -> None:
        """Puts what is learned into `arrays_`."""

    @abstractmethod
    def _predict(self, features: Features) -> Float[np.ndarray, "queries models"]:
        """Raw p from `arrays_` and the fields alone."""

    @property
    def settings(self) -> dict[str, Any]:
        """The hyperparameters: the fields that a constructor takes."""
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
        """A router of this class as it was saved. Raises InputError for one of another class or format."""
        record = read_json(folder / "router.json")
        if (record.get("format_version"), record.get("kind")) != (FORMAT_VERSION, cls.kind):
            raise InputError(
                f"{folder}: holds a router of kind {record.get('kind')!r}, format "
                f"{record.get('format_version')}; expected {cls.kind!r}, format {FORMAT_VERSION}"
            )
        router = cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in record["settings"].items()}
        )
        router.arrays_ = load_file(folder / "router.safetensors")
        return router


@dataclass(frozen=True)
class Standardiser:
    """Columns less their mean, over their deviation (1 where a column hardly varies), at most ten deviations out; the
    first `ready` as they are."""

    mean: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]
    ready: int

    @classmethod
    def of(cls, x: Float[np.ndarray, "queries features"], ready: int) -> Standardiser:
        """From the training rows."""
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
            f"{correct.shape}, watched {validation.shape}; they must be of the same queries and models"
        )
    for name, array in (("shared", features.shared), ("own", features.own)):
        if not np.isfinite(array).all():
            raise InputError(
                f"features: {name}, query {np.argwhere(~np.isfinite(array))[0][0]}: not finite; leave the "
                "query out, or the family"
            )
    if validation.all():
        raise InputError("watched: every query is watched, none is left to learn from")
