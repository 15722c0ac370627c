"""The features job: every prompt once, equal to the extractor, resumed after a cut; its reader names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import prompts, save_model

import jobs.features
from jobs.features import FeaturesConfig, run
from prefill_router.cli import main, parse
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest, read_json, write_json
from prefill_router.prefill.dataset import MANIFEST, PARTIAL
from prefill_router.semantic.complexity import NAMES, complexity
from prefill_router.semantic.perplexity import Perplexity, PerplexityConfig
from prefill_router.semantic.text_features import TextFeatures, read_text_features

TEXTS = prompts(40)
IDS = [f"q{row}" for row in range(40)]
DIGESTS = [prompt_digest(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("model"))


def write_prompts(path: Path, ids: list[str] = IDS, texts: list[str | None] | None = None) -> None:
    pq.write_table(
        pa.table({"query_id": ids, "prompt": pa.array(TEXTS if texts is None else texts, pa.string())}), path
    )


def arguments(tmp_path: Path, *options: str) -> list[str]:
    return [
        "--input",
        str(tmp_path / "in.parquet"),
        "--output",
        str(tmp_path / "out"),
        "--rows-per-shard",
        "10",
        "--actors",
        "1",
        *(options or ("--complexity-only",)),
    ]


def config(tmp_path: Path, *options: str) -> FeaturesConfig:
    return parse(FeaturesConfig, "", arguments(tmp_path, *options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_writes_every_prompt_once_and_equal_to_the_features_themselves(tmp_path: Path, model: Path) -> None:
    write_prompts(tmp_path / "in.parquet", [*IDS, "null", "blank"], [*TEXTS, None, " "])
    options = ["--perplexity.model", str(model), "--perplexity.max-length", "20"]
    assert "42 rows, 2 without features" in run(config(tmp_path, *options))
    features = read_text_features(tmp_path / "out")
    assert features.families == ("complexity", "perplexity")
    got = features.values("complexity", IDS, DIGESTS)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, complexity(TEXTS).astype(np.float32))
    want, _ = Perplexity(PerplexityConfig(model=str(model), max_length=20))(TEXTS)
    np.testing.assert_allclose(features.values("perplexity", IDS[::-1], DIGESTS[::-1]), want[::-1], rtol=1e-4)
    assert features.errors().to_pylist() == [
        {"query_id": "null", "error": "prompt is null"},
        {"query_id": "blank", "error": "prompt is empty"},
    ]
    assert features.manifest.families["complexity"].features == NAMES
    assert features.manifest.families["perplexity"].identity["max_length"] == 20
    schema = pq.read_schema(tmp_path / "out" / features.manifest.shards[0])
    assert schema.field("complexity").type == pa.list_(pa.float32(), 30)
    assert schema.field("perplexity").type == pa.list_(pa.float32(), 4)
    before = contents(tmp_path / "out")
    assert run(config(tmp_path, *options, "--perplexity.batch-tokens", "99")).startswith("nothing to do: all 42")
    for extra, message in (
        (["--perplexity.max-length", "8"], "max_length was 20, is now 8; choose another output"),
        ([], "holds the families complexity, perplexity, requested are complexity;"),
    ):
        with pytest.raises(InputError, match=message):
            run(config(tmp_path, *([*options, *extra] if extra else [])))
    assert contents(tmp_path / "out") == before


def test_smollm2_is_the_language_model_unless_another_is_given(model: Path) -> None:
    def language_model(*options: str) -> PerplexityConfig | None:
        return parse(FeaturesConfig, "", ["--input", "in.parquet", "--output", "out", *options]).perplexity

    assert language_model() == PerplexityConfig(model="smollm2")
    assert language_model("--perplexity.dtype", "bfloat16") == PerplexityConfig(model="smollm2", dtype="bfloat16")
    assert language_model("--perplexity.model", str(model)) == PerplexityConfig(model=str(model))


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupted_run_resumes_and_replaces_a_damaged_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, write = [], jobs.features.write_shards

    def counting(label: str, folder: Path, prompts: pa.Table, *rest: Any) -> None:
        computed.append(prompts.num_rows)
        write(label, folder, prompts, *rest)

    monkeypatch.setattr(jobs.features, "write_shards", counting)
    write_prompts(tmp_path / "in.parquet")
    run(config(tmp_path))
    # The state after a kill: a header without a manifest, one shard missing, one cut off.
    out = tmp_path / "out"
    manifest = read_json(out / MANIFEST)
    write_json(out / PARTIAL, {"families": manifest["families"], "config": manifest["config"]})
    (out / MANIFEST).unlink()
    gone, cut = manifest["shards"][:2]
    (out / gone).unlink()
    (out / cut).write_bytes((out / cut).read_bytes()[:-9])
    with pytest.raises(InputError, match="this extraction is unfinished; run the same command again"):
        read_text_features(out)
    capsys.readouterr()
    run(config(tmp_path))
    printed = capsys.readouterr().out
    assert f"{cut} is damaged by an interrupted write; deleted" in printed
    assert "20 of 40 prompts already have features" in printed
    assert computed == [40, 20]
    assert read_text_features(out).manifest.counts.rows == 40
    assert run(config(tmp_path)).startswith("nothing to do: all 40")
    np.testing.assert_array_equal(
        read_text_features(out).values("complexity", IDS, DIGESTS), complexity(TEXTS).astype(np.float32)
    )
    write_prompts(tmp_path / "in.parquet", IDS, [*TEXTS[:39], "another"])
    with pytest.raises(InputError, match="query_id 'q39' was encoded from another prompt than the input has now"):
        run(config(tmp_path))


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_that_holds_something_else_exits_2_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "in.parquet")
    out = tmp_path / "out"
    out.mkdir()
    for name, message in (
        ("notes.txt", "the folder is not empty"),
        (MANIFEST, "not the manifest of text features"),
    ):
        (out / name).write_text('{"encoder": {}, "columns": []}')
        before = contents(out)
        with pytest.raises(SystemExit) as exit_:
            main(FeaturesConfig, run, arguments(tmp_path))
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert contents(out) == before


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> TextFeatures:
    folder = tmp_path_factory.mktemp("features")
    write_prompts(folder / "in.parquet", ["a", "b", "c"], ["one", "two", None])
    run(config(folder))
    return read_text_features(folder / "out")


@pytest.mark.parametrize(
    ("family", "ids", "texts", "message"),
    [
        ("perplexity", ["a"], ["one"], "no family 'perplexity', available are complexity"),
        (
            "complexity",
            ["a", "z"],
            ["one", "two"],
            "query_id 'z' has no text features .*run jobs.features on this input",
        ),
        ("complexity", ["a", "b"], ["one", "other"], "query_id 'b' was encoded from another prompt"),
        ("complexity", ["a", "c"], ["one", "three"], "query_id 'c' has no text features: prompt is null"),
    ],
)
def test_the_reader_names_what_it_cannot_give(
    family: str, ids: list[str], texts: list[str], message: str, features: TextFeatures
) -> None:
    with pytest.raises(InputError, match=message):
        features.values(family, ids, [prompt_digest(text) for text in texts])


@pytest.mark.usefixtures("ray_cluster")
def test_the_digest_is_of_the_prompts_and_families_not_of_the_run(tmp_path: Path, features: TextFeatures) -> None:
    for name, texts in (("same", ["two", "one", None]), ("changed", ["two", "one!", None])):
        (tmp_path / name).mkdir()
        write_prompts(tmp_path / name / "in.parquet", ["b", "a", "c"], texts)
        run(config(tmp_path / name, "--complexity-only", "--rows-per-shard", "2"))
    same, changed = (read_text_features(tmp_path / name / "out").digest for name in ("same", "changed"))
    assert same == features.digest
    assert changed != same
