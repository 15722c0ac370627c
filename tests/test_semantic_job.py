"""The grid of semantic routers as a job: resumes, selects without the test labels, and writes tables that add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from builders import TwoEncoders

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.experiments import semantic_grid
from prefill_router.experiments.semantic_grid import HYBRID, Material, Task, hybrid, run_task, split_of
from prefill_router.files import read_json, read_yaml
from prefill_router.metrics.evaluate import REFERENCE, evaluate
from prefill_router.metrics.predictions import read_predictions
from prefill_router.outcomes.splits import Split, split_queries
from prefill_router.outcomes.table import read_of_queries
from prefill_router.reports.semantic_tables import FIGURES, best_of, ends, grid_markdown
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.semantic.families import Sources
from prefill_router.semantic.grid import ROUTERS, Configuration, Result, default_grid, fit_configuration
from tune import semantic

TINY = {"widths": [8], "members": 2, "kept": 1, "max_epochs": 6, "learning_rate": 0.01}
GRID = {
    "configurations": [
        {"family": "embedding", "router": "knn", "settings": {"k": 20}},
        {"family": "pca128+knn", "router": "logistic"},
        {"family": "embedding", "router": "network", "settings": TINY},
        {"family": "text", "router": "lora", "settings": {"model": "nowhere/to-be-found"}},
    ]
}
FIT = {
    "components": 4,
    "strategy": "fisher",
    "trunk": {"widths": [16], "learning_rate": 0.01, "members": 3, "kept": 2, "max_epochs": 8},
}


@dataclass(frozen=True)
class Done:
    folder: Path
    inputs: dict[str, object]
    summary: str
    store: str

    def config(self, output: Path, **options: object) -> semantic.SemanticConfig:
        return semantic.SemanticConfig.model_validate(
            {
                **self.inputs,
                "output": output,
                "grid": self.folder / "grid.yaml",
                "prefill": self.folder / "prefill.yaml",
                "best": 2,
                "seeds": 2,
                "unseen": 1,
                "resamples": 10,
                **options,
            }
        )

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
        (folder / "prefill.yaml").write_text(
            yaml.safe_dump(
                {
                    name: [str(path) for path in value] if isinstance(value, list | tuple) else str(value)
                    for name, value in inputs.items()
                }
                | {"output": str(folder), "fit": FIT}
            )
        )
        made = Done(folder, inputs, "", store)
        yield Done(folder, inputs, semantic.run(made.config(made.output)), store)


def test_what_cannot_be_fitted_is_told_and_the_rest_stands(done: Done):
    grid = read_json(done.output / "grid.json")
    assert {row["name"] for row in grid["configurations"]} == {
        Configuration.model_validate(one).name for one in GRID["configurations"][:3]
    }
    assert len(grid["failed"]) == 1
    assert "nowhere/to-be-found" in grid["failed"][0]
    assert done.summary.startswith("3 configurations, 1 fits failed; mean AUC prefill ")


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
        assert "the encoder and the embedding model are the same model" in path.read_text(encoding="utf-8")


def test_fits_are_nested_runs(done: Done):
    from mlflow import MlflowClient

    client = MlflowClient(done.store)
    experiment = client.get_experiment_by_name(registry.NAME)
    (parent,) = client.search_runs([experiment.experiment_id], "tags.job = 'semantic'")
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
    (done.folder / "perplexity.yaml").write_text(
        yaml.safe_dump({"configurations": [{"family": "perplexity", "router": "logistic"}]})
    )
    with pytest.raises(InputError, match="needs perplexity"):
        semantic.run(done.config(done.folder / "none", grid=done.folder / "perplexity.yaml"))
    assert not (done.folder / "none").exists()


def test_one_seed_without_leave_one_out_replaces_an_earlier_evaluation(done: Done):
    """`best` may exceed the number of configurations."""
    before = {path.name for path in (done.output / "evaluation").iterdir()}
    semantic.run(done.config(done.output, seeds=1, unseen=0, best=99))
    folder = done.output / "evaluation"
    assert before - {path.name for path in folder.iterdir()} == {"seeds.md", "leave_one_out.parquet"}
    metrics = read_json(folder / "metrics.json")
    assert "seeds" not in metrics
    assert "leave_one_benchmark_out" not in metrics
    assert len(metrics["routers"]) == 5  # prefill, hybrid, and all three of the grid
    semantic.run(done.config(done.output))


def test_fits_that_fail_after_the_grid_leave_out_what_they_were_for(done: Done, monkeypatch: pytest.MonkeyPatch):
    """One of a benchmark, one of a seed: the rest is compared, and the failures are reported."""
    fits = sorted(path.name for path in (done.output / "fits").iterdir())
    rows = read_json(done.output / "grid.json")["configurations"]
    named = {
        row["name"]: Configuration.model_validate({key: row[key] for key in ("family", "router", "settings")})
        for row in rows
    }
    second = list(named.values())[1]
    gone = [
        Task(configuration=None, seed=0, benchmark="bench1").path(done.output / "fits"),
        Task(configuration=second, seed=1).path(done.output / "fits"),
    ]
    kept = {path: path.read_bytes() for path in gone}
    for path in gone:
        path.unlink()
    made = semantic._fit
    monkeypatch.setattr(
        semantic,
        "_fit",
        lambda config, shared, tasks, label: made(
            config, shared, [task for task in tasks if task.path(config.output / "fits") not in gone], label
        ),
    )
    assert semantic.run(done.config(done.output)).startswith("3 configurations")
    metrics = read_json(done.output / "evaluation" / "metrics.json")
    assert second.name not in metrics["routers"]
    unseen = read_predictions(done.output / "evaluation" / "leave_one_out.parquet")
    assert set(unseen.benchmarks) == {"bench0", "bench2"}
    for path, data in kept.items():
        path.write_bytes(data)
    assert sorted(path.name for path in (done.output / "fits").iterdir()) == fits


def test_too_few_queries_are_refused_before_anything_is_fitted(done: Done, tmp_path: Path):
    table = pq.read_table(done.inputs["outcomes"])
    few = table.filter(pa.array([int(query[1:]) < 24 for query in table.column("query_id").to_pylist()]))
    pq.write_table(few, tmp_path / "outcomes.parquet")
    with pytest.raises(InputError, match="fold"):
        semantic.run(done.config(tmp_path / "few", outcomes=tmp_path / "outcomes.parquet"))
    assert not (tmp_path / "few").exists()


@pytest.fixture(scope="module")
def material(done: Done) -> Material:
    """That of the job, with groups of three and a judge's labels."""
    loaded = semantic._material(done.config(done.output))
    sources = replace(loaded.sources, judged=np.linspace(0, 1, 300), groups=np.arange(300) // 3)
    return replace(loaded, sources=sources)


SMALL = {"members": 2, "kept": 1, "max_epochs": 3}
EVERY = [
    {"family": "embedding", "router": "knn"},
    {"family": "pca128+knn", "router": "logistic"},
    {"family": "knn", "router": "xgboost", "settings": {"n_trees": 5}},
    {"family": "pca128+knn", "router": "network", "settings": SMALL},
    {"family": "embedding", "router": "network", "settings": SMALL | {"judged": True, "joint": False}},
    {"family": "embedding", "router": "tiered", "settings": {"members": 2, "kept": 1}},
    {"family": "pca128", "router": "mirt", "settings": {"max_epochs": 3}},
    {"family": "embedding", "router": "graph", "settings": {"max_epochs": 2}},
    {"family": "prefill+knn", "router": "network", "settings": SMALL},
    None,
]


@pytest.mark.parametrize("given", EVERY, ids=lambda one: f"{one['router']} on {one['family']}" if one else REFERENCE)
@pytest.mark.parametrize("benchmark", [None, "bench1"])
def test_no_label_of_a_test_query_or_of_a_benchmark_left_out_is_read(
    material: Material, given: dict[str, object] | None, benchmark: str | None
):
    """Others in their place change nothing of what is predicted or selected by."""
    task = Task(configuration=given and Configuration.model_validate(given), seed=0, benchmark=benchmark)
    split, outcomes = split_of(material, task), material.signals.outcomes
    unread = np.ones(len(outcomes), dtype=bool)
    unread[np.concatenate([split.train, split.calibration])] = False
    correct = outcomes.correct.copy()
    correct[unread] = 1 - np.nan_to_num(correct[unread])
    # Splits go by labels too: what is changed is changed once they are made.
    signals = replace(material.signals, outcomes=replace(outcomes, correct=correct))
    one, other = (run_task_on(given, task, split) for given in (material, replace(material, signals=signals)))
    np.testing.assert_array_equal(one.p_test, other.p_test)
    np.testing.assert_array_equal(one.p_calibration, other.p_calibration)
    assert one.figures == other.figures


def run_task_on(material: Material, task: Task, split: Split) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_grid, "split_of", lambda *_: split)
        return run_task(material, task)


def test_only_a_setting_that_changes_the_fit_changes_its_file(tmp_path: Path):
    def path(**settings: object) -> Path:
        return Task(configuration=Configuration(family="embedding", router="knn", settings=settings), seed=0).path(
            tmp_path
        )

    assert path() == path(k=50) == path(kernel="uniform", k=50)
    assert path(k=51) != path()
    assert path(k=20).stem == "cc4a398c93b0fdc9"  # of version 2 of the fits
    first, second = (Configuration(family="embedding", router="knn", encoder=name) for name in ("a", "b"))
    names = {Task(configuration=one, seed=0).path(tmp_path) for one in (first, second)} | {path()}
    assert len(names) == 3


def test_a_trunk_over_the_prefill_features_alone_is_the_prefill_router(done: Done):
    """A hybrid differs from it only by what is added.

    Not to the last bit: the two predict in matrix products of different row counts, and a BLAS kernel may round the
    rows at the end of a block differently (OPENBLAS_CORETYPE=Haswell does, by some 1e-10).
    """
    loaded = semantic._material(done.config(done.output))
    loaded = replace(loaded, fit=loaded.fit.model_copy(update={"stack": (), "margin": False}))
    router = run_task(loaded, Task(configuration=None, seed=0))
    alone = hybrid(Configuration(family="prefill", router="network"), loaded.fit.trunk)
    assert alone.family == "prefill"
    result = run_task(loaded, Task(configuration=alone, seed=0))
    for calibrator in ("none", loaded.fit.calibrator):
        assert result.figures[calibrator] == pytest.approx(router.figures[calibrator], rel=0, abs=1e-6)


def test_a_split_without_a_calibration_part_is_refused(material):
    outcomes = material.signals.outcomes
    with pytest.raises(InputError, match="the calibration part is empty"):
        fit_configuration(
            Configuration(family="embedding", router="knn"),
            material.sources,
            outcomes,
            split_queries(outcomes, 0, "85/15"),
            0,
        )


def test_the_default_grid_names_each_configuration_once_and_is_large_enough(material):
    sources = material.sources
    for text in ({}, {"complexity": np.zeros((300, 30)), "perplexity": np.zeros((300, 4))}):
        grid = default_grid(Sources(sources.embeddings, sources.prompts, text, np.zeros(300)), TrunkConfig(dropout=0.1))
        names = [configuration.name for configuration in grid]
        assert len(set(names)) == len(names) > (70 if not text else 110)
        assert {configuration.router for configuration in grid} == set(ROUTERS)


def test_the_default_grid_reads_every_encoder_and_perplexity(material: Material):
    sources = replace(material.sources, text={"complexity": np.zeros((300, 30)), "perplexity": np.zeros((300, 4))})
    assert list(sources.embeddings) == ["a", "b"]
    grid = default_grid(sources)
    names = [configuration.name for configuration in grid]
    assert len(set(names)) == len(names)
    assert "kNN on embedding of a, k 10, kernel uniform" in names
    own = [{one.name.replace(f" of {name}", "") for one in grid if one.encoder == name} for name in ("a", "b")]
    assert own[0] == own[1]
    text_families = {one.family for one in grid if one.encoder is None}
    assert text_families == {"text", "complexity", "perplexity", "complexity+perplexity"}
    alone = default_grid(replace(sources, embeddings={"a": sources.embedding()}))
    assert {one.name for one in alone} == {one.name for one in grid if one.encoder is None} | own[0]
    text = {"complexity": np.zeros((300, 30))}
    complexity_only = default_grid(replace(sources, embeddings={"a": sources.embedding()}, text=text))
    assert {one.name for one in complexity_only} == {one.name for one in alone if "perplexity" not in one.family}


@pytest.mark.parametrize(
    ("name", "encoders", "families"),
    [
        ("small", ("minilm",), ("complexity",)),
        ("two-encoders", ("minilm", "smollm2"), ("complexity", "perplexity")),
    ],
)
def test_the_small_grids_are_part_of_the_built_in_grid(name: str, encoders: tuple[str, ...], families: tuple[str, ...]):
    small = read_yaml(Path(__file__).parents[1] / "configs" / f"semantic-{name}.yaml", semantic.Grid).configurations
    states = dict.fromkeys(encoders, np.zeros((3, 2), np.float32))
    text = dict.fromkeys(families, np.zeros((3, 4), np.float32))
    built_in = {one.name for one in default_grid(Sources(states, np.array([""] * 3, dtype=object), text))}
    assert {one.name for one in small} < built_in


def test_a_configuration_is_fitted_on_the_embedding_of_its_encoder(material: Material):
    given = Configuration(family="embedding", router="logistic", encoder="b")
    result = run_task(material, Task(configuration=given, seed=0))
    only = replace(material.sources, embeddings={"b": material.sources.embedding("b")})
    alone = run_task(
        replace(material, sources=only), Task(configuration=given.model_copy(update={"encoder": None}), seed=0)
    )
    np.testing.assert_array_equal(result.p_test, alone.p_test)
    assert hybrid(given, material.fit.trunk).encoder == "b"
    assert semantic._routers([given], material.fit)[HYBRID].encoder == "b"
    with pytest.raises(ValueError, match="'complexity' reads no embedding; leave it out"):
        Configuration(family="complexity", router="logistic", encoder="b")


def test_an_encoder_without_its_final_layer_is_left_out_with_a_reason(
    material: Material, capsys: pytest.CaptureFixture[str]
):
    second = list(material.signals.activations)[1]
    keys = [key for key in material.signals.layer_keys if (key.encoder, key.layer) != (second, 2)]
    assert list(semantic._embeddings(replace(material.signals, layer_keys=tuple(keys)))) == ["a"]
    assert "semantic routers do not read b: activations: the baselines need 'mean_L2'" in capsys.readouterr().out
    with pytest.raises(InputError, match="need 'mean_L2'"):
        semantic._embeddings(replace(material.signals, layer_keys=()))


def test_tables_have_the_best_of_each_encoder():
    figures = dict.fromkeys(FIGURES, 0.5)
    rows = [
        {
            "name": f"kNN on {features}",
            "architecture": "kNN",
            "features": features,
            "encoder": encoder,
            "calibrator": "none",
            "calibration": {"auc": 0.5},
            "test": figures,
        }
        for features, encoder in (("knn of a", "a"), ("knn of b", "b"), ("complexity", None))
    ]
    text = grid_markdown(rows, {})
    part = text[text.index("Best of each encoder's embedding") : text.index("Highest P-AUCCC")]
    assert [name in part for name in ("knn of a", "knn of b", "complexity")] == [True, True, False]
    family = text[text.index("Best of each family") : text.index("Best of each encoder")]
    assert all(row["name"] in family for row in rows)
    assert "Best of each encoder" not in grid_markdown(rows[1:], {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "embedding", "router": "elo"}, "allowed are knn"),
        (
            {"family": "embedding", "router": "knn", "settings": {"depth": 2}},
            "knn has no setting 'depth', allowed are k, kernel",
        ),
        ({"family": "embedding", "router": "knn", "settings": {"k": 0}}, "k: got 0: Input should be greater than"),
        ({"family": "embedding", "router": "knn", "settings": {"kernel": "gausian"}}, "kernel: got 'gausian'"),
        ({"family": "embedding", "router": "logistic", "settings": {"penalties": []}}, "penalties: got"),
        ({"family": "embedding", "router": "network", "settings": {"kept": 9}}, "kept: got 9, at most the 5 members"),
        (
            {"family": "embedding", "router": "network", "settings": {"judged": True, "difficulty": 0}},
            "difficulty task",
        ),
        ({"family": "embedding", "router": "lora"}, "lora reads text; got 'embedding'"),
        ({"family": "text", "router": "network"}, "network reads embedding, .*; got 'text'"),
        ({"family": "knn", "router": "graph"}, "graph reads embedding, .*; got 'knn'"),
    ],
)
def test_a_configuration_that_cannot_be_made_is_refused(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Configuration.model_validate(given)


def test_configurations_that_differ_have_names_that_differ():
    told = [
        {},
        {"joint": False},
        {"difficulty": 0},
        {"joint": False, "difficulty": 0},
        {"disagreement": 1},
        {"disagreement": 1, "joint": False},
        {"disagreement": 1, "difficulty": 0},
        {"judged": True},
        {"judged": True, "joint": False},
    ]
    names = [Configuration(family="embedding", router="network", settings=settings).name for settings in told]
    assert len(set(names)) == len(told)
    assert names[:4] == [f"{name} on embedding" for name in ("unified MT", "MT", "unified MLP", "MLP")]


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
    rows = [
        {"name": str(n), "architecture": "a", "test": {"p_auccc": value}}
        for n, value in enumerate([0.3, None, 0.1, 0.2])
    ]
    assert [[row["name"] for row in part] for part in ends(rows, 2)] == [["0", "3"], ["2"]]
    assert [row["name"] for row in best_of(rows, "architecture")] == ["0"]
