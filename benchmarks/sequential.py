"""Errors and delays of the sequential test by which a canary is stopped, on simulated outcomes.

False alarms: streams of conversations whose canary is as good as the live checkpoint, or worse by exactly the margin;
how many are ever called `broken` in any of `BANDS` bands, and by z-tests that are repeated at the same looks. In one
row both arms fail together for a while, which breaks the assumption of a constant mean. Delays: the canary's
conversations until a worse canary is `broken`. Outcomes are 0 or 1 and independent.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from scipy.stats import norm
from tqdm import tqdm

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath
from prefill_router.metrics.sequential import Counts, log_evidence
from serve.live import Rollout

BANDS = 4
# (rate of the live checkpoint, margin): errors and no decision of a good server; of a worse one; feedback; novelty
RATES = ((0.01, 0.02), (0.05, 0.02), (0.3, 0.05), (0.05, 0.1))
EXCESSES = (0.03, 0.05, 0.1, 0.2, 0.5, 0.9)
OUTAGE = 0.5  # error rate of both arms for a tenth of a stream
ELEMENTS = 2_000_000  # conversations of the canary in one array
LONGEST = 20_000  # conversations of the canary after which a search for a difference ends


class SequentialConfig(FrozenModel):
    """How many streams are simulated, and how long they are."""

    output: Annotated[LocalPath, Field(description="folder for sequential.json")] = Path("runs/benchmarks/rollout")
    streams: Annotated[int, Field(ge=100, description="streams per row")] = 2_000
    conversations: Annotated[int, Field(ge=100, description="conversations per stream, of both arms")] = 20_000
    every: Annotated[int, Field(ge=1, description="conversations between two looks")] = 50
    share: Annotated[float, Field(gt=0, lt=1, description="share of the canary")] = 0.1
    seed: Annotated[int, Field(ge=0, description="seed of the streams")] = 0


def run(config: SequentialConfig) -> str:
    """Simulate streams of outcomes; count false alarms and the conversations until a worse canary is stopped."""
    generator, alpha = np.random.default_rng(config.seed), Rollout().alpha
    figures: dict[str, list[dict[str, Any]]] = {"false_alarms": [], "delays": []}
    with tqdm(total=2 * len(RATES) + 2 * len(EXCESSES) + 1, desc="streams", mininterval=5) as bar:
        for at_margin in (False, True):
            ever, peeked = np.zeros((2, BANDS, config.streams), dtype=bool)
            for band, (rate, margin) in enumerate(RATES):
                worse = rate + at_margin * margin
                ever[band], peeked[band] = _ever_broken(generator, config, rate, worse, margin, alpha / BANDS)
                figures["false_alarms"].append(
                    {"live": rate, "canary": worse, "margin": margin, "alpha": alpha / BANDS}
                    | {"sequential": float(ever[band].mean()), "repeated_z": float(peeked[band].mean())}
                )
                bar.update()
            figures["false_alarms"].append(
                {"live": "any band", "canary": "at the margin" if at_margin else "equal", "alpha": alpha}
                | {"sequential": float(ever.any(0).mean()), "repeated_z": float(peeked.any(0).mean())}
            )
        rates = np.full(config.conversations // config.every, 0.01)
        rates[len(rates) // 2 :][: len(rates) // 10] = OUTAGE
        broken, repeated = _ever_broken(generator, config, rates, rates, 0.02, alpha / BANDS)
        figures["false_alarms"].append(
            {"live": "0.01, outage of both", "canary": "equal", "margin": 0.02, "alpha": alpha / BANDS}
            | {"sequential": float(broken.mean()), "repeated_z": float(repeated.mean())}
        )
        bar.update()
        for share in (0.05, 0.5):
            for excess in EXCESSES:
                found = _delays(generator, config.streams, share, 0.01, excess, 0.02, alpha / BANDS)
                quantiles = np.quantile(found, [0.1, 0.5, 0.9]).tolist()
                figures["delays"].append(
                    {"share": share, "live": 0.01, "excess": excess, "streams": len(found), "conversations": quantiles}
                )
                bar.update()
    write_json(config.output / "sequential.json", figures | {"config": config.model_dump(mode="json")})
    print(_tables(figures))
    worst = max(row["sequential"] / row["alpha"] for row in figures["false_alarms"])
    return f"false alarms at most {worst:.2f} of alpha; figures: {config.output / 'sequential.json'}"


def _ever_broken(
    generator: np.random.Generator,
    config: SequentialConfig,
    rate: float | np.ndarray,
    worse: float | np.ndarray,
    margin: float,
    alpha: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Per stream: whether it is ever called broken by the sequential test, and by repeated z-tests.

    `rate` and `worse`: means of live checkpoint and canary, of the stream or of each look.
    """
    looks = config.conversations // config.every
    size = (config.streams, looks)
    drawn = generator.binomial(config.every, config.share, size)
    n, live_n = drawn.cumsum(1).astype(float), (config.every - drawn).cumsum(1).astype(float)
    total = generator.binomial(drawn, worse).cumsum(1).astype(float)
    live_total = generator.binomial(config.every - drawn, rate).cumsum(1).astype(float)
    mean, live_mean = total / np.maximum(n, 1), live_total / np.maximum(live_n, 1)
    variance = mean * (1 - mean) / np.maximum(n, 1) + live_mean * (1 - live_mean) / np.maximum(live_n, 1)
    above = mean - live_mean - margin
    # from 100 conversations of the canary on, where a z-test is usually taken to hold
    peeked = np.asarray(((n >= 100) & (above > norm.isf(alpha) * np.sqrt(variance))).any(1))
    return np.asarray(_broken(live_n, live_total, n, total, margin, alpha).any(1)), peeked


def _broken(live_n: Counts, live_total: Counts, n: Counts, total: Counts, margin: float, alpha: float) -> np.ndarray:
    """Where the evidence is enough; it is computed only where the means differ by more than the margin."""
    candidates = total / np.maximum(n, 1) - live_total / np.maximum(live_n, 1) > margin
    found = np.zeros(n.shape, dtype=bool)
    counts = (live_n[candidates], live_total[candidates], n[candidates], total[candidates])
    found[candidates] = log_evidence(*counts, margin) >= math.log(1 / alpha)
    return found


def _delays(
    generator: np.random.Generator, streams: int, share: float, rate: float, excess: float, margin: float, alpha: float
) -> np.ndarray:
    """Per stream: the canary's conversations until it is broken; LONGEST if it is not. Looks after each of them.

    There are fewer streams than `streams` if they have to be long.
    """
    length = min(LONGEST, round(50 / (excess - margin) ** 1.7))  # several times as long as most delays
    n = np.arange(1.0, length + 1) * np.ones((min(streams, ELEMENTS // length), 1))
    live_n = np.floor(n * (1 - share) / share)
    total = generator.binomial(1, rate + excess, n.shape).cumsum(1).astype(float)
    steps = np.diff(live_n, axis=1, prepend=0).astype(int)
    live_total = generator.binomial(steps, rate).cumsum(1).astype(float)
    found = _broken(live_n, live_total, n, total, margin, alpha)
    return np.where(found.any(1), found.argmax(1) + 1, LONGEST)


def _tables(figures: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| live | canary | margin | alpha | ever broken | ever broken by repeated z-tests |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["false_alarms"]:
        cells = row["live"], row["canary"], row.get("margin", ""), row["alpha"], row["sequential"], row["repeated_z"]
        lines.append("| " + " | ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in cells) + " |")
    lines += ["", "| share | excess | conversations of the canary: 10 % | median | 90 % |", "|---|---|---|---|---|"]
    for row in figures["delays"]:
        cells = row["share"], row["excess"], *row["conversations"]
        lines.append("| " + " | ".join(f"{one:g}" if one < 1 else f"{one:.0f}" for one in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(SequentialConfig, run)
