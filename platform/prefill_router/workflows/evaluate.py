"""Evaluation of a router on its test split next to tuned baselines, and its optional protocols.

Out: metrics.json, predictions.parquet, provenance.json and report.html. The protocols retrain with further split
seeds, retrain without each benchmark, and route perturbed prompts. Their results are cached under OUTPUT/cache, so that
an interrupted evaluation resumes. The caller chooses where perturbed prompts are encoded: in this process, or on a
cluster.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from prefill_router import registry
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.experiments import leave_one_out
from prefill_router.experiments.controls import predict_controls, truncation
from prefill_router.experiments.perturb import perturb
from prefill_router.experiments.predict import encoders_to_run, predict_perturbed, predict_test
from prefill_router.experiments.provenance import provenance
from prefill_router.files import sha256_strings, write_json, write_parquet
from prefill_router.locations import Location, location
from prefill_router.metrics import seeds
from prefill_router.metrics.controls import chance_figures, truncation_figures
from prefill_router.metrics.evaluate import evaluate as evaluate_predictions
from prefill_router.metrics.predictions import Predictions, read_predictions, with_overhead, write_predictions
from prefill_router.metrics.robustness import Perturbed, robustness, write_perturbed
from prefill_router.outcomes.splits import Split, split_queries
from prefill_router.outcomes.table import read_note
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations
from prefill_router.prefill.encoder import column_name
from prefill_router.prefill.local import prefill_prompts
from prefill_router.registry.store import shown, tracking_uri
from prefill_router.reports.console import console_tables
from prefill_router.reports.evaluation import write_report
from prefill_router.reports.format import number
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import FittedRouter, fit_router
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import FittedBaseline
from prefill_router.signals.join import Signals
from prefill_router.workflows.inputs import (
    SignalsConfig,
    check_adapters,
    load_signals,
    note_fallback_only,
    refuse_adapters,
    split_signals,
)

OPTIONAL = ("perturbed.parquet", "leave_one_out.parquet", "seeds.md", "controls.parquet", "truncation.parquet")
CACHE_FORMAT = "2"  # raised if the cached predictions have other routers
Encode = Callable[[pa.Table, EncoderConfig, Path], Activations]


class OverheadConfig(FrozenModel):
    """Cost of the routing decision: the encoder's time on a GPU. Not counted by default."""

    seconds_per_query: Annotated[
        float,
        Field(ge=0, description="encoder seconds per query, counted as a cost of routing; needs gpu_usd_per_hour"),
    ] = 0.0
    gpu_usd_per_hour: Annotated[float, Field(ge=0, description="price of the encoder's GPU, USD per hour")] = 0.0

    @model_validator(mode="after")
    def _both(self) -> OverheadConfig:
        if (self.seconds_per_query > 0) != (self.gpu_usd_per_hour > 0):
            raise ValueError(
                f"got seconds_per_query {self.seconds_per_query:g} and gpu_usd_per_hour {self.gpu_usd_per_hour:g}; "
                "give both, or neither to ignore the encoder's time"
            )
        return self

    @property
    def usd_per_query(self) -> float:
        return self.seconds_per_query * self.gpu_usd_per_hour / 3600


class EvaluationOptions(FrozenModel):
    """Baselines, bootstrap and protocols of an evaluation."""

    baselines: Annotated[
        bool, Field(description="fit best single model, category prior, kNN vote and unified MLP for comparison")
    ] = True
    controls: Annotated[
        bool,
        Field(description="train trunks on shuffled labels and on random features, and count truncated prompts"),
    ] = True
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the test queries, by group")] = 1000
    seeds: Annotated[
        int,
        Field(
            ge=1, description="number of split seeds, from the checkpoint's seed upwards; each further one needs a fit"
        ),
    ] = 1
    leave_one_benchmark_out: Annotated[
        bool, Field(description="leave-one-benchmark-out: for each benchmark, train without it and test on it")
    ] = False
    perturbed_queries: Annotated[
        int, Field(ge=0, description="number of random test queries to perturb, encode and route")
    ] = 0
    overhead: OverheadConfig = OverheadConfig()


class EvaluateConfig(EvaluationOptions, SignalsConfig):
    """Inputs, the checkpoint, and the options of the evaluation."""

    checkpoint: Annotated[Location, Field(description="checkpoint folder")]


@dataclass(frozen=True)
class Controls:
    """Predictions of the control trunks, and the prompts as the encoders read them (experiments/controls.py)."""

    predictions: Predictions
    truncation: pa.Table


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation. `metrics` is the content of metrics.json (docs/metrics.md)."""

    predictions: Predictions
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    prompts: Mapping[str, str]
    layers: list[dict[str, Any]]
    perturbed: Perturbed | None = None
    unseen: Predictions | None = None
    controls: Controls | None = None

    def save(self, folder: Path | str) -> Path:
        """Writes metrics.json, predictions.parquet, provenance.json, report.html and the files of the protocols.

        Returns the path of the report. Files of protocols that were not run are removed.
        """
        folder = location(folder)
        for name in OPTIONAL:
            (folder / name).unlink(missing_ok=True)
        write_predictions(self.predictions, folder / "predictions.parquet")
        if self.perturbed is not None:
            write_perturbed(self.perturbed, folder / "perturbed.parquet")
        if self.unseen is not None:
            write_predictions(self.unseen, folder / "leave_one_out.parquet")
        if self.controls is not None:
            write_predictions(self.controls.predictions, folder / "controls.parquet")
            write_parquet(folder / "truncation.parquet", self.controls.truncation)
        if "seeds" in self.metrics:
            (folder / "seeds.md").write_text(seeds.markdown(self.metrics["seeds"]), encoding="utf-8")
        write_json(folder / "metrics.json", self.metrics)
        write_json(folder / "provenance.json", self.provenance)
        return self.save_html(folder)

    def save_html(self, folder: Path | str) -> Path:
        """Writes FOLDER/report.html, one self-contained page, and returns its path."""
        return write_report(
            location(folder), self.predictions, self.metrics, self.provenance, prompts=self.prompts, layers=self.layers
        )


def evaluate(
    fitted: FittedRouter,
    options: EvaluationOptions | None = None,
    *,
    baselines: bool = True,
    cache: Path | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a fitted router on the test part of its split, which the fit did not read.

    `options` sets protocols and bootstrap and replaces `baselines`. `cache` is the folder for the results of the
    protocols, which need it. Raises InputError if a protocol is requested without `cache`, or its data is missing.
    """
    options = options or EvaluationOptions(baselines=baselines)
    folder = None if cache is None else location(cache)
    return _Protocols(fitted.router, fitted.signals, fitted.split, options, folder, _encode_here, progress).run()


def plan(config: EvaluateConfig) -> list[str]:
    """What a dry run says of an evaluation. Raises InputError as `run` does for its inputs."""
    router, signals, split = _opened(config)
    n = min(config.perturbed_queries, len(split.test))
    more = [
        f"{config.seeds - 1} further fits for seeds" if config.seeds > 1 else "",
        "a fit without each benchmark" if config.leave_one_benchmark_out else "",
        f"the perturbed prompts of {n:,} queries to encode" if n else "",
        "the control trunks" if config.controls else "",
    ]
    return [
        f"tracks the run in {shown(tracking_uri())}",
        f"costs nothing but the time of this machine: checkpoint {router.id} on {len(split.test):,} test queries of "
        f"{len(signals.outcomes):,}, {', '.join([f'{config.resamples:,} resamples', *filter(None, more)])}",
    ]


def run(config: EvaluateConfig, encode: Encode | None = None) -> str:
    """Evaluate a checkpoint on its test split; write metrics, predictions and a report."""
    router, signals, split = _opened(config)
    note_fallback_only(router.pool)
    protocols = _Protocols(router, signals, split, config, config.output / "cache", encode or _encode_here, True)
    with registry.track("evaluate", config, tags={"checkpoint_id": router.id}) as tracked:
        notice = {"notice": read_note(config.outcomes)}
        evaluation = protocols.run(**notice, configuration=config.model_dump(mode="json"))
        report = evaluation.save(config.output)
        figures = evaluation.metrics["routers"]["prefill"]
        tracked.log_metrics({name: figures[name]["estimate"] for name in registry.HEADLINE})
        for name in ("metrics.json", "predictions.parquet", "report.html"):
            tracked.log_artifact(config.output / name, "evaluation")
    print(f"\n{console_tables(evaluation.metrics)}\n", flush=True)
    routers = evaluation.metrics["routers"].items()
    aucs = ", ".join(f"{name} {number(figure['auc']['estimate'], 4)}" for name, figure in routers)
    return f"AUC {aucs}; report: {report}" + ("" if tracked.complete else "; not tracked")


def _opened(config: EvaluateConfig) -> tuple[Router, Signals, Split]:
    """The checkpoint, and its inputs with its split. Raises InputError if they are not those of its training."""
    router = load_checkpoint(config.checkpoint)
    pool, signals = load_signals(config)
    if pool != router.pool:
        raise InputError(
            f"pool: {config.pool} is not the pool of the checkpoint (models, order or prices differ); evaluate with "
            f"{config.checkpoint / 'pool.yaml'}, or retrain"
        )
    if signals.outcomes.digest() != router.manifest["outcomes_digest"]:
        raise InputError(
            "outcomes: they are not the outcomes that the checkpoint was trained on (pool, prompts, groups or labels "
            "differ), so its test split is unknown; evaluate with the same outcomes and pool"
        )
    fit = FitConfig.recorded(router.manifest["fit"])
    return router, signals, split_signals(signals, fit.seed, fit.scheme)


@dataclass(frozen=True)
class _Protocols:
    """The evaluation of one router and its protocols, each a method."""

    router: Router
    signals: Signals
    split: Split
    options: EvaluationOptions
    cache: Path | None
    encode: Encode
    progress: bool

    @property
    def fit(self) -> FitConfig:
        return FitConfig.recorded(self.router.manifest["fit"])

    def run(self, **about: Any) -> Evaluation:
        """Runs the evaluation and the requested protocols. `about` is added to the provenance."""
        options, signals = self.options, self.signals
        if options.leave_one_benchmark_out:
            leave_one_out.check(signals.outcomes.benchmarks)
            refuse_adapters(signals, "leave_one_benchmark_out", "leave it out")
        predictions, fitted = predict_test(
            self.router, signals, self.split, baselines=options.baselines, progress=self.progress
        )
        predictions = with_overhead(predictions, options.overhead.usd_per_query)
        metrics = self.measure(predictions, self.fit.seed)
        controls = self.controls(predictions) if options.controls else None
        if controls is not None:
            drawn = {"n_resamples": options.resamples, "seed": self.fit.seed}
            metrics["controls"] = {
                **chance_figures(controls.predictions, **drawn),
                "truncation": truncation_figures(controls.truncation, predictions, **drawn),
            }
        perturbed = self.perturbed(predictions, fitted) if options.perturbed_queries else None
        if perturbed is not None:
            found = robustness(predictions, perturbed, n_resamples=options.resamples, seed=self.fit.seed)
            for name, figures in found.items():
                metrics["routers"][name]["robustness"] = figures
        unseen = self.unseen(predictions, fitted) if options.leave_one_benchmark_out else None
        if unseen is not None:
            metrics["leave_one_benchmark_out"] = self.measure(unseen, self.fit.seed)
        if options.seeds > 1:
            metrics["seeds"] = self.across_seeds(metrics)
        prompts = dict(zip(signals.outcomes.query_ids, signals.outcomes.prompts, strict=True))
        record = self.provenance(fitted, about)
        return Evaluation(predictions, metrics, record, prompts, layer_rows(self.router), perturbed, unseen, controls)

    def measure(self, predictions: Predictions, seed: int) -> dict[str, Any]:
        if self.progress:
            print(f"bootstrap: {self.options.resamples:,} resamples of {len(predictions):,} test queries", flush=True)
        return evaluate_predictions(predictions, n_resamples=self.options.resamples, seed=seed)

    def controls(self, predictions: Predictions) -> Controls:
        """Test predictions of the control trunks, and the record of truncated prompts."""
        return Controls(
            predict_controls(self.router, self.signals, self.split, predictions, self.progress),
            truncation(self.router, self.signals, self.split),
        )

    def perturbed(self, predictions: Predictions, fitted: Mapping[str, FittedBaseline]) -> Perturbed:
        """Confidences on perturbed prompts of randomly drawn test queries."""
        outcomes, seed = self.signals.outcomes, self.fit.seed
        n = min(self.options.perturbed_queries, len(predictions))
        drawn = set(np.random.default_rng(seed).choice(predictions.query_ids, n, replace=False))
        pairs = zip(outcomes.query_ids, outcomes.prompts, strict=True)
        prompts = {query_id: prompt for query_id, prompt in pairs if query_id in drawn}
        changed = perturb(prompts.keys(), prompts.values(), seed)
        folder = self.cached(f"perturbed-{sha256_strings(changed.column('prompt').to_pylist())[:16]}")
        activations = {
            fingerprint: self.encode(changed, encoder, folder / fingerprint)
            for fingerprint, encoder in encoders_to_run(self.router, self.signals, self.options.baselines).items()
        }
        return predict_perturbed(self.router, fitted, self.signals, changed, activations)

    def unseen(self, predictions: Predictions, fitted: Mapping[str, FittedBaseline]) -> Predictions:
        """Test predictions for every benchmark by routers that were trained without it."""
        names, found = sorted(set(predictions.benchmarks)), {}
        for index, name in enumerate(names):
            self.say(f"leave one benchmark out: {index + 1} of {len(names)}, {name}")
            found[name] = _read_or_make(
                self.cached("without") / f"{index:03d}.parquet",
                partial(
                    leave_one_out.predict_unseen,
                    self.router.pool,
                    self.signals,
                    self.split,
                    self.fit,
                    name,
                    baselines=self.options.baselines,
                    tuned=fitted,
                ),
            )
        return leave_one_out.combine(predictions, found)

    def across_seeds(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Summary over the router's seed and the next ones; every seed has its own split and fit."""
        by_seed = {self.fit.seed: metrics}
        for seed in range(self.fit.seed + 1, self.fit.seed + self.options.seeds):
            self.say(f"seed {seed}: training")
            path = self.cached("seeds") / f"seed{seed}.parquet"
            predictions = _read_or_make(path, partial(self.predict_seed, seed))
            by_seed[seed] = self.measure(with_overhead(predictions, self.options.overhead.usd_per_query), seed)
        return seeds.across_seeds(by_seed)

    def predict_seed(self, seed: int) -> Predictions:
        """Test predictions under another split seed, by a router trained with the same configuration."""
        fit, signals = self.fit.model_copy(update={"seed": seed}), self.signals
        split = split_queries(signals.outcomes, seed, fit.scheme)
        check_adapters(signals, split)
        lineage = {"seed_of": self.router.id}
        router = fit_router(signals, self.router.pool, split, fit, lineage, progress=self.progress).router
        return predict_test(router, signals, split, baselines=self.options.baselines, progress=self.progress)[0]

    def cached(self, name: str) -> Path:
        """A folder of the cache; its path depends on the checkpoint, the activations and the baselines option."""
        if self.cache is None:
            raise InputError(
                "cache: got None, but the protocols cache their results; give a folder, for example cache='runs/cache'"
            )
        router = self.router.id or json.dumps(self.router.manifest, sort_keys=True)  # an unsaved router has no id
        key = sha256_strings([CACHE_FORMAT, router, self.signals.digest, str(self.options.baselines)])[:16]
        return self.cache / key / name

    def say(self, text: str) -> None:
        if self.progress:
            print(text, flush=True)

    def provenance(self, fitted: Mapping[str, FittedBaseline], about: Mapping[str, Any]) -> dict[str, Any]:
        encoders = [dataset.encoder for dataset in self.signals.activations.values()]
        names = ", ".join(f"{encoder.model} ({encoder.architecture}, {encoder.attention})" for encoder in encoders)
        return {
            **about,
            **provenance(self.signals),
            "encoder": names,
            "checkpoint": self.router.id,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "split": f"{self.fit.scheme}, seed {self.fit.seed}",
            "baselines": {name: dict(baseline.settings) for name, baseline in fitted.items()},
            "fit": self.router.manifest["fit"],
        }


def layer_rows(router: Router) -> list[dict[str, Any]]:
    """Scores of the checkpoint's layer search; `chosen` lists the positions of the targets that read the layer."""
    read = [router.manifest["target_layers"][name] for name in router.pool.names]
    return [
        row
        | {
            "chosen": [
                target
                for target, layers in enumerate(read)
                if [row["encoder"], column_name(row["pooling"], row["layer"])] in layers
            ]
        }
        for row in router.manifest.get("layer_scores", ())
    ]


def _encode_here(prompts: pa.Table, encoder: EncoderConfig, folder: Path) -> Activations:
    return prefill_prompts(prompts.select(["query_id", "prompt"]), encoder, folder, progress="prefill")


def _read_or_make(path: Path, predict: Callable[[], Predictions]) -> Predictions:
    """The predictions in `path`. If the file does not exist, `predict` computes them first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predict(), path)
    return read_predictions(path)
