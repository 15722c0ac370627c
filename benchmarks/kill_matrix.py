"""Kills the parts of running jobs with SIGKILL at random instants, and compares the outputs with undisturbed ones.

In: jobs and faults. A Ray cluster of three nodes runs on this machine: a head without CPUs, on which the driver is, and
two nodes. Faults: `driver` (the job's own process; the same command runs again), `worker` (a process with a Ray task),
`actor` (a process with an actor), `node` (all processes of a node; another one joins). Out, per job and fault: kills,
runs, rows that are missing or exist twice, the worst difference, files left over, and seconds lost per kill.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import Field

from benchmarks.kill_jobs import CONNECTIONS, Contents, Job, asked, make_jobs, start_models, worst_difference
from prefill_router.cli import main
from prefill_router.cluster import set_environment
from prefill_router.config import FrozenModel
from prefill_router.files import write_json
from prefill_router.locations import LocalPath

JobName = Literal["prefill", "sweep", "semantic", "collect"]
Fault = Literal["driver", "worker", "actor", "node"]
LIMIT_S = 240.0  # of a run, after which it counts as hung
GAP = 0.8  # instants are uniform over this share of an undisturbed run after its start, or after the last kill
RETRY_S = 0.5  # maximum time until the next try if no process with a task or an actor exists at the instant
PRELOADED = ["jobs.prefill", "jobs.collect", "tune.sweep", "tune.semantic", "transformers"]
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


class KillMatrixConfig(FrozenModel):
    """The cells of the matrix."""

    jobs: Annotated[tuple[JobName, ...], Field(min_length=1)] = ("prefill", "sweep", "semantic", "collect")
    faults: Annotated[tuple[Fault, ...], Field(min_length=1)] = ("driver", "worker", "actor", "node")
    instants: Annotated[int, Field(ge=1, description="kills per job and fault")] = 20
    kills_per_run: Annotated[int, Field(ge=1, description="kills at most before an output may finish")] = 5
    seed: Annotated[int, Field(ge=0, description="seed of the instants and of the choice of processes")] = 0
    seconds: Annotated[
        float, Field(gt=0, description="no further run of a cell starts after this time; its kills are then fewer")
    ] = 3600.0
    output: Annotated[LocalPath, Field(description="folder of inputs, which are made once, and outputs")] = Path(
        "runs/benchmarks/kill_matrix"
    )


@dataclass
class Cell:
    """Results of one job under one fault. `wrong` names what differs from an undisturbed run."""

    job: str
    fault: str
    kills: int = 0
    runs: int = 0
    repeated: int = 0
    worst_difference: float = 0.0
    asked_twice: int = 0
    seconds_lost: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        """The row of a Markdown table."""
        wrong = "; ".join(self.wrong) or "none"
        lost = f"{self.seconds_lost / max(self.kills, 1):.1f}"
        return (
            f"| {self.job} | {self.fault} | {self.kills} | {self.runs} | {self.repeated} | {self.worst_difference:.1e} "
            f"| {self.asked_twice if self.job == 'collect' else ''} | {lost} | {wrong} |"
        )


HEADER = (
    "| job | killed | kills | outputs | repeated rows | worst difference | asked again | seconds per kill | wrong |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Nodes:
    """The cluster. A killed node is replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            self.cluster.add_node(**NODE)

    def processes(self, title: str, head: bool = True) -> list[psutil.Process]:
        """Processes of Ray workers whose title matches, on all nodes or on those that may be killed."""
        found = []
        for node in [*self.cluster.worker_nodes, *([self.cluster.head_node] if head else [])]:
            for process in psutil.Process(self._raylet(node)).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if re.match(title, " ".join(process.cmdline())):
                        found.append(process)
        return found

    def kill_node(self, rng: random.Random) -> None:
        """Kills every process of a node other than the head at once, and adds a node."""
        node = rng.choice(sorted(self.cluster.worker_nodes, key=self._raylet))
        raylet = psutil.Process(self._raylet(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(**NODE)

    def _raylet(self, node: Any) -> int:
        pid: int = node.all_processes["raylet"][0].process.pid
        return pid


def run(config: KillMatrixConfig) -> str:
    """Kill drivers, workers, actors and nodes of running jobs at random instants; compare what they write."""
    folder = config.output.resolve()
    for name in config.jobs:
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    set_environment()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # tiny models and simulated signals
    with _models(folder) as url:
        jobs = make_jobs(folder, config.jobs, url)
        context = multiprocessing.get_context("forkserver")  # a driver starts without seconds of imports
        context.set_forkserver_preload(PRELOADED)
        nodes = Nodes()
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        try:
            cells = [cell for name, job in jobs.items() for cell in _cells(config, folder, nodes, context, name, job)]
        finally:
            nodes.cluster.shutdown()
    write_json(folder / "matrix.json", [asdict(cell) for cell in cells])
    print(HEADER, *(cell.row for cell in cells), sep="\n", flush=True)
    wrong = sum(bool(cell.wrong) for cell in cells)
    return f"{sum(cell.kills for cell in cells)} kills in {len(cells)} cells; {wrong} cells with a difference"


def _cells(config: KillMatrixConfig, folder: Path, nodes: Nodes, context: Any, name: str, job: Job) -> Iterator[Cell]:
    seconds, expected = _undisturbed(folder / name / "expected", context, job)
    print(f"{name}: undisturbed {seconds:.1f} s", flush=True)
    for fault in config.faults:
        if (fault == "worker" and job.worker is None) or (fault == "actor" and job.actor is None):
            continue
        cell, rng, started = Cell(name, fault), random.Random(f"{config.seed} {name} {fault}"), time.monotonic()
        while cell.kills < config.instants and time.monotonic() - started < config.seconds:
            output = folder / name / f"{fault}-{cell.runs}"
            most = min(config.kills_per_run, config.instants - cell.kills)
            asked_before, kills_before = asked(folder), cell.kills
            took = _disturbed(cell, output, nodes, context, job, rng, seconds, most)
            if cell.kills == kills_before:  # nothing was killed: the job takes less time than its first run
                seconds = min(seconds, took)
            if name == "collect":
                again = asked(folder) - asked_before - len(expected.exact)
                cell.asked_twice += again
                if again > (cell.kills - kills_before) * CONNECTIONS:
                    cell.wrong.append(f"{output.name}: {again} questions asked again")
            print(cell.row, flush=True)
            if cell.wrong:
                print(f"{output}: {cell.wrong[-1]}", flush=True)
                if cell.kills == kills_before:  # it fails without kills
                    break
        yield cell


def _undisturbed(output: Path, context: Any, job: Job) -> tuple[float, Contents]:
    started = time.monotonic()
    process = _start(context, job, output)
    process.join(LIMIT_S)
    if process.exitcode != 0:
        raise RuntimeError(f"the undisturbed run ended with {process.exitcode}; see {_log(output)}")
    return time.monotonic() - started, job.contents(output)


def _disturbed(
    cell: Cell, output: Path, nodes: Nodes, context: Any, job: Job, rng: random.Random, seconds: float, most: int
) -> float:
    """Runs the job with up to `most` kills until its output is finished, and adds the result to `cell`.

    Returns the seconds of the run.
    """
    expected = job.contents(output.parent / "expected")
    started, kills, wait = time.monotonic(), 0, rng.uniform(0, GAP * seconds)
    process = _start(context, job, output)
    while process.is_alive():
        process.join(wait if kills < most else LIMIT_S)
        if not process.is_alive():
            break
        if kills == most or time.monotonic() - started > LIMIT_S + most * seconds:
            cell.wrong.append(f"{output.name}: hung")
            process.kill()
            break
        if cell.fault == "driver":
            process.kill()
            process.join()
            process = _start(context, job, output)
        elif cell.fault == "node":
            nodes.kill_node(rng)
        elif not _kill_one(nodes.processes(job.worker if cell.fault == "worker" else job.actor), rng):  # type: ignore[arg-type]
            wait = rng.uniform(0, RETRY_S)
            continue
        kills += 1
        wait = rng.uniform(0, GAP * seconds)
    cell.kills += kills
    cell.runs += 1
    took = time.monotonic() - started
    cell.seconds_lost += took - seconds
    if process.exitcode != 0:
        cell.wrong.append(f"{output.name}: exit code {process.exitcode}; see {_log(output)}")
        return took
    found = job.contents(output)
    difference = worst_difference(found, expected)
    cell.repeated += found.repeated
    cell.worst_difference = max(cell.worst_difference, difference)
    if found.files != expected.files:
        cell.wrong.append(f"{output.name}: files {sorted(found.files ^ expected.files)}")
    if difference > 2e-3 or found.repeated:
        cell.wrong.append(f"{output.name}: difference {difference:.1e}, {found.repeated} repeated rows")
    return took


def _kill_one(processes: list[psutil.Process], rng: random.Random) -> bool:
    if not processes:
        return False
    with contextlib.suppress(psutil.Error):
        rng.choice(sorted(processes, key=lambda one: one.pid)).send_signal(signal.SIGKILL)
        return True
    return False


def _start(context: Any, job: Job, output: Path) -> Any:
    process = context.Process(target=_drive, args=(job.module, job.arguments(output), _log(output), dict(os.environ)))
    process.start()
    return process


def _drive(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Runs a job in this process; everything it prints goes to `log`."""
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _log(output: Path) -> Path:
    return output.parent / "logs" / f"{output.name}.log"


@contextlib.contextmanager
def _models(folder: Path) -> Iterator[str]:
    process, url = start_models(folder)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(KillMatrixConfig, run)
