"""Measurements of a candidate for the gates: the trial of its checkpoint, its figures, and the comparison.

In: a registered version, the champion's number, the sources of figures and the policy. Out: `Measured`: the verdict and
the paired figures behind it. A figure that cannot be measured makes its gate `not measured`, with the reason; it never
ends the job. Knows nothing of aliases and of what is recorded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.experiments.predict_pair import predict_pair
from prefill_router.experiments.round_trip import decision_ms, request_ms, try_checkpoint
from prefill_router.files import read_json
from prefill_router.metrics import gates
from prefill_router.metrics.bootstrap import Interval, Json
from prefill_router.metrics.compare import FILES, read_runs
from prefill_router.metrics.gates import Gate, Verdict
from prefill_router.metrics.paired import CANDIDATE, CHAMPION, PairedFigures, paired_figures
from prefill_router.metrics.predictions import Predictions
from prefill_router.outcomes.splits import Split
from prefill_router.routing.router import Router
from prefill_router.workflows.gate_policy import GatePolicy, Latency
from prefill_router.workflows.inputs import SignalsConfig, check_adapters, load_signals

ROUTES = "loads, routes finite confidences, and is the same after a round trip"
FIGURES = ("auc", "brier", "p_auccc_exact", "headroom_captured")  # gates against the champion, by margin


@dataclass(frozen=True)
class Sources:
    """Where the figures come from. None: the latest tracked evaluation of the version."""

    evaluation: Path | None = None
    champion_evaluation: Path | None = None
    outcomes: Path | None = None
    activations: tuple[Path, ...] = ()
    trained_on: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The verdict, and what it is based on.

    `routes`: the checkpoint is intact and routes. `compared`: on which queries, in words; empty without a champion.
    """

    verdict: Verdict
    routes: bool
    paired: PairedFigures | None = None
    compared: str = ""

    def to_json(self) -> Json:
        return {
            **self.verdict.to_json(),
            "compared": self.compared,
            "paired": None if self.paired is None else self.paired.to_json(),
        }


def trial_gate(number: int) -> tuple[Gate, Router | None]:
    """The gate `checkpoint` of a version, and its router if it passes."""
    try:
        trial = try_checkpoint(registry.resolve(f"models:/{registry.NAME}/{number}"))
    except InputError as error:  # its files are missing or damaged in the store
        return gates.holds("checkpoint", ROUTES, str(error)), None
    return gates.holds("checkpoint", ROUTES, trial.problem), trial.router


def measure(number: int, checkpoint: str, champion: int | None, sources: Sources, policy: GatePolicy) -> Measured:
    """Runs every gate of the policy; those against the champion only if there is one."""
    trial, router = trial_gate(number)
    if router is None:
        return Measured(Verdict((trial,)), routes=False)
    with tempfile.TemporaryDirectory() as scratch:
        own = _tried(lambda: _evaluation(sources.evaluation, checkpoint, Path(scratch, CANDIDATE)))
        paired: PairedFigures | str = "there is no champion"
        compared, against = "", None
        if champion is not None:
            against = _tried(lambda: _load(champion))
            if isinstance(against, Router):
                found = _tried(lambda: _predictions(router, against, sources, own, Path(scratch)))
            else:
                found = against
            if isinstance(found, str):
                paired = found
            else:
                predictions, compared = found
                paired = _paired(predictions, policy)
        absolute = [*_latency(router, policy), *_absolute(own, paired, policy)]  # reads files of the scratch folder
    relative = (
        [] if champion is None else [_canary(number), _pool(router, against, policy), *relative_gates(paired, policy)]
    )
    return Measured(Verdict((trial, *absolute, *relative)), True, None if isinstance(paired, str) else paired, compared)


def _tried(act: Callable[[], Any]) -> Any:
    """The result, or the message of an InputError: the reason why something was not measured."""
    try:
        return act()
    except InputError as error:
        return str(error)


def _load(number: int) -> Router:
    gate, router = trial_gate(number)
    if router is None:
        raise InputError(f"the champion, version {number}, cannot be compared with: {gate.reason}")
    return router


def _evaluation(given: Path | None, checkpoint: str, target: Path) -> Path:
    """The folder of an evaluation of this checkpoint. Raises InputError if it is of another one, or there is none."""
    if given is None:
        found = registry.fetch_evaluation(checkpoint, FILES, target)
        if found is None:
            raise InputError(
                f"no evaluation of checkpoint {checkpoint} is tracked; run jobs.evaluate, or give --outcomes and "
                "--activations"
            )
        return found
    of = read_json(given / "provenance.json").get("checkpoint")
    if of != checkpoint:
        raise InputError(f"{given}: is the evaluation of checkpoint {of}, expected {checkpoint}")
    return given


def _predictions(
    candidate: Router, champion: Router, sources: Sources, own: Path | str, scratch: Path
) -> tuple[Predictions, str]:
    """Both routers on the same test queries, and in words on which."""
    if sources.outcomes is not None:
        return _predicted_here(candidate, champion, sources, scratch)
    if isinstance(own, str):
        raise InputError(own)
    theirs = _evaluation(sources.champion_evaluation, champion.id, scratch / CHAMPION)
    try:
        first, second = read_runs([theirs, own])
    except InputError as error:
        raise InputError(f"{error}; or compare on common queries and costs with --outcomes and --activations") from None
    predictions = first.predictions
    training = predictions.training or second.predictions.training
    routers = {
        CHAMPION: predictions.routers[first.main],
        CANDIDATE: second.predictions.routers[second.main],
    }
    return replace(predictions, routers=routers, training=training), (
        f"{len(predictions):,} test queries of both evaluations"
    )


def _predicted_here(candidate: Router, champion: Router, sources: Sources, scratch: Path) -> tuple[Predictions, str]:
    from prefill_router.pool import save_pool

    assert sources.outcomes is not None
    save_pool(candidate.pool, scratch / "pool.yaml")
    _, signals = load_signals(
        SignalsConfig(
            outcomes=sources.outcomes,
            pool=scratch / "pool.yaml",
            activations=sources.activations,
            output=scratch,
        )
    )
    pair = predict_pair(candidate, champion, signals, (sources.outcomes, *sources.trained_on))
    test = np.flatnonzero(np.isin(signals.outcomes.query_ids.astype(str), pair.predictions.query_ids.astype(str)))
    nothing = np.array([], dtype=np.int64)
    check_adapters(signals, Split(nothing, nothing, test))
    seen = f", without {pair.seen:,} that the champion was trained on" if pair.seen else ""
    models = len(pair.predictions.models)
    shared = f" and the {models} models of both pools" if models < len(candidate.pool.models) else ""
    return pair.predictions, f"{len(pair.predictions):,} test queries of the candidate{seen}{shared}"


def _paired(predictions: Predictions, policy: GatePolicy) -> PairedFigures | str:
    if len(predictions) < policy.min_queries:
        return f"{len(predictions):,} common test queries, the policy needs {policy.min_queries:,}"
    print(f"gates: {policy.resamples:,} resamples of {len(predictions):,} test queries", flush=True)
    return paired_figures(
        predictions,
        level=policy.level,
        n_resamples=policy.resamples,
        seed=policy.seed,
        min_benchmark=1 if policy.benchmarks is None else policy.benchmarks.min_queries,
    )


def _latency(router: Router, policy: GatePolicy) -> list[Gate]:
    wanted: list[tuple[str, Latency | None, Callable[[Router], Interval]]] = [
        ("decision_ms", policy.decision_ms, decision_ms),
        ("request_ms", policy.request_ms, request_ms),
    ]
    found = []
    for name, bound, act in wanted:
        if bound is None:
            continue
        figure = _tried(partial(act, router))
        if isinstance(figure, str):
            found.append(gates.not_measured(name, f"upper end below {bound.below:g}", figure, bound.required))
        else:
            found.append(gates.at_most(name, figure, bound.below, bound.required))
    return found


def _absolute(own: Path | str, paired: PairedFigures | str, policy: GatePolicy) -> list[Gate]:
    """Gates on the candidate's own figures: from its evaluation, AUC otherwise from the comparison."""
    figures = {} if isinstance(own, str) else read_json(own / "metrics.json")["routers"].get("prefill", {})
    found = []
    if (floor := policy.auc_floor) is not None:
        auc = _interval(figures.get("auc"))
        if auc is None and not isinstance(paired, str):
            auc = paired.figures["auc"].candidate
        missing = Interval(None, None, None, own if isinstance(own, str) else "the evaluation has no AUC")
        found.append(gates.at_least("auc_floor", auc or missing, floor.above, floor.required))
    if (ceiling := policy.flip_rate) is not None:
        flips = _interval(figures.get("robustness", {}).get("all", {}).get("flip_rate"))
        why = own if isinstance(own, str) else "the evaluation has no perturbed prompts (--perturbed-queries)"
        found.append(
            gates.at_most("flip_rate", flips or Interval(None, None, None, why), ceiling.below, ceiling.required)
        )
    return found


def _interval(figure: Json | None) -> Interval | None:
    return None if not figure else Interval(figure["estimate"], figure["lower"], figure["upper"], figure.get("reason"))


def _canary(number: int) -> Gate:
    """A server tags a version whose canary it stopped (docs/serving.md)."""
    state = registry.version_tags(number).get("rollout", "")
    stopped = state if state.startswith("stopped") else None
    return gates.holds("canary", "no server has stopped it as a canary", stopped)


def _pool(candidate: Router, champion: Router | str | None, policy: GatePolicy) -> Gate:
    rule = "has every model of the champion's pool"
    if not isinstance(champion, Router):
        return gates.not_measured("pool", rule, champion or "", True)
    names = set(candidate.pool.names) | set(policy.pool.may_remove)
    missing = [name for name in champion.pool.names if name not in names]
    return gates.holds("pool", rule, f"lacks {', '.join(missing)}; see pool.may_remove" if missing else None)


def relative_gates(paired: PairedFigures | str, policy: GatePolicy) -> list[Gate]:
    """Gates of the paired figures. Without a comparison each is not measured, for the same reason."""
    found = []
    for name in FIGURES:
        bound = getattr(policy, name)
        if bound is None:
            continue
        if isinstance(paired, str):
            found.append(gates.not_measured(name, f"worse by less than {bound.margin:g}", paired, bound.required))
        else:
            found.append(gates.non_inferior(name, paired.figures[name], bound.margin, paired.level, bound.required))
    if (bound := policy.benchmarks) is not None:
        if isinstance(paired, str):
            found.append(gates.not_measured("benchmarks", "no benchmark regresses", paired, bound.required))
        else:
            found.append(gates.no_regression(paired.benchmarks, bound.max_regression, bound.required))
    return found
