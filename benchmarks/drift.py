"""Drift of real queries: false alarms on still streams, and delays on shifted ones.

For every split seed a router is fitted. Queries that are neither in the training nor in the test part are the usual
traffic, those of another outcomes table the shifted traffic. Streams are random orders of them. Novelty and features do
not depend on the trunk, so that the default fit trains hardly any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from prefill_router.cli import main
from prefill_router.drift.betting import Wealth, novelty_factors, wealth
from prefill_router.drift.energy import energy_test
from prefill_router.drift.psi import MODERATE, uniform_stability
from prefill_router.drift.ranks import held_out_values, online_p_values
from prefill_router.files import write_json
from prefill_router.locations import Location
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import load_pool
from prefill_router.prefill.dataset import read_activations
from prefill_router.progress import tqdm
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.join import Signals, join
from prefill_router.signals.layer_key import LayerStates
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

ALPHAS = (0.01, 0.05, 0.2)
SHARES = (1.0, 0.3, 0.1)  # of shifted queries after the change
SIZES = (200, 500, 2_000)  # decisions of a stability index and of an energy test (at most 500 of each sample)
WINDOW = 200  # decisions of an index that is looked at after every window


class DriftBenchmarkConfig(SignalsConfig):
    """Inputs of the fit, the shifted queries, and the numbers of streams."""

    other: Annotated[Location, Field(description="outcomes with the shifted queries, a Parquet file")]
    other_pool: Annotated[Location, Field(description="a pool of models of these outcomes, a YAML file")]
    other_activations: Annotated[Location, Field(description="activations of the shifted queries")]
    only: Annotated[str, Field(description="beginning of the benchmarks of the shifted queries")] = ""
    fit: FitConfig = FitConfig(
        scheme="75/10/15",
        trunk=TrunkConfig(members=1, kept=1, max_epochs=1),
        stack=(),
        margin=False,
        lengths="median",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1, description="split seeds, each with a router")] = (0, 1, 2)
    training: Annotated[
        int | None, Field(ge=100, description="training queries; the others are usual traffic; null: the split's")
    ] = None
    streams: Annotated[int, Field(ge=1, description="streams per seed and kind")] = 200
    change: Annotated[int, Field(ge=1, description="decisions before the shift")] = 500
    length: Annotated[int, Field(ge=1, description="decisions after the shift, at most")] = 3_000
    ramp: Annotated[int, Field(ge=1, description="decisions over which a gradual shift goes from 0 to 100 %")] = 1_000
    simulated: Annotated[int, Field(ge=0, description="simulated long streams; 0: none")] = 0


@dataclass(frozen=True)
class Inputs:
    """Of one fitted router: novelty and features of the usual and of the shifted queries.

    `references`: reference values of the alarm, of held-out training queries and of the test part.
    """

    held_out: int
    references: dict[str, np.ndarray]
    usual: np.ndarray
    other: np.ndarray
    usual_features: np.ndarray
    other_features: np.ndarray


def run(config: DriftBenchmarkConfig) -> str:
    """Measure false alarms and delays of the tests of drift; write OUTPUT/drift_benchmark.json."""
    pool, signals = load_signals(config)
    shifted = join(
        load_outcomes(config.other, load_pool(config.other_pool)), [read_activations(config.other_activations)]
    )
    rows = np.flatnonzero([name.startswith(config.only) for name in shifted.outcomes.benchmarks])
    found: list[dict[str, Any]] = []
    for seed in config.seeds:
        fit = config.fit.model_copy(update={"seed": seed})
        split = split_signals(signals, seed, fit.scheme)
        if config.training is not None:
            chosen = np.random.default_rng(seed).permutation(split.train)[: config.training]
            split = replace(split, train=np.sort(chosen))
        router = fit_router(signals, pool, split, fit, {"fit": fit.model_dump(mode="json")}, progress=True).router
        assert router.novelty is not None
        unseen = np.setdiff1d(np.arange(len(signals.outcomes)), np.concatenate([split.train, split.test]))
        inputs = Inputs(
            len(router.novelty.held_out),
            {
                "held-out training queries": held_out_values(len(router.novelty.held_out)),
                "test queries": novelty_of(router, signals, split.test),
            },
            novelty_of(router, signals, unseen),
            novelty_of(router, shifted, rows),
            features_of(router, signals, unseen),
            features_of(router, shifted, rows),
        )
        print(f"seed {seed}: {len(inputs.usual):,} usual, {len(inputs.other):,} shifted queries", flush=True)
        found.append(measure(inputs, config, np.random.default_rng(seed)))
    written = config.output / "drift_benchmark.json"
    long = simulated(config.simulated) if config.simulated else None
    write_json(written, {"config": config.model_dump(mode="json"), "seeds": found, "simulated": long})
    if long is not None:
        print(text([long]))
    print(text(found))
    return f"{len(config.seeds)} routers, {config.streams} streams of each kind; figures in {written}"


def states_of(signals: Signals, rows: np.ndarray) -> LayerStates:
    return lambda key: signals.states(key, rows)


def features_of(router: Router, signals: Signals, rows: np.ndarray) -> np.ndarray:
    return router.features(states_of(signals, rows))


def novelty_of(router: Router, signals: Signals, rows: np.ndarray) -> np.ndarray:
    assert router.novelty is not None
    states = states_of(signals, rows)
    return router.novelty([states(key) for key in router.layer_keys], router.projections)


def measure(inputs: Inputs, config: DriftBenchmarkConfig, rng: np.random.Generator) -> Any:
    """All figures of one router."""
    fixed = [
        wealth(novelty_factors(1 - rng.permutation(inputs.usual)), 0.01).log_wealth.max() for _ in range(config.streams)
    ]
    figures: dict[str, Any] = {}
    for name, reference in inputs.references.items():
        still = [alarm(reference, rng.permutation(inputs.usual), n) for n in tqdm(range(config.streams), desc="still")]
        highest = np.array([one.log_wealth.max() for one in still])
        figures[name] = {
            "queries": len(reference),
            "false_alarms": {f"{alpha:g}": float((highest >= -np.log(alpha)).mean()) for alpha in ALPHAS},
        }
        rising = np.minimum(np.arange(1, config.length + 1) / config.ramp, 1)
        shifts = {f"at share {share:g}": share for share in SHARES} | {f"rising over {config.ramp} decisions": rising}
        for shift, share in shifts.items():
            streams = [shifted_stream(inputs, config, share, np.random.default_rng(n)) for n in range(config.streams)]
            found = [alarm(reference, one, n) for n, one in enumerate(tqdm(streams, desc=shift))]
            figures[name][f"delay {shift}"] = {
                f"{alpha:g}": delay_figures([delay(one, config.change, alpha) for one in found]) for alpha in ALPHAS
            }
    return {
        "held_out": inputs.held_out,
        "usual": len(inputs.usual),
        "shifted": len(inputs.other),
        "shifted_median_novelty": float(np.median(inputs.other)),
        "usual_median_novelty": float(np.median(inputs.usual)),
        "reference": figures,
        "false_alarms_of_fixed_ranks": {f"{a:g}": float((np.array(fixed) >= -np.log(a)).mean()) for a in ALPHAS},
        "windows_above_0.1": window_looks(inputs, rng, config.streams),
        "index": {f"{share:g}": index_figures(inputs, share, rng) for share in (0.0, *SHARES)},
        "energy": {f"{share:g}": energy_figures(inputs, share, rng) for share in (0.0, *SHARES)},
    }


def simulated(streams: int, length: int = 10_000) -> dict[str, Any]:
    """Long streams of uniform distances: false alarms of online ranks, and of ranks among the reference alone."""
    rng, figures = np.random.default_rng(0), {}
    for n in (500, 2_000):
        highest: dict[str, list[float]] = {"online": [], "reference alone": []}
        for seed in range(streams):
            novelty = np.searchsorted(np.sort(rng.random(n)), rng.random(length)) / n
            alone = (n * (1 - novelty) + 1) / (n + 1)
            for name, p in (("online", online_p_values(novelty, held_out_values(n), seed)), ("reference alone", alone)):
                highest[name].append(wealth(novelty_factors(p), 0.01).log_wealth.max())
        figures[f"{n} held-out queries, {length} decisions"] = {
            f"{name}, alpha {alpha:g}": float((np.array(values) >= -np.log(alpha)).mean())
            for name, values in highest.items()
            for alpha in ALPHAS
        }
    return figures


def alarm(reference: np.ndarray, novelty: np.ndarray, seed: int) -> Wealth:
    return wealth(novelty_factors(online_p_values(novelty, reference, seed)), 0.01)


def shifted_stream(
    inputs: Inputs, config: DriftBenchmarkConfig, share: float | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Novelty of a stream; every query at most once, so that it ends when one of the two sources is used up.

    `share`: probability of a shifted query after the change, one number or one for each decision.
    """
    usual, other = rng.permutation(inputs.usual), rng.permutation(inputs.other)
    before, usual = usual[: config.change], usual[config.change :]
    is_other = rng.random(config.length) < share
    n = (np.cumsum(is_other) <= len(other)) & (np.cumsum(~is_other) <= len(usual))
    is_other = is_other[n]
    after = np.empty(len(is_other))
    after[is_other], after[~is_other] = other[: is_other.sum()], usual[: (~is_other).sum()]
    return np.concatenate([before, after])


def delay(found: Wealth, change: int, alpha: float) -> float:
    """Observations after the change until the alarm; infinite if there is none, at most 0 for a false alarm."""
    crossed = np.flatnonzero(found.log_wealth >= -np.log(alpha))
    return float(crossed[0] + 1 - change) if len(crossed) else np.inf


def delay_figures(delays: list[float]) -> dict[str, Any]:
    """Quantiles of the delay over streams without a false alarm; null if the stream ended before."""
    values = np.array(delays)
    true = np.sort(values[values > 0])
    q = [true[min(int(share * len(true)), len(true) - 1)] if len(true) else np.inf for share in (0.5, 0.1, 0.9)]
    return {
        "before": float((values <= 0).mean()),
        "found": float(np.isfinite(true).mean()) if len(true) else None,
        **dict(zip(("median", "q10", "q90"), [float(one) if np.isfinite(one) else None for one in q], strict=True)),
    }


def mixture(usual: np.ndarray, other: np.ndarray, share: float, n: int, rng: np.random.Generator) -> np.ndarray:
    m = round(share * n)
    return np.concatenate(
        [rng.choice(usual, n - m, replace=n - m > len(usual)), rng.choice(other, m, replace=m > len(other))]
    )


def window_looks(inputs: Inputs, rng: np.random.Generator, streams: int) -> dict[str, float]:
    """Share of still streams in which the index of one of its windows of WINDOW decisions is at least MODERATE."""
    plain = corrected = 0
    for _ in range(streams):
        parts = rng.permutation(inputs.usual)[: len(inputs.usual) // WINDOW * WINDOW].reshape(-1, WINDOW)
        looks = [uniform_stability(part, inputs.held_out) for part in parts]
        plain += any(one.plain >= MODERATE for one in looks)
        corrected += any(one.estimate >= MODERATE and one.p_value < 0.01 for one in looks)
    return {"windows": len(parts), "plain": plain / streams, "corrected": corrected / streams}


def index_figures(inputs: Inputs, share: float, rng: np.random.Generator, draws: int = 100) -> dict[str, Any]:
    """The index without bias over draws of each size: median, and how often it is an alert."""
    figures = {}
    for n in SIZES:
        found = [
            uniform_stability(mixture(inputs.usual, inputs.other, share, n, rng), inputs.held_out) for _ in range(draws)
        ]
        alerts = np.mean([one.estimate >= MODERATE and one.p_value < 0.01 for one in found])
        plain = np.median([one.plain for one in found])
        figures[str(n)] = {
            "plain": float(plain),
            "estimate": float(np.median([one.estimate for one in found])),
            "alerts": float(alerts),
        }
    return figures


def energy_figures(inputs: Inputs, share: float, rng: np.random.Generator, draws: int = 10) -> dict[str, Any]:
    """Usual queries in two halves: one is the reference, the other, mixed with shifted queries, is the traffic."""
    figures = {}
    for n in SIZES[:2]:
        found = []
        for _ in range(draws):
            order, m = rng.permutation(len(inputs.usual_features)), round(share * n)
            half = len(order) // 2
            live = inputs.usual_features[order[half : half + n - m]]
            new = inputs.other_features[rng.permutation(len(inputs.other_features))[:m]]
            reference = inputs.usual_features[order[: min(half, 2 * n)]]
            found.append(energy_test(reference, np.concatenate([live, new]), permutations=199))
        figures[str(n)] = {
            "coefficient": float(np.median([one.coefficient for one in found])),
            "alerts": float(np.mean([one.p_value <= 0.01 for one in found])),
        }
    return figures


def text(found: list[dict[str, Any]]) -> str:
    """A line per figure, one column per seed."""
    columns = [dict(leaves(one)) for one in found]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[column.get(name) for column in columns] for name in names]
    width = max(map(len, names))
    return "\n".join(
        f"{name:{width}}  " + "  ".join(f"{'none' if value is None else f'{value:.3g}':>8}" for value in row)
        for name, row in zip(names, rows, strict=True)
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of nested mappings with their paths."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from leaves(one, f"{path}, {name}" if path else str(name))
    else:
        yield path, value


if __name__ == "__main__":
    main(DriftBenchmarkConfig, run)
