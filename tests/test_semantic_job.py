"""The grid of semantic routers as a job: resumes, selects without the test labels, and writes tables that add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import TwoEncoders

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.evaluation.evaluate import REFERENCE, evaluate
from prefill_router.evaluation.predictions import read_predictions
from prefill_router.evaluation.semantic import HYBRID, Task, hybrid, run_task
from prefill_router.evaluation.semantic_tables import best_of, ends
from prefill_router.files import read_json
from prefill_router.outcomes.splits import split_queries
from prefill_router.outcomes.table import read_of_queries
from prefill_router.semantic.families import Sources
from prefill_router.semantic.grid import ROUTERS, Configuration, default_grid, fit_configuration
from tune import semantic

TINY = {"widths": [8], "members": 2, "kept": 1, "max_epochs": 6, "learning_rate": 0.01}
GRID = {"configurations": [
    {"family": "embedding", "router": "knn", "settings": {"k": 20}},
    {"family": "pca128+knn", "router": "logistic"},
    {"family": "embedding", "router": "network", "settings": TINY},
    {"family": "text", "router": "lora", "settings": {"model": "nowhere/to-be-found"}}]}
FIT = {"components": 4, "strategy": "fisher",
       "trunk": {"widths": [16], "learning_rate": 0.01, "members": 3, "kept": 2, "max_epochs": 8}}


@dataclass(frozen=True)
class Done:
    folder: Path
    inputs: dict[str, object]
    summary: str
    store: str

    def config(self, output: Path, **options: object) -> semantic.SemanticConfig:
        return semantic.SemanticConfig.model_validate({
            **self.inputs, "output": output, "grid": self.folder / "grid.yaml", "prefill": self.folder / "prefill.yaml",
            "best": 2, "seeds": 2, "unseen": 1, "resamples": 10, **options})

    @property
    def output(self) -> Path:
        return self.folder / "semantic"


@pytest.fixture(scope="module")
def done(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("semantic")
    with pytest.MonkeyPatch.context() as patch:
        store = f"sqlite:///{folder / 'mlflow.db'}"
        patch.setenv("MLFLOW_TRACKING_URI", store)
        inputs = TwoEncoders(n=300).write(folder / "inputs")
        (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
        (folder / "prefill.yaml").write_text(yaml.safe_dump(
            {name: [str(path) for path in value] if isinstance(value, list | tuple) else str(value)
             for name, value in inputs.items()} | {"output": str(folder), "fit": FIT}))
        made = Done(folder, inputs, "", store)
        yield Done(folder, inputs, semantic.run(made.config(made.output)), store)


def test_what_cannot_be_fitted_is_told_and_the_rest_stands(done: Done):
    grid = read_json(done.output / "grid.json")
    assert {row["name"] for row in grid["configurations"]} == {
        Configuration.model_validate(one).name for one in GRID["configurations"][:3]}
    assert len(grid["failed"]) == 1
    assert "nowhere/to-be-found" in grid["failed"][0]
    assert done.summary.startswith("3 configurations, best ")


def test_the_best_by_calibration_auc_stand_beside_the_prefill_router(done: Done):
    rows = read_json(done.output / "grid.json")["configurations"]
    aucs = [row["calibration"]["auc"] for row in rows]
    assert aucs == sorted(aucs, reverse=True)
    metrics = read_json(done.output / "evaluation" / "metrics.json")
    assert list(metrics["routers"]) == [REFERENCE, HYBRID, rows[0]["name"], rows[1]["name"]]
    assert list(metrics["leave_one_benchmark_out"]["routers"]) == [REFERENCE, HYBRID, rows[0]["name"]]
    assert list(metrics["seeds"]["routers"]) == list(metrics["routers"])
    for row in rows[:2]:
        assert row["test"]["auc"] == pytest.approx(metrics["routers"][row["name"]]["auc"]["estimate"])


def test_every_figure_comes_again_from_the_predictions(done: Done):
    folder = done.output / "evaluation"
    again = evaluate(read_predictions(folder / "predictions.parquet"), n_resamples=10, seed=0)
    metrics = read_json(folder / "metrics.json")
    assert again["routers"] == metrics["routers"]
    unseen = evaluate(read_predictions(folder / "leave_one_out.parquet"), n_resamples=10, seed=0)
    assert unseen["routers"] == metrics["leave_one_benchmark_out"]["routers"]


def test_pages_and_tables_say_that_layers_and_heads_are_compared(done: Done):
    for path in (done.output / "grid.md", done.output / "evaluation" / "report.html"):
        assert "same small sentence encoder" in path.read_text(encoding="utf-8")


def test_fits_are_nested_runs(done: Done):
    from mlflow import MlflowClient

    client = MlflowClient(done.store)
    experiment = client.get_experiment_by_name(registry.NAME)
    parent, = client.search_runs([experiment.experiment_id], "tags.job = 'semantic'")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(runs) == len(list((done.output / "fits").iterdir())) + 1  # and the one that failed
    finished = [run for run in runs if run.info.status == "FINISHED"]
    assert len(finished) == len(runs) - 1
    assert all("calibration_auc" in run.data.metrics for run in finished)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(done: Done, monkeypatch: pytest.MonkeyPatch):
    before = (done.output / "grid.md").read_text(encoding="utf-8")
    fits = sorted((done.output / "fits").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in fits[2:]}
    for path in fits[:2]:
        path.unlink()
    semantic.run(done.config(done.output))
    assert (done.output / "grid.md").read_text(encoding="utf-8") == before
    assert {path: path.stat().st_mtime_ns for path in fits[2:]} == kept


def test_other_inputs_are_refused(done: Done):
    with pytest.raises(InputError, match="made with another prefill"):
        semantic.run(done.config(done.output, prefill=None))
    with pytest.raises(InputError, match="column 'hardness' is missing"):
        semantic.run(done.config(done.folder / "other", judge="hardness"))


def test_a_family_without_a_source_is_refused_before_anything_is_fitted(done: Done):
    (done.folder / "perplexity.yaml").write_text(yaml.safe_dump(
        {"configurations": [{"family": "perplexity", "router": "logistic"}]}))
    with pytest.raises(InputError, match="needs perplexity"):
        semantic.run(done.config(done.folder / "none", grid=done.folder / "perplexity.yaml"))
    assert not (done.folder / "none").exists()


@pytest.fixture(scope="module")
def material() -> tuple[TwoEncoders, Sources]:
    two = TwoEncoders(n=300)
    prompts = np.array([f"question {row}" for row in range(300)], dtype=object)
    return two, Sources(two(two.blocks[-1]), prompts)


def test_no_label_of_a_test_query_is_read(material):
    """Other test labels change nothing of what is predicted or selected by."""
    two, sources = material
    split = split_queries(two.outcomes, 0, "75/10/15")
    changed = two.outcomes.correct.copy()
    changed[split.test] = 1 - np.nan_to_num(changed[split.test])
    from dataclasses import replace

    for one in GRID["configurations"][:3]:
        configuration = Configuration.model_validate(one)
        results = [fit_configuration(configuration, sources, outcomes, split, 0) for outcomes in
                   (two.outcomes, replace(two.outcomes, correct=changed))]
        np.testing.assert_array_equal(results[0].p_test, results[1].p_test)
        assert results[0].figures == results[1].figures


def test_a_trunk_over_the_prefill_features_alone_is_the_prefill_router(done: Done):
    """Before calibration, to the last bit: so that a hybrid differs by what is added alone."""
    loaded = semantic._material(done.config(done.output))
    router = run_task(loaded, Task(configuration=None, seed=0))
    alone = hybrid(Configuration(family="prefill", router="network"), loaded.fit.trunk)
    assert alone.family == "prefill"
    result = run_task(loaded, Task(configuration=alone, seed=0))
    assert result.figures["none"] == router.figures["none"]
    assert result.figures["platt"] == router.figures["platt"]


def test_a_split_without_a_calibration_part_is_refused(material):
    two, sources = material
    with pytest.raises(InputError, match="no calibration part"):
        fit_configuration(Configuration(family="embedding", router="knn"), sources, two.outcomes,
                          split_queries(two.outcomes, 0, "85/15"), 0)


def test_the_default_grid_names_each_configuration_once_and_is_large_enough(material):
    sources = material[1]
    for text in ({}, {"complexity": np.zeros((300, 30)), "perplexity": np.zeros((300, 4))}):
        grid = default_grid(Sources(sources.embedding, sources.prompts, text, np.zeros(300)))
        names = [configuration.name for configuration in grid]
        assert len(set(names)) == len(names) > (70 if not text else 110)
        assert {configuration.router for configuration in grid} == set(ROUTERS)


@pytest.mark.parametrize(("given", "message"), [
    ({"family": "embedding", "router": "elo"}, "there are knn"),
    ({"family": "embedding", "router": "knn", "settings": {"depth": 2}}, "knn has no depth; it has k, kernel")])
def test_a_configuration_that_cannot_be_made_is_refused(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Configuration.model_validate(given)


def test_a_judges_column_must_say_one_number_of_a_query(tmp_path: Path):
    def table(values: list[float | None]) -> Path:
        pq.write_table(pa.table({"query_id": ["a", "a", "b"], "judge": values}), tmp_path / "outcomes.parquet")
        return tmp_path / "outcomes.parquet"

    np.testing.assert_array_equal(read_of_queries(table([0.25, None, None]), "judge", ["b", "a"]), [np.nan, 0.25])
    with pytest.raises(InputError, match=r"has both 0\.25 and 0\.5"):
        read_of_queries(table([0.25, 0.5, 1.0]), "judge", ["a"])
    with pytest.raises(InputError, match=r"got 2\.0, allowed is a number in"):
        read_of_queries(table([2.0, None, 1.0]), "judge", ["a"])


def test_ends_of_a_short_grid_do_not_overlap():
    rows = [{"name": str(n), "architecture": "a", "test": {"p_auccc": value}}
            for n, value in enumerate([0.3, None, 0.1, 0.2])]
    assert [[row["name"] for row in part] for part in ends(rows, 2)] == [["0", "3"], ["2"]]
    assert [row["name"] for row in best_of(rows, "architecture")] == ["0"]
