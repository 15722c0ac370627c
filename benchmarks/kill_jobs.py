"""The four jobs of the kill matrix on tiny inputs: their commands, their processes, and what a finished output holds.

In: a folder. Out: inputs, the arguments of a job for an output folder, and `Contents` of an output, to compare with
those of an undisturbed run. Knows neither clusters nor kills (benchmarks/kill_matrix.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from prefill_router.files import read_json
from prefill_router.prefill.dataset import read_activations

ROOT = Path(__file__).parents[1]
PROMPTS, PROMPTS_PER_SHARD = 600, 4
QUESTIONS, MODELS, CONNECTIONS = 40, ("share-0.9", "share-0.5"), 4
TRIALS, GRACE_EPOCHS = 4, 3
SPACE = {
    "layers_per_target": [1],
    "components": [2, 4],
    "strategy": ["fisher"],
    "pooling": [None],
    "widths": [[8], [16]],
    "members": [3],
    "kept": [2],
    "max_epochs": [12],
    "batch_size": [64],
    "learning_rate": {"low": 0.003, "high": 0.03},
}
NETWORK = {"widths": [8], "members": 2, "kept": 1, "max_epochs": 6, "learning_rate": 0.01}
GRID = [
    *({"family": "embedding", "router": "knn", "settings": {"k": k}} for k in (5, 10, 20, 40)),
    {"family": "embedding", "router": "logistic"},
    {"family": "embedding", "router": "network", "settings": NETWORK},
]
FIT = {
    "components": 4,
    "strategy": "fisher",
    "trunk": {"widths": [16], "learning_rate": 0.01, "members": 3, "kept": 2, "max_epochs": 8},
}


@dataclass(frozen=True)
class Contents:
    """What an output holds: values by row, `exact` of any type and `numbers` to compare within rounding; its files,
    without the parts of names that differ between runs; and the number of rows that exist more than once."""

    exact: dict[str, Any]
    numbers: dict[str, np.ndarray]
    files: frozenset[str]
    repeated: int = 0


@dataclass(frozen=True)
class Job:
    """A job: module, arguments, `contents` of a finished output, and the titles of its Ray tasks and actors; None: it
    has none."""

    module: str
    arguments: Callable[[Path], list[str]]
    contents: Callable[[Path], Contents]
    worker: str | None
    actor: str | None


def make_jobs(folder: Path, names: tuple[str, ...], url: str) -> dict[str, Job]:
    """Writes the inputs of the jobs `names` below `folder`, unless they are there. `url`: the models that collect
    asks."""
    makers = {"prefill": _prefill, "sweep": _sweep, "semantic": _semantic, "collect": lambda at: _collect(at, url)}
    return {name: makers[name](folder / "inputs" / name) for name in names}


def start_models(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A stub server whose answers take about 0.6 s; every answer is a line of `folder`/answers.jsonl."""
    port = folder / "port"
    port.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/stub_models.py", port, folder / "answers.jsonl", "1.0", "slow"]
    )
    while not port.exists():
        if process.poll() is not None:
            raise RuntimeError("tests/stub_models.py ended")
        time.sleep(0.05)
    return process, f"http://127.0.0.1:{port.read_text()}/v1"


def asked(folder: Path) -> int:
    """Number of answers that the models have sent."""
    path = folder / "answers.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def worst_difference(found: Contents, expected: Contents) -> float:
    """The largest difference of numbers, relative to the larger of 1 and the expected magnitude; inf if anything else
    differs."""
    if found.exact != expected.exact or found.numbers.keys() != expected.numbers.keys():
        return float("inf")
    worst = 0.0
    for name, want in expected.numbers.items():
        got = found.numbers[name]
        if got.shape != want.shape or not np.array_equal(np.isnan(got), np.isnan(want)):
            return float("inf")
        gaps = np.abs(got - want) / np.maximum(np.abs(want), 1)
        worst = max(worst, float(np.nan_to_num(gaps).max(initial=0.0)))
    return worst


def _prefill(folder: Path) -> Job:
    model, ids = folder / "model", [f"q{row:04}" for row in range(PROMPTS)]
    if not (folder / "in.parquet").exists():
        from tiny_models import prompts, save_model

        save_model("gpt2", model)
        pq.write_table(pa.table({"query_id": ids, "prompt": prompts(PROMPTS, seed=3)}), folder / "in.parquet")

    def contents(output: Path) -> Contents:
        dataset = read_activations(output)
        stored = pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("*.parquet")))
        counts = Counter(stored.column("query_id").to_pylist())
        rows = dataset.rows(ids)
        numbers = {name: np.asarray(rows.column(name).to_pylist(), np.float64) for name in dataset.columns}
        digests = dict(zip(ids, rows.column("tokens_digest").to_pylist(), strict=True))
        return Contents({"rows": sorted(counts), "digests": digests}, numbers, _files(output), _repeated(counts))

    def arguments(output: Path) -> list[str]:
        return [
            *["--input", str(folder / "in.parquet"), "--output", str(output), "--encoder.model", str(model)],
            *["--rows-per-shard", str(PROMPTS_PER_SHARD), "--actors", "2"],
        ]

    return Job(
        "jobs.prefill",
        arguments,
        contents,
        "ray::(?!MapWorker|IDLE|Attempts|_StatsActor|Autoscaling|DashboardAgent|RuntimeEnvAgent)",
        "ray::MapWorker",
    )


def _sweep(folder: Path) -> Job:
    inputs = _signals(folder)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    options = {
        "space": folder / "space.yaml",
        "trials": TRIALS,
        "grace_epochs": GRACE_EPOCHS,
        "baselines": False,
        "resamples": 10,
    }
    (folder / "sweep.yaml").write_text(_as_yaml(inputs | options))

    def contents(output: Path) -> Contents:
        from prefill_router.sweeps.trials import load_trials

        trials = load_trials(output / "trials")
        # When the scheduler stops a trial depends on the order in which trials end: the first epochs are compared.
        exact = {
            "trials": [(one.number, one.parameters, one.fit.model_dump(mode="json"), one.ended) for one in trials],
            "best": read_json(output / "sweep.json")["best"],
            "checkpoint": (output / "checkpoint" / "manifest.json").read_text(),
        }
        numbers = {
            f"trial {one.number} {name}": np.asarray([epoch[name] for epoch in one.epochs[:GRACE_EPOCHS]], np.float64)
            for one in trials
            for name in (one.epochs[0] if one.epochs else {})
        }
        return Contents(exact, numbers, _files(output))

    def arguments(output: Path) -> list[str]:
        return ["--config", str(folder / "sweep.yaml"), "--output", str(output), "--resume"]

    return Job("tune.sweep", arguments, contents, None, "ray::(SweepTrial|.*Trial)")


def _semantic(folder: Path) -> Job:
    inputs = _signals(folder)
    (folder / "grid.yaml").write_text(yaml.safe_dump({"configurations": GRID}))
    (folder / "prefill.yaml").write_text(_as_yaml(inputs | {"output": folder, "fit": FIT}))
    options = {
        "grid": folder / "grid.yaml",
        "prefill": folder / "prefill.yaml",
        "best": 2,
        "seeds": 2,
        "unseen": 0,
        "resamples": 10,
    }
    (folder / "semantic.yaml").write_text(_as_yaml(inputs | options))

    def contents(output: Path) -> Contents:
        grid = read_json(output / "grid.json")
        metrics = read_json(output / "evaluation" / "metrics.json")
        numbers = _numbers({"grid": grid["configurations"], "evaluation": metrics["routers"]})
        exact = {"order": [row["name"] for row in grid["configurations"]], "failed": grid["failed"]}
        return Contents(exact, numbers, _files(output))

    def arguments(output: Path) -> list[str]:
        return ["--config", str(folder / "semantic.yaml"), "--output", str(output)]

    return Job("tune.semantic", arguments, contents, "ray::run_task", None)


def _collect(folder: Path, url: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"question": f"What is {one} + {one * 7 % 13}?", "kind": "numeric", "answer": one + one * 7 % 13}
        for one in range(QUESTIONS)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    models = [
        {"name": name, "input_usd_per_mtok": 1, "output_usd_per_mtok": 2, "endpoint": {"base_url": url}}
        for name in MODELS
    ]
    (folder / "pool.yaml").write_text(yaml.safe_dump({"models": models}))

    def contents(output: Path) -> Contents:
        rows = pq.read_table(output / "outcomes.parquet").to_pylist()
        counts = Counter((row["query_id"], row["model"]) for row in rows)
        exact = {f"{row['query_id']} {row['model']}": row["correct"] for row in rows}
        return Contents(exact, {}, _files(output), _repeated(counts))

    def arguments(output: Path) -> list[str]:
        return [
            *["--pool", str(folder / "pool.yaml"), "--benchmarks", f"[{folder / 'sums.jsonl'}]"],
            *["--output", str(output), "--connections", str(CONNECTIONS), "--reasoning-effort", "null"],
        ]

    return Job("jobs.collect", arguments, contents, "ray::_ask", "ray::Counting")


def _signals(folder: Path) -> dict[str, Any]:
    """Outcomes, pool and activations of two simulated encoders."""
    if not (folder / "pool.yaml").exists():
        from builders import TwoEncoders

        TwoEncoders(n=300).write(folder)
    return {
        "outcomes": folder / "outcomes.parquet",
        "pool": folder / "pool.yaml",
        "activations": (folder / "a", folder / "b"),
    }


def _numbers(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """The numbers in a JSON value by their path, without times."""
    if isinstance(value, dict):
        parts = {key: part for key, part in value.items() if "seconds" not in key}
    elif isinstance(value, list):
        parts = dict(enumerate(value))
    else:
        return {name: np.asarray(value, np.float64)} if isinstance(value, int | float) else {}
    return {path: number for key, part in parts.items() for path, number in _numbers(part, f"{name}/{key}").items()}


def _files(output: Path) -> frozenset[str]:
    """The files below a folder. Names that every run chooses anew are their suffix: shards, logs and cached answers."""
    names = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    names = [re.sub(r"[^/]+(\.parquet|\.eval)$", r"*\1", name) if "outcomes" not in name else name for name in names]
    return frozenset(re.sub(r"^cache/.*", "cache/*", name) for name in names)


def _repeated(counts: Counter[Any]) -> int:
    return sum(count - 1 for count in counts.values())


def _as_yaml(values: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump({name: plain(value) for name, value in values.items()})
