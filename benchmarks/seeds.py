"""One pool over several split seeds: train and evaluate at each, then tables of means and paired differences.

Differences are paired by seed, the interval is Student's t over the seeds: it holds the variance of split and
training together. Everything is run in this process by the jobs' own functions.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field
from scipy.stats import t

from jobs import evaluate, train
from jobs.cli import main
from jobs.inputs import SignalsConfig
from prefill_router.files import read_json, write_parquet
from prefill_router.routing.fit import FitConfig

FIGURES = ("auc", "brier", "p_auccc", "mdp_auccc", "efficacy", "headroom_captured", "cost_saving",
           "routed_to_accuracy")


class SeedsConfig(SignalsConfig):
    """Inputs, how to fit, and the seeds."""

    fit: FitConfig = FitConfig()
    seeds: Annotated[tuple[int, ...], Field(min_length=2, description="split seeds, a YAML list")] = (0, 1, 2, 3, 4)
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples within each seed")] = 200


def run(config: SeedsConfig) -> str:
    """Train and evaluate over split seeds; print means, deviations and paired differences to the prefill router."""
    rows = []
    for seed in config.seeds:
        folder = config.output / f"seed{seed}"
        inputs = config.model_dump(include={"outcomes", "pool", "activations"}) | {"output": folder}
        if not (folder / "metrics.json").exists():
            fit = config.fit.model_copy(update={"seed": seed})
            print(train.run(train.TrainConfig(**inputs, fit=fit)), flush=True)
            print(evaluate.run(evaluate.EvaluateConfig(**inputs, checkpoint=folder / "checkpoint",
                                                       resamples=config.resamples)), flush=True)
        for router, figures in read_json(folder / "metrics.json")["routers"].items():
            rows.append({"seed": seed, "router": router, **{name: figures[name]["estimate"] for name in FIGURES}})
    table = pa.Table.from_pylist(rows)
    write_parquet(config.output / "seeds.parquet", table)
    print("\n".join(_markdown(rows, len(config.seeds))))
    return f"{len(config.seeds)} seeds in {config.output}"


def _markdown(rows: list[dict[str, float]], n: int) -> list[str]:
    routers = list(dict.fromkeys(row["router"] for row in rows))
    lines = ["| router | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    values = {router: np.array([[row[name] if row[name] is not None else np.nan for name in FIGURES]
                                for row in rows if row["router"] == router], dtype=float) for router in routers}
    for router in routers:
        mean, deviation = values[router].mean(axis=0), values[router].std(axis=0, ddof=1)
        cells = [f"{a:.4f} ± {b:.4f}" for a, b in zip(mean, deviation, strict=True)]
        lines.append(f"| {router} | " + " | ".join(cells) + " |")
    for router in routers[1:]:
        difference = values[routers[0]] - values[router]
        half = t.ppf(0.975, n - 1) * difference.std(axis=0, ddof=1) / np.sqrt(n)
        cells = [f"{a:+.4f} [{a - b:+.4f}, {a + b:+.4f}]" for a, b in zip(difference.mean(axis=0), half, strict=True)]
        lines.append(f"| {routers[0]} minus {router} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main(SeedsConfig, run)
