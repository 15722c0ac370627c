"""The grid of semantic routers (feature families x routers x settings), and the fit of one configuration.

In: a `Configuration`, the sources of its family, outcomes and a split with a calibration part. Out: a `Result`:
calibrated p of the test queries, cross-calibrated p of the calibration queries, and the figures by which configurations
are selected. Selection uses calibration queries only; no label of a test query is read. Does not handle processes,
files or reports.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_type_hints

import numpy as np
from jaxtyping import Float
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.routing.calibration import calibrated_across
from prefill_router.routing.fit import VALIDATION_FOLDS
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.semantic.calibrators import Suite, choose, fit_map
from prefill_router.semantic.classifiers import KNNRouter, LogisticRouter, XGBoostRouter
from prefill_router.semantic.families import OF_EMBEDDING, PARTS, Sources, features_of, reads_embedding
from prefill_router.semantic.finetune import LoRARouter
from prefill_router.semantic.graph import GraphRouter
from prefill_router.semantic.irt import MIRTRouter
from prefill_router.semantic.networks import NetworkRouter, TieredRouter
from prefill_router.semantic.router import SemanticRouter

ROUTERS: dict[str, type[SemanticRouter]] = {
    router.kind: router
    for router in (
        KNNRouter,
        LogisticRouter,
        XGBoostRouter,
        NetworkRouter,
        TieredRouter,
        MIRTRouter,
        GraphRouter,
        LoRARouter,
    )
}
FAMILIES = (
    "embedding",
    "pca128",
    "pca256",
    "knn",
    "complexity",
    "embedding+complexity",
    "pca128+knn",
    "pca128+knn+complexity",
    "perplexity",
    "complexity+perplexity",
    "pca128+knn+complexity+perplexity",
)
NAMES = {
    "knn": "kNN",
    "logistic": "LR",
    "xgboost": "XGBoost",
    "tiered": "two-stage",
    "mirt": "MIRT-2PL",
    "graph": "GAT",
    "lora": "LoRA",
}
FOUR = {(True, True): "unified MT", (True, False): "unified MLP", (False, True): "MT", (False, False): "MLP"}
# Settings of the paper's network architectures.
PER_MODEL, UNIFIED = {"joint": False}, {"joint": True}
PLAIN = {"difficulty": 0.0}


class Configuration(FrozenModel):
    """A feature family, a router kind, and the settings that differ from the router's defaults."""

    family: Annotated[str, Field(description="parts joined by +, as in pca128+knn")]
    router: Annotated[str, Field(description="knn, logistic, xgboost, network, tiered, mirt, graph or lora")]
    settings: Annotated[dict[str, Any], Field(description="fields of that router")] = {}
    encoder: Annotated[
        str | None, Field(description="name of the encoder whose embedding the family reads; null: the first encoder")
    ] = None

    @model_validator(mode="after")
    def _is_valid(self) -> Configuration:
        if self.router not in ROUTERS:
            raise ValueError(f"router: got {self.router!r}, allowed are {', '.join(ROUTERS)}")
        known = ROUTERS[self.router]().settings
        for name, value in self.settings.items():
            if name not in known:
                raise ValueError(f"settings: {self.router} has no setting {name!r}, allowed are {', '.join(known)}")
            try:
                self._setting(name)
            except ValidationError as error:
                raise ValueError(f"settings: {name}: got {value!r}: {error.errors()[0]['msg']}") from None
        made, parts = self.make(), set(self.family.split("+"))
        if "kept" in known and made.settings["kept"] > made.settings["members"]:
            raise ValueError(
                f"settings: kept: got {made.settings['kept']}, at most the {made.settings['members']} "
                "members trained can be kept"
            )
        if made.settings.get("judged") and not made.settings["difficulty"]:
            raise ValueError("settings: judged needs the difficulty task, got difficulty 0; set difficulty above 0")
        wanted = {"lora": {"text"}, "graph": set(PARTS) - {"text", "knn"}}.get(self.router, set(PARTS) - {"text"})
        if not parts & wanted or (self.router != "lora" and "text" in parts):
            raise ValueError(
                f"family: {self.router} reads {', '.join(part for part in PARTS if part in wanted)}; got "
                f"{self.family!r}"
            )
        if self.encoder is not None and not reads_embedding(self.family):
            raise ValueError(
                f"encoder: got {self.encoder!r}, but {self.family!r} reads no embedding; leave it out, or add one of "
                f"{', '.join(OF_EMBEDDING)}"
            )
        return self

    @property
    def name(self) -> str:
        """A unique name: the architecture, the family, and the settings that the architecture does not imply."""
        implied = (
            {"joint", *(["difficulty"] if self.settings.get("difficulty") == 0 else [])}
            if self.architecture in FOUR.values()
            else set()
        )
        rest = [f"{name} {_short(value)}" for name, value in self.settings.items() if name not in implied]
        return ", ".join([f"{self.architecture} on {self.features}", *rest])

    @property
    def features(self) -> str:
        """The family and, if given, the encoder."""
        return self.family if self.encoder is None else f"{self.family} of {self.encoder}"

    @property
    def architecture(self) -> str:
        """The architecture's name in the paper."""
        if self.router != "network":
            return NAMES[self.router]
        if self.settings.get("judged"):
            return "judged MT"
        if self.settings.get("disagreement"):
            return "disagreement-weighted MT"
        return FOUR[self.settings.get("joint", True), self.settings.get("difficulty", 0.5) > 0]

    def make(self) -> SemanticRouter:
        """The unfitted router."""
        return ROUTERS[self.router](**{name: self._setting(name) for name in self.settings})

    def _setting(self, name: str) -> Any:
        """The setting, validated and converted by the type and bounds of the router's field."""
        kind = get_type_hints(ROUTERS[self.router], include_extras=True)[name]
        return TypeAdapter(kind).validate_python(self.settings[name])


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Result:
    """Predictions and figures of one fit.

    `figures`: by calibrator, `auc` and `brier` of the calibration queries, calibrated across folds. `calibrator`: the
    selected one. `p_calibration`: calibrated by it across folds. `seconds`: CPU time. `margin_bonus`: of the
    prefill router's margin.
    """

    calibrator: Suite
    figures: Mapping[Suite, Mapping[str, float]]
    p_calibration: Float[np.ndarray, "calibration models"]
    p_test: Float[np.ndarray, "test models"]
    seconds: float
    margin_bonus: float = 0.0

    @property
    def auc(self) -> float:
        """The selection criterion: AUC of raw p. Calibrators of different folds would change the order of queries."""
        return self.figures["none"]["auc"]


def fit_configuration(
    configuration: Configuration,
    sources: Sources,
    outcomes: Outcomes,
    split: Split,
    seed: int,
    prefill: Float[np.ndarray, "queries features"] | None = None,
) -> Result:
    """Fits on `split.train`, calibrates and scores on `split.calibration`, and predicts `split.test`.

    `prefill`: features of a prefill router fitted on the same training queries. Raises InputError for a split without
    a calibration part.
    """
    if not len(split.calibration):
        raise InputError(
            "split: the calibration part is empty, and configurations are selected on it; use scheme 75/10/15"
        )
    began, train = time.process_time(), split.train
    features = features_of(configuration.family, sources, outcomes.correct, train, prefill, configuration.encoder)
    validation = make_folds(outcomes, train, seed + 1, VALIDATION_FOLDS) == 0
    router = configuration.make().fit(features.take(train), outcomes.correct[train], validation, seed)
    raw, correct = router.predict(features.take(split.calibration)), outcomes.correct[split.calibration]
    folds = make_folds(outcomes, split.calibration, seed, N_FOLDS)
    calibrator, figures = choose(raw, correct, folds)
    return Result(
        calibrator,
        figures,
        calibrated_across(partial(fit_map, calibrator), raw, correct, folds),
        fit_map(calibrator, raw, correct)(router.predict(features.take(split.test))),
        time.process_time() - began,
    )


def default_grid(sources: Sources, trunk: TrunkConfig | None = None) -> tuple[Configuration, ...]:
    """The built-in grid: every router on the families that suit it, and more settings of the cheap or strong routers.

    `trunk`: further settings of the network, such as the best trunk of a sweep. Complexity, perplexity and a judge's
    difficulty are used if `sources` has them. With several encoders, every configuration that reads an embedding is
    listed once for each encoder.
    """
    missing = {"complexity", "perplexity"} - set(sources.text)
    families = [family for family in FAMILIES if not missing & set(family.split("+"))]
    encoders = tuple(sources.embeddings) if len(sources.embeddings) > 1 else (None,)
    best = [family for family in families if family.startswith("pca128+knn")]

    def over(router: str, families: Sequence[str], *settings: Mapping[str, Any]) -> list[Configuration]:
        return [
            Configuration(family=family, router=router, settings=dict(setting), encoder=encoder)
            for setting, family in itertools.product(settings or ({},), families)
            for encoder in (encoders if reads_embedding(family) else (None,))
        ]

    knn = [
        {"k": k, "kernel": kernel}
        for k, kernel in itertools.product((10, 25, 50, 100, 200), ("uniform", "inverse", "gaussian"))
    ]
    tuned: list[dict[str, Any]] = [
        {"weight_decay": 1e-4},
        {"weight_decay": 3e-3},
        {"dropout": 0.3},
        {"dropout": 0.7},
        {"widths": (512,)},
        {"widths": (128,)},
        {"widths": (256, 128)},
        {"learning_rate": 3e-4},
        {"members": 10, "kept": 5},
    ]
    grid = [
        *over("lora", ("text",)),  # first, because it takes longest
        *over("knn", ("embedding", "pca128"), *knn),
        *over("logistic", families),
        *over("xgboost", families),
        *over("xgboost", best, {"max_depth": 2, "n_trees": 800}, {"max_depth": 6}),
        *over("network", families, {**PER_MODEL, **PLAIN}, PER_MODEL, {**UNIFIED, **PLAIN}, UNIFIED),
        *over("network", best, *({**PLAIN, **setting} for setting in tuned)),
        *over("network", best, {"difficulty": 0.25}, {"difficulty": 1.0}, {"difficulty": 2.0}),
        *over("network", best, {"disagreement": 1.0}, {"disagreement": 3.0}),
        *over("tiered", ("embedding", *best)),
        *over("mirt", ("embedding", *best)),
        *over("mirt", best[:1], {"dimensions": 1}, {"dimensions": 8}),
        *over("graph", ("embedding",), {}, {"neighbours": 32}),
    ]
    if trunk is not None:
        grid += over("network", ("embedding", *best), {**PLAIN, **trunk.model_dump(mode="json")})
    if sources.judged is not None:
        grid += over("network", best, {"judged": True})
    return tuple(grid)
