"""`--dry-run` of every job: it says what the run would do, changes nothing, and has the errors of the run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from builders import QUICK, TwoEncoders
from pydantic import BaseModel, Field

import jobs
import tune
from prefill_router import cli
from prefill_router.config import FrozenModel
from prefill_router.dry_run import describe_output, places, report
from prefill_router.errors import InputError
from prefill_router.locations import Location, location
from prefill_router.outcomes.sample import write_sample

JOBS = [
    f"{package.__name__}.{one.name}"
    for package in (jobs, tune)
    for one in pkgutil.iter_modules(package.__path__)
    if "__main__" in (Path(package.__path__[0]) / f"{one.name}.py").read_text()
]
PROGRAMS = [*JOBS, "serve"]
OUTCOMES, POOL = "sample/outcomes.parquet", "sample/pool.yaml"
SIGNALS = ["--outcomes", "two/outcomes.parquet", "--pool", "two/pool.yaml", "--activations", "[two/a, two/b]"]
# Arguments of jobs whose inputs are cheap to make, and words of the dry run.
CHEAP: dict[str, tuple[list[str], str]] = {
    "jobs.adapt": (["--outcomes", OUTCOMES, "--pool", POOL, "--output", "out"], "424 queries through smollm2"),
    "jobs.demo": (["--output", "out"], "with smollm2 and 800 simulated queries"),
    "jobs.features": (["--input", OUTCOMES, "--output", "out"], "500 of 500 prompts to compute"),
    "jobs.labels": (["--outcomes", OUTCOMES, "--output", "out"], "2,981 labels of all models"),
    "jobs.prefill": (["--input", OUTCOMES, "--output", "out", "--encoder.model", "minilm"], "3.0 MiB to write"),
    "jobs.probe": ([*SIGNALS, "--output", "out"], "4 layers x 3 targets x 1 k"),
    "jobs.train": ([*SIGNALS, "--output", "out"], "writes checkpoint: out/checkpoint"),
    "tune.semantic": ([*SIGNALS, "--output", "out"], "at most"),
    "tune.sweep": ([*SIGNALS, "--output", "out", "--trials", "7"], "7 trials, 0 have ended"),
    "serve": (["--checkpoint", "models:/prefill-router@champion"], "which is not asked now"),
}
# Jobs without a cheap input, whose error for a missing one is that of the run.
MISSING: dict[str, list[str]] = {
    **{
        name: ["--outcomes", "none.parquet", "--pool", POOL, "--output", "out"]
        for name in ("jobs.adapt", "jobs.labels")
    },
    **{
        name: ["--input", "none.parquet", "--output", "out"]
        for name in ("jobs.features", "jobs.prefill", "jobs.import")
    },
    **{
        name: ["--outcomes", OUTCOMES, "--pool", POOL, "--activations", "none", "--output", "out"]
        for name in ("jobs.probe", "jobs.train", "tune.sweep", "tune.semantic")
    },
    "jobs.compare": ["none", "other", "--output", "out"],
    "jobs.learn": ["--log", "none", "--output", "out.parquet"],
    "jobs.register": ["--checkpoint", "none"],
    "jobs.replay": ["--log", "none", "--checkpoint", "none", "--output", "out"],
    "tune.summary": ["--sweep", "none"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in sample, and outcomes with the activations of two encoders."""
    folder = tmp_path_factory.mktemp("inputs")
    write_sample(folder / "sample", n_queries=500)
    TwoEncoders().write(folder / "two")
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the inputs, in which caches and databases would appear too."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def program(name: str) -> tuple[type[BaseModel], Callable[[Any], str], dict[str, Any]]:
    """What the job gives to `prefill_router.cli.main`: configuration, function, and further arguments."""
    module = importlib.import_module("serve.__main__" if name == "serve" else name)
    last = ast.parse(Path(str(module.__file__)).read_text()).body[-1]
    assert isinstance(last, ast.If)
    given: list[Any] = []
    names = {**vars(module), "main": lambda kind, run, **more: given.extend((kind, run, more))}
    exec(compile(ast.Module(last.body, []), name, "exec"), names)
    return tuple(given)


def ended(capsys: pytest.CaptureFixture[str], name: str, *argv: str) -> tuple[Any, str, str]:
    """The exit code, standard output and standard error."""
    kind, run, more = program(name)
    with pytest.raises(SystemExit) as end:
        cli.main(kind, run, argv, **more)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of modification of everything in a folder."""
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def ray_runs() -> bool:
    """Whether Ray runs in this process; an earlier test may have started it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_job_has_a_dry_run_with_a_plan(name: str):
    kind, _, more = program(name)
    assert issubclass(kind, FrozenModel)
    assert more.get("plan") is not None


@pytest.mark.parametrize("name", sorted(CHEAP))
def test_a_dry_run_says_what_it_would_do_and_changes_nothing(name: str, work: Path, capsys: pytest.CaptureFixture[str]):
    argv, words = CHEAP[name]
    before, ran = tree(work), ray_runs()
    code, out, err = ended(capsys, name, *argv, "--dry-run")
    assert (code, err) == (0, "")
    assert words in out
    assert out.splitlines()[-1] == "job: dry run: nothing was written, started or asked"
    for place in places(cli.parse(program(name)[0], "", argv)):
        assert f"{'writes' if place.written else 'reads'} {place.field}: {place.path}" in out
    assert tree(work) == before
    assert ray_runs() == ran


@pytest.mark.parametrize("name", sorted(MISSING))
def test_a_missing_input_gives_the_error_of_the_run(name: str, work: Path, capsys: pytest.CaptureFixture[str]):
    before = tree(work).keys()
    argv = MISSING[name]
    code, _, err = ended(capsys, name, *argv, "--dry-run")
    assert code == 2
    assert tree(work).keys() == before
    assert ended(capsys, name, *argv)[::2] == (code, err)


def test_a_sweep_that_would_be_refused_is_refused(work: Path, capsys: pytest.CaptureFixture[str]):
    (work / "out").mkdir()
    (work / "out/sweep.json").write_text("{}")
    code, _, err = ended(capsys, "tune.sweep", *SIGNALS, "--output", "out", "--dry-run")
    assert (code, err) == (
        2,
        "job: error: output: out holds a sweep; continue it with --resume, or choose another folder\n",
    )


def test_prefill_counts_what_is_left_and_refuses_another_folder(work: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--input", "two/outcomes.parquet", "--encoder.model", "minilm", "--dry-run", "--output"]
    assert "0 of 400 prompts to encode" in ended(capsys, "jobs.prefill", *argv, "two/a")[1]
    (work / "two/a/local-000000.parquet").unlink(missing_ok=True)
    code, _, err = ended(capsys, "jobs.prefill", *argv, "sample")
    assert code == 2
    assert "the folder is not empty and holds no activations dataset" in err


@pytest.mark.train
def test_an_evaluation_says_its_queries_and_fits(work: Path, capsys: pytest.CaptureFixture[str]):
    from prefill_router.outcomes.table import load_outcomes
    from prefill_router.pool import load_pool
    from prefill_router.prefill.dataset import read_activations
    from prefill_router.routing.config import FitConfig
    from prefill_router.signals.join import join
    from prefill_router.workflows.train import fit

    pool = load_pool(work / "two/pool.yaml")
    signals = join(
        load_outcomes(work / "two/outcomes.parquet", pool), [read_activations(work / "two" / x) for x in "ab"]
    )
    fit(signals, pool, FitConfig(components=4, trunk=QUICK)).save(work / "checkpoint")
    before = tree(work)
    argv = [*SIGNALS, "--checkpoint", "checkpoint", "--output", "out", "--seeds", "3", "--dry-run"]
    code, out, _ = ended(capsys, "jobs.evaluate", *argv)
    assert code == 0
    assert "on 60 test queries of 400, 1,000 resamples, 2 further fits for seeds, the control trunks" in out
    assert tree(work) == before


class Part(FrozenModel):
    table: Location | None = None
    log: Annotated[Location | None, Field(json_schema_extra={"written": True})] = None


class Config(FrozenModel):
    output: Location
    several: tuple[Location, ...] = ()
    named: dict[str, Part] = {}
    part: Part = Part()


def test_locations_of_nested_models_lists_and_mappings_are_found(tmp_path: Path):
    one = tmp_path / "a.txt"
    one.write_text("12345")
    config = Config(output=tmp_path / "new", several=(one, one), named={"x": Part(table=one)}, part=Part(log=one))
    assert [(place.field, place.written) for place in places(config)] == [
        ("output", True),
        ("several", False),
        ("several", False),
        ("named.x.table", False),
        ("part.log", True),
    ]
    lines = report(config)
    assert lines[0] == f"reads several: {one}: 5 B"
    assert lines[3].startswith(f"writes output: {tmp_path / 'new'}: new, ")
    assert lines[4].startswith(f"writes part.log: {one}: exists, 5 B; would be replaced, ")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "an empty folder"),
        (["x.txt"], "exists; files of the same names would be replaced"),
        (["manifest.partial.json"], "holds an earlier run; would be resumed"),
        (["sweep.json"], "holds an earlier run; would be resumed"),
        (["manifest.json"], "finished; would be extended if the input has more"),
    ],
)
def test_an_output_that_exists_is_named_as_what_it_is(tmp_path: Path, made: list[str], said: str):
    for name in made:
        (tmp_path / name).write_text("{}")
    assert describe_output(tmp_path).startswith(said)


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; choose another output"):
        describe_output(location(tmp_path / "file" / "out"))
