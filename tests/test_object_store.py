"""Files in an object store: every stage reads and writes URIs. A local S3-compatible server takes the place of S3."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import QUICK, make_pool, make_router, make_table
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from pydantic import ValidationError
from tiny_models import prompts, save_model

import prefill_router as pr
from prefill_router import locations, registry
from prefill_router.cli import main, parse
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError, one_line
from prefill_router.files import cache_folder, read_json, sha256_file
from prefill_router.locations import ObjectPath, local_copy, location
from prefill_router.metrics.compare import read_runs
from prefill_router.metrics.predictions import read_predictions
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import load_pool, save_pool
from prefill_router.prefill import local
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import MANIFEST, PARTIAL, read_activations
from prefill_router.prefill.shards import open_dataset, read_header
from prefill_router.routing.checkpoint import TENSORS, check_place, load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.text_columns import column_names, read_columns
from prefill_router.workflows.evaluate import EvaluateConfig
from prefill_router.workflows.evaluate import run as run_evaluate
from prefill_router.workflows.train import TrainConfig
from prefill_router.workflows.train import run as run_train
from serve.config import Live

N = 240
PROGRAMS = (
    *(f"jobs.{name}" for name in ("compare", "demo", "evaluate", "features", "prefill", "probe", "register", "train")),
    *(f"benchmarks.{name}" for name in ("ablation", "depth", "novelty", "prefill", "probe", "reuse")),
    *("tune.semantic", "tune.summary", "tune.sweep", "serve.config"),
)


@pytest.fixture(scope="module")
def bucket(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectPath]:
    """A bucket on a local server. The cache of checkpoints and the tracking store are temporary."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        database = shutil.copy(empty_database, tmp_path_factory.mktemp("mlflow"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        locations._filesystem.cache_clear()
        folder = location("s3://bucket")
        assert isinstance(folder, ObjectPath)
        yield folder
        locations._filesystem.cache_clear()
    server.stop()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return EncoderConfig(model=str(save_model("gpt2", tmp_path_factory.mktemp("model"))), device="cpu")


@pytest.fixture(scope="module")
def flow(bucket: ObjectPath, encoder: EncoderConfig, tmp_path_factory: pytest.TempPathFactory) -> ObjectPath:
    """Outcomes, pool, activations, checkpoint and evaluation below one prefix; no local folder is created."""
    folder, work, scratch = bucket / "flow", tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("scratch")
    texts = prompts(N)
    rows = [row | {"prompt": texts[index // 3]} for index, row in enumerate(make_table(N)[0].to_pylist())]
    pq.write_table(pa.Table.from_pylist(rows), scratch / "outcomes.parquet")
    (folder / "outcomes.parquet").upload(scratch / "outcomes.parquet")
    save_pool(make_pool(), folder / "pool.yaml")
    names = {"outcomes": "outcomes.parquet", "pool": "pool.yaml", "activations": "activations"}
    inputs = [f"--{name}={folder / file}" for name, file in names.items()]
    fit = FitConfig(components=4, each_pooling=False, trunk=QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        outcomes = load_outcomes(str(folder / "outcomes.parquet"), load_pool(str(folder / "pool.yaml")))
        pr.prefill(outcomes, encoder, to=str(folder / "activations"))
        run_train(parse(TrainConfig, "", [*inputs, f"--output={folder}"]).model_copy(update={"fit": fit}))
        options = [f"--checkpoint={folder}/checkpoint", f"--output={folder}/evaluation", "--resamples=10"]
        run_evaluate(parse(EvaluateConfig, "", [*inputs, *options, "--no-baselines"]))
    assert list(work.iterdir()) == []
    return folder


@pytest.mark.train
def test_a_router_trained_in_the_store_routes_as_its_local_copy(flow: ObjectPath):
    with (
        local_copy(flow / "checkpoint") as folder,
        pr.load(folder) as local_router,
        pr.load(str(flow / "checkpoint")) as router,
    ):
        assert router.route("Why is the sky blue?") == local_router.route("Why is the sky blue?")
        assert router.router.id == read_json(flow / "checkpoint" / MANIFEST)["id"]


@pytest.mark.train
def test_states_in_the_store_equal_those_of_a_local_dataset(flow: ObjectPath, encoder: EncoderConfig, tmp_path: Path):
    outcomes = load_outcomes(flow / "outcomes.parquet", load_pool(flow / "pool.yaml"))
    here = pr.prefill(outcomes, encoder, to=tmp_path / "activations")
    there = read_activations(str(flow / "activations"))
    assert there.digest == here.digest
    assert there.manifest.counts.bytes == sum(
        (flow / "activations" / name).stat().st_size for name in there.manifest.shards
    )
    for column in there.columns:
        arguments = column, outcomes.query_ids, outcomes.prompt_digests
        np.testing.assert_array_equal(there.states(*arguments), here.states(*arguments))


@pytest.mark.train
def test_an_evaluation_in_the_store_has_every_file_and_is_compared(flow: ObjectPath, tmp_path: Path):
    evaluation = flow / "evaluation"
    files = {"metrics.json", "predictions.parquet", "provenance.json", "report.html"}
    assert files <= {path.name for path in evaluation.iterdir()}
    with local_copy(evaluation) as folder:
        assert sha256_file(folder / "report.html") == sha256_file(evaluation / "report.html")
        runs = read_runs([evaluation, folder])
        assert [run.predictions.query_ids.tolist() for run in runs] == [
            read_predictions(folder / "predictions.parquet").query_ids.tolist()
        ] * 2


@pytest.mark.train
def test_a_checkpoint_in_the_store_is_registered_with_its_evaluation(flow: ObjectPath):
    version = registry.register(str(flow / "checkpoint"), str(flow / "evaluation"))
    assert load_checkpoint(registry.resolve(f"models:/{registry.NAME}/{version.number}")).id == version.checkpoint
    assert registry.pin_version(str(flow / "checkpoint")) == str(flow / "checkpoint")


def test_an_interrupted_prefill_in_the_store_resumes(
    bucket: ObjectPath, encoder: EncoderConfig, monkeypatch: pytest.MonkeyPatch
):
    folder = bucket / "interrupted"
    table = pa.table({"query_id": [f"q{row}" for row in range(24)], "prompt": prompts(24)})
    monkeypatch.setattr(local, "SAMPLE_ROWS", 8)
    upload = ObjectPath.upload

    def fail_at_the_second_shard(path: ObjectPath, source: Path) -> None:
        if path.name == "local-000001.parquet":
            raise KeyboardInterrupt
        upload(path, source)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "upload", fail_at_the_second_shard)
        with pytest.raises(KeyboardInterrupt):
            local.prefill_prompts(table, encoder, folder)
    first = (folder / "local-000000.parquet").read_bytes()
    assert {path.name for path in folder.iterdir()} == {PARTIAL, "local-000000.parquet"}
    with pytest.raises(InputError, match="unfinished"):
        read_activations(folder)
    local.prefill_prompts(table, encoder, folder)
    assert (folder / "local-000000.parquet").read_bytes() == first
    rows = read_activations(folder).rows(table.column("query_id").to_pylist())
    assert rows.column("error").null_count == 24
    assert not (folder / PARTIAL).exists()


def test_an_incomplete_upload_is_not_visible(bucket: ObjectPath):
    path = bucket / "incomplete" / "object"
    stream = path.filesystem.open_output_stream(path.key)
    stream.write(b"x" * 10)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []
    stream.close()
    assert path.read_bytes() == b"x" * 10


def test_an_unreadable_store_deletes_no_shard(
    bucket: ObjectPath, encoder: EncoderConfig, monkeypatch: pytest.MonkeyPatch
):
    folder = bucket / "unreadable"
    table = pa.table({"query_id": ["a"], "prompt": ["a question"]})
    local.prefill_prompts(table, encoder, folder)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    header = read_header(folder, local.ActivationsHeader)
    assert header is not None
    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", fail)
        with pytest.raises(UnavailableError, match="NETWORK_CONNECTION"):
            open_dataset(folder, header, table)
    assert read_activations(folder).manifest.counts.rows == 1


def test_a_checkpoint_is_downloaded_once_and_a_damaged_copy_is_replaced(
    bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch
):
    folder = bucket / "once"
    saved = save_checkpoint(make_router()[0].router, folder)
    copy = registry.resolve(str(folder))
    assert copy == cache_folder() / saved.id
    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "download", None)
        assert registry.resolve(str(folder)) == copy
    (copy / TENSORS).write_bytes(b"damaged")
    assert load_checkpoint(registry.resolve(str(folder))).id == saved.id


def test_a_damaged_checkpoint_is_refused_with_its_uri(bucket: ObjectPath):
    folder = bucket / "damaged"
    save_checkpoint(make_router(seed=1)[0].router, folder)
    (folder / TENSORS).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"^{folder / TENSORS}: its sha256 differs"):
        load_checkpoint(folder)
    with pytest.raises(InputError, match=r"^checkpoint: s3://bucket/nothing is not a folder"):
        load_checkpoint(bucket / "nothing")


def test_a_checkpoint_whose_upload_fails_is_kept(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch):
    def fail(path: ObjectPath, source: Path) -> None:
        raise UnavailableError(f"{path}: the object store does not answer")

    monkeypatch.setattr(ObjectPath, "upload", fail)
    with pytest.raises(UnavailableError, match="the checkpoint is kept in ") as error:
        save_checkpoint(make_router()[0].router, bucket / "kept")
    assert load_checkpoint(str(error.value).rpartition(" ")[2]).pool == make_pool()


def test_a_checkpoint_replaces_a_checkpoint_and_nothing_else(bucket: ObjectPath):
    folder = bucket / "place"
    save_checkpoint(make_router()[0].router, folder)
    check_place(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        check_place(folder)
    with pytest.raises(InputError, match="nobucket does not exist"):
        check_place(location("s3://nobucket/checkpoint"))


def test_outcomes_in_a_folder_of_the_store_equal_those_of_a_local_folder(bucket: ObjectPath, tmp_path: Path):
    table = make_table(30)[0].drop(["benchmark"])
    for index, name in enumerate(("benchmark=x/a.parquet", "benchmark=y/b.parquet")):
        (tmp_path / "outcomes" / name).parent.mkdir(parents=True)
        pq.write_table(table.slice(45 * index, 45), tmp_path / "outcomes" / name)
        (bucket / "outcomes" / name).upload(tmp_path / "outcomes" / name)
    assert column_names(bucket / "outcomes") == column_names(tmp_path / "outcomes")
    for names in (("query_id", "prompt", "correct"), ("query_id", "benchmark")):
        found = read_columns(bucket / "outcomes", names, names)
        assert found == read_columns(tmp_path / "outcomes", names, names)
        assert found.num_rows == 90


@pytest.mark.usefixtures("ray_cluster")
def test_the_cluster_completes_a_dataset_in_the_store(bucket: ObjectPath, encoder: EncoderConfig, tmp_path: Path):
    from jobs import prefill

    folder, table = bucket / "cluster", pa.table({"query_id": [f"q{row}" for row in range(48)], "prompt": prompts(48)})
    pq.write_table(table, tmp_path / "in.parquet")
    (bucket / "in.parquet").upload(tmp_path / "in.parquet")
    local.prefill_prompts(table.slice(0, 16), encoder, folder)
    (first,) = folder.glob("*.parquet")
    kept = first.read_bytes()
    options = [f"--encoder.model={encoder.model}", "--encoder.device=cpu", "--rows-per-shard=16", "--actors=1"]
    config = parse(prefill.PrefillConfig, "", [f"--input={bucket}/in.parquet", f"--output={folder}", *options])
    assert "32 prompts encoded" in prefill.run(config)
    assert "nothing to do" in prefill.run(config)
    assert first.read_bytes() == kept
    assert len(list(folder.glob("*.parquet"))) == 3
    assert read_activations(folder).manifest.counts.rows == 48


def path_fields() -> list[tuple[type[FrozenModel], str]]:
    """The fields of every program's configuration that are paths or contain paths."""
    for name in PROGRAMS:
        importlib.import_module(name)
    pending, found = [FrozenModel], []
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if not kind.__module__.startswith("test"):
            found += [(kind, name) for name, field in kind.model_fields.items() if Path in _parts(field.annotation)]
    return found


def test_every_field_for_a_path_refuses_an_unsupported_scheme_in_one_line():
    fields = path_fields()
    assert len(fields) > 40
    for kind, name in fields:
        parts = [get_origin(part) for part in _parts(kind.model_fields[name].annotation)]
        value: Any = {"a": "ftp://host/x"} if dict in parts else ["ftp://host/x"] if tuple in parts else "ftp://host/x"
        with pytest.raises(ValidationError) as error:
            kind.model_validate({name: value})
        line = one_line(error.value)
        assert re.search(rf"(^|; ){name}[\w.]*: ftp://host/x: the scheme ftp:// is not supported", line), (kind, line)
        assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ftp://host/x", "the scheme ftp:// is not supported; allowed are a local path, s3://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/x?region=eu", "has a query"),
    ],
)
def test_a_program_refuses_the_output_before_any_work(
    text: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from jobs import compare

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(compare.CompareConfig, compare.run, ["a", "b", "--output", text])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"job: error: output: {text}: ")
    assert fault in err
    assert list(tmp_path.iterdir()) == []


def test_the_server_refuses_the_checkpoint_of_an_unsupported_scheme():
    with pytest.raises(ValidationError, match="ftp:// is not supported"):
        Live(checkpoint="ftp://host/x")
    assert Live(checkpoint="s3://bucket/x").checkpoint == "s3://bucket/x"


def test_a_local_program_refuses_an_object_store():
    from jobs import demo

    with pytest.raises(InputError, match="output: s3://bucket/x: an object store is not supported here"):
        parse(demo.DemoConfig, "", ["--output", "s3://bucket/x"])


@pytest.mark.parametrize(
    "text", ["runs/x", "/runs/x", "./s3:x", "a:b/c", "C:/x", "odd:/x", "~/x", "models:/prefill-router@champion"]
)
def test_other_text_is_a_local_path(text: str):
    assert type(location(text)) is type(Path())
    assert location(text) == Path(text)


def test_an_object_path_acts_as_a_path_and_never_as_a_local_file():
    path = location("S3://bucket/a b/c#1.parquet")
    assert str(path) == "s3://bucket/a b/c#1.parquet"
    assert (path.name, path.stem, path.suffix) == ("c#1.parquet", "c#1", ".parquet")
    assert str(path.parent / "d") == str(path.with_name("d")) == "s3://bucket/a b/d"
    for same in (location(Path(str(path))), pickle.loads(pickle.dumps(path)), path.resolve(), path / ""):
        assert isinstance(same, ObjectPath)
        assert str(same) == str(path)
    for use in (os.fspath, open, os.path.exists, Path.open, lambda path: path.rename("x"), pq.read_table):
        with pytest.raises(TypeError, match="no local files"):
            use(path)


@pytest.mark.parametrize("name", ["a b.txt", "c#1.txt", "50%20.txt", "ü?.txt", "x:y.txt"])
def test_an_object_of_any_name_is_written_listed_and_deleted(bucket: ObjectPath, name: str):
    folder = bucket / "names"
    (folder / name).write_text("é")
    assert (folder / name).read_text() == "é"
    assert ((folder / name).is_file(), folder.is_dir(), folder.is_file()) == (True, True, False)
    assert list(folder.glob("*.txt")) == [folder / name]
    (folder / name).unlink()
    (folder / name).unlink(missing_ok=True)
    assert not (folder / name).exists()
    with pytest.raises(FileNotFoundError):
        (folder / name).unlink()


def test_a_store_that_does_not_answer_is_an_error_of_one_line(bucket: ObjectPath):
    with pytest.raises(
        UnavailableError, match="s3://nobucket/x: the object store does not answer or denies access"
    ) as error:
        location("s3://nobucket/x").write_text("x")
    assert "\n" not in str(error.value)


def _parts(annotation: Any) -> list[Any]:
    """The type with the types that it is made of."""
    return [annotation, *(part for argument in get_args(annotation) for part in _parts(argument))]
