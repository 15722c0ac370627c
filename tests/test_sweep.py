"""Sweeps: their files and runs, resumption after an interruption, reproduction of the winner, and the search space."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from builders import TwoEncoders

from benchmarks.kill_jobs import SPACE
from jobs import train
from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.files import read_json, read_yaml
from prefill_router.prefill.config import EncoderConfig
from prefill_router.reports.plots_sweep import _cut
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.sweeps.trials import Trial, best_trial, importance, load_trials
from tune import sweep
from tune.recorder import Halving
from tune.space import Range, SearchSpace, suggest
from tune.trial import SweepTrial

ROOT = Path(__file__).parents[1]
N_TRIALS = 5


@dataclass(frozen=True)
class Swept:
    folder: Path
    inputs: dict[str, object]
    store: str

    def config(self, output: Path, **options: object) -> sweep.SweepConfig:
        return sweep.SweepConfig.model_validate(
            {
                **self.inputs,
                "output": output,
                "space": self.folder / "space.yaml",
                "trials": N_TRIALS,
                "grace_epochs": 3,
                "baselines": False,
                "resamples": 10,
                **options,
            }
        )

    def runs(self, output: Path) -> list[tuple[str, dict[str, str]]]:
        """(status, tags) of the runs nested in the run of the sweep."""
        from mlflow import MlflowClient

        client = MlflowClient(self.store)
        experiment = client.get_experiment_by_name(registry.NAME)
        (parent,) = client.search_runs(
            [experiment.experiment_id], f"tags.job = 'sweep' and tags.key = '{read_json(output / 'sweep.json')['id']}'"
        )
        return [
            (run.info.status, dict(run.data.tags))
            for run in client.search_runs(
                [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
            )
        ]


@pytest.fixture(scope="module")
def swept(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A sweep of five trials over two simulated encoders, in FOLDER/sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        store = f"sqlite:///{folder / 'mlflow.db'}"
        patch.setenv("MLFLOW_TRACKING_URI", store)
        (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
        made = Swept(folder, TwoEncoders(n=300).write(folder / "inputs"), store)
        sweep.run(made.config(folder / "sweep"))
        yield made


def outcome(output: Path) -> list[tuple[object, ...]]:
    return [
        (trial.number, trial.parameters, trial.fit, trial.state, trial.epochs)
        for trial in load_trials(output / "trials")
    ]


def test_trials_are_nested_runs_and_the_version_of_the_winner_names_the_sweep(swept: Swept):
    output = swept.folder / "sweep"
    trials, record = load_trials(output / "trials"), read_json(output / "sweep.json")
    assert [trial.number for trial in trials] == list(range(N_TRIALS))
    assert all(trial.ended for trial in trials)
    runs = [tags for _, tags in swept.runs(output)]
    assert sorted(int(tags["trial"]) for tags in runs if tags["job"] == "trial") == list(range(N_TRIALS))
    assert sorted(tags["job"] for tags in runs if tags["job"] != "trial") == ["evaluate", "train"]
    assert {status for status, _ in swept.runs(output)} == {"FINISHED"}
    from mlflow import MlflowClient

    tags = MlflowClient(swept.store).get_model_version(registry.NAME, str(record["version"])).tags
    assert tags["sweep_run"] == record["run"]
    assert tags["sweep_trial"] == str(record["best"])
    assert tags["checkpoint_id"] == load_checkpoint(output / "checkpoint").id
    assert (output / "evaluation/report.html").exists()


def test_the_default_configuration_is_first_never_stopped_and_at_most_the_best(swept: Swept):
    trials = load_trials(swept.folder / "sweep/trials")
    assert trials[0].fit == FitConfig()
    assert trials[0].state == "finished"
    best = best_trial(trials, "auc")
    assert best.value("auc") >= trials[0].value("auc")


def test_best_yaml_reproduces_the_winner_bit_for_bit(swept: Swept, tmp_path: Path):
    output = swept.folder / "sweep"
    best = best_trial(load_trials(output / "trials"), "auc")
    config = read_yaml(output / "best.yaml", train.TrainConfig)
    assert config.fit == best.fit
    train.run(config.model_copy(update={"output": tmp_path}))
    for name in ("manifest.json", "checkpoint.safetensors", "pool.yaml"):
        assert (tmp_path / "checkpoint" / name).read_bytes() == (output / "checkpoint" / name).read_bytes()
    plain = config.fit.model_copy(update={"stack": ()})  # as in trials
    said = train.run(config.model_copy(update={"output": tmp_path / "plain", "fit": plain}))
    assert f"held-out AUC {best.value('auc'):.4f}, Brier {best.value('brier'):.4f}" in said


def test_a_killed_and_resumed_sweep_equals_an_uninterrupted_one(swept: Swept, tmp_path: Path):
    output = tmp_path / "killed"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(swept.config(output).model_dump(mode="json")))
    command = [sys.executable, "-m", "tune.sweep", "--config", str(tmp_path / "sweep.yaml")]
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}",
    }
    killed = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while not (output / "trials/0002.json").exists():
        assert killed.poll() is None, killed.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(load_trials(output / "trials")) < N_TRIALS
    subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert outcome(output) == outcome(swept.folder / "sweep")
    trials = sorted(int(tags["trial"]) for _, tags in swept.runs(output) if tags["job"] == "trial")
    assert trials == list(range(N_TRIALS))
    assert (output / "checkpoint/manifest.json").read_bytes() == (
        swept.folder / "sweep/checkpoint/manifest.json"
    ).read_bytes()


def ends_once(flag: Path) -> type:
    """A trial whose process ends when it is to run trial 2, the first time."""

    class EndsOnce(SweepTrial):
        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if new_config["number"] == 2 and not flag.exists():
                flag.touch()
                os._exit(1)
            return super().reset_config(new_config)

    return EndsOnce


def test_a_trial_whose_process_ends_before_it_starts_runs_again(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sweep, "SweepTrial", ends_once(tmp_path / "ended"))
    sweep.run(swept.config(tmp_path / "sweep", trials=4, concurrent=1))
    assert "trials whose process ended: 1; they run again" in capfd.readouterr().out
    trials = load_trials(tmp_path / "sweep/trials")
    assert [trial.number for trial in trials if trial.ended] == [0, 1, 2, 3]
    expected = {trial.number: trial for trial in load_trials(swept.folder / "sweep/trials")}
    assert all(trial.epochs[:3] == expected[trial.number].epochs[:3] for trial in trials[:3])


def test_a_sweep_resumes_only_on_request_and_with_the_same_settings(swept: Swept, tmp_path: Path):
    with pytest.raises(InputError, match="holds a sweep; continue it with --resume"):
        sweep.run(swept.config(swept.folder / "sweep"))
    for options in ({"seed": 1}, {"objective": "brier"}, {"space": None}):
        with pytest.raises(InputError, match=f"resume: {next(iter(options))} differs from the sweep in"):
            sweep.run(swept.config(swept.folder / "sweep", resume=True, **options))


def test_trials_that_no_node_has_the_cpus_for_are_refused(swept: Swept, tmp_path: Path):
    with pytest.raises(InputError, match="cpus_per_trial: got 64, no node has more than 4"):
        sweep.run(swept.config(tmp_path, cpus_per_trial=64))


def test_an_error_in_tracking_ends_the_sweep_and_the_runs_of_its_trials(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(self: registry.Run, steps: object) -> None:
        raise RuntimeError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(registry.Run, "log_history", fails)
        with pytest.raises(RuntimeError, match="the store is gone"):
            sweep.run(swept.config(tmp_path / "failed", trials=2))
    assert [trial.state for trial in load_trials(tmp_path / "failed/trials")] == ["running"]
    assert [(status, tags["job"]) for status, tags in swept.runs(tmp_path / "failed")] == [("KILLED", "trial")]


def test_a_finished_sweep_takes_more_trials(swept: Swept, tmp_path: Path):
    shutil.copytree(swept.folder / "sweep", tmp_path / "more")
    before = outcome(tmp_path / "more")
    sweep.run(swept.config(tmp_path / "more", trials=N_TRIALS + 2, resume=True, concurrent=2))
    after = outcome(tmp_path / "more")
    assert after[:N_TRIALS] == before
    assert len(after) == N_TRIALS + 2
    assert f"--trials {N_TRIALS + 2} " in (tmp_path / "more/sweep.html").read_text()


def test_the_page_shows_every_trial_and_the_commands(swept: Swept):
    page = (swept.folder / "sweep/sweep.html").read_text()
    assert page.count("<svg") == 5
    threads = os.environ["OMP_NUM_THREADS"]  # bits differ between numbers of threads
    assert f"OMP_NUM_THREADS={threads} python -m jobs.train --config" in page
    assert f"OMP_NUM_THREADS={threads} python -m tune.sweep" in page
    assert "--baselines False --resamples 10 " in page
    for number in range(N_TRIALS):
        assert f"trial {number}, " in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_axis_labels_are_shortened_to_their_width():
    assert _cut("fisher", 9) == "fisher"
    assert _cut("Qwen/Qwen3-0.6B", 10) == "Qwen3-0.6B"
    assert _cut("sentence-transformers/all-MiniLM-L6-v2", 9) == "all-Mini…"


# The search space and the sampler, without Ray.

ENCODERS = {"a" * 16: EncoderConfig(model="a"), "b" * 16: EncoderConfig(model="b")}


def play(space: SearchSpace, n: int, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(n):
        base = FitConfig(seed=seed)
        found = suggest(space, trials, "auc", base, 1)
        if found is None:
            break
        value = -abs(found["dropout"] - 0.3)
        trials.append(
            Trial(
                number=number,
                parameters=found,
                fit=space.fit_config(found, base),
                state="stopped" if number % 3 else "finished",
                epochs=({"auc": value},) * 2,
            )
        )
    return trials


def test_the_sampler_is_deterministic_and_improves():
    space = SearchSpace().resolve(ENCODERS)
    trials = play(space, 40)
    assert trials == play(space, 40)
    assert trials != play(space, 40, seed=1)
    distance = [abs(trial.parameters["dropout"] - 0.3) for trial in trials]
    assert np.mean(distance[-10:]) < np.mean(distance[:10]) / 2
    shares = importance(trials, "auc")
    assert next(iter(shares)) == "dropout"
    assert sum(shares.values()) == pytest.approx(1)


def test_parameters_and_configurations_convert_to_each_other():
    maps = ({"small": "a", "large": "b"},)
    space = SearchSpace(
        mode=("auto", "single", "per_model"),
        maps=maps,
        strategy=("cv", "fixed"),
        fixed=("mean_L2", "last_L4"),
        widths=((), (256,), (256, 128)),
        members=(2, 10),
    ).resolve(ENCODERS)
    for trial in play(space, 30):
        assert trial.fit.trunk.kept <= trial.fit.trunk.members
        if trial.parameters["kept"] <= trial.fit.trunk.members:
            assert space.parameters_of(trial.fit) == trial.parameters
        choice = trial.fit.model_copy(update={"trunk": FitConfig().trunk, "calibrator": "pooled"})
        assert choice in space.layer_choices(FitConfig())
    assert space.parameters_of(FitConfig(components=7)) == {}
    assert space.parameters_of(FitConfig()) != {}


def small_space(**options: object) -> SearchSpace:
    """A space with the first choice of every parameter, except for `options`."""
    return SearchSpace(
        **{
            name: (field.default[0],)
            for name, field in SearchSpace.model_fields.items()
            if isinstance(field.default, tuple) and field.default
        }
        | {"dropout": (0.1, 0.3), "weight_decay": (0.0,), "learning_rate": (1e-3,)}
        | options
    ).resolve(ENCODERS)


def test_a_small_space_is_searched_completely():
    assert len(play(small_space(learning_rate=(1e-3, 1e-2)), 10)) == 4
    larger = small_space(components=(32, 64, 128), dropout=(0.1, 0.2, 0.3), learning_rate=(1e-3, 1e-2))
    assert len(play(larger, 40)) == 18


def test_choices_with_the_same_fit_are_one_configuration():
    assert len(play(small_space(members=(3,), kept=(3, 5, 10)), 10)) == 2  # `kept` is at most `members`


def test_a_space_says_what_is_wrong_with_it(tmp_path: Path):
    for text, said in (
        ("dropout: {low: 0.5, high: 0.2}", "low must be below high"),
        ("depth: [1]", "depth"),
        ("mode: [per_model]", "per_model needs at least one mapping"),
        ("dropout: {low: 0.2, high: 1.2}", r"dropout: 1\.2 is out of bounds"),
        ("weight_decay: {low: 0, high: .inf}", "weight_decay.*high: Input should be a finite number"),
        ("learning_rate: [0]", r"learning_rate: 0\.0 is out of bounds"),
        ("widths: [[256, 0]]", r"widths: \(256, 0\) is out of bounds"),
        ("strategy: [fixed]\nfixed: [layer4]", "fixed: .*'layer4'"),
        ("strategy: [fixed]", "strategy fixed needs at least one layer"),
    ):
        (tmp_path / "space.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            read_yaml(tmp_path / "space.yaml", SearchSpace)
    assert Range(low=0, high=0.5) == SearchSpace.model_validate({"dropout": {"low": 0, "high": 0.5}}).dropout


def test_a_resumed_scheduler_has_the_state_of_an_uninterrupted_one():
    def scheduler() -> Halving:
        return Halving(metric="auc", mode="max", max_t=13, grace_period=2, reduction_factor=2)

    rng, trials = np.random.default_rng(0), []
    uninterrupted = scheduler()
    for number in range(30):
        quality, epochs, state = rng.random(), [], "finished"
        it = SimpleNamespace(trial_id=str(number), config={"number": number})
        uninterrupted.on_trial_add(None, it)
        for epoch in range(1, 13):
            epochs.append({"auc": quality + epoch / 100})
            result = {"training_iteration": epoch, **epochs[-1]}
            if epoch < 12 and uninterrupted.on_trial_result(None, it, result) == "STOP":
                state = "stopped"
                break
        uninterrupted.on_trial_complete(None, it, result)
        trials.append(Trial(number=number, parameters={}, fit=FitConfig(), state=state, epochs=tuple(epochs)))
    assert {trial.state for trial in trials} == {"finished", "stopped"}
    resumed = scheduler()
    resumed.remember(trials, "auc")
    assert resumed.debug_string().split("\n")[1:] == uninterrupted.debug_string().split("\n")[1:]
