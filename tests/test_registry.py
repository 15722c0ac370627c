"""The registry: versions with lineage, the aliases champion and previous, and runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel
from tiny_router import tiny_router

from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.files import write_json
from prefill_router.registry import versions
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint


class Inner(BaseModel):
    lr: float = 0.1


class Outer(BaseModel):
    seed: int = 3
    trunk: Inner = Inner()
    layers: tuple[int, ...] = (1, 2)


def checkpoint(folder: Path, favourite: str) -> Path:
    save_checkpoint(tiny_router("a" * 16, favourite), folder / favourite)
    return folder / favourite


def version_tags(number: int) -> dict[str, str]:
    from mlflow import MlflowClient

    return dict(MlflowClient(registry.tracking_uri()).get_model_version(registry.NAME, str(number)).tags)


def test_a_version_carries_its_lineage_and_headline_figures(store: Path) -> None:
    folder = checkpoint(store, "cheap")
    write_json(
        store / "evaluation/metrics.json",
        {
            "pool": {},
            "routers": {
                "prefill": {
                    "auc": {"estimate": 0.7031, "lower": 0.69, "upper": 0.71, "per_model": {}},
                    "p_auccc": {"estimate": 0.5},
                    "cost_saving": {"estimate": None, "reason": "equal costs"},
                }
            },
        },
    )
    version = registry.register(folder, store / "evaluation")
    tags = version_tags(version.number)
    assert version.created
    assert tags["checkpoint_id"] == load_checkpoint(folder).id
    assert tags["encoders"] == "a" * 16
    assert tags["outcomes_digest"] == "0" * 64
    assert tags["activations_digest"] == '{"aaaaaaaaaaaaaaaa": "' + "1" * 64 + '"}'
    assert tags["code_version"] == "0.1.0"
    assert (tags["auc"], tags["p_auccc"]) == ("0.7031", "0.5")
    assert "cost_saving" not in tags


def test_registering_a_checkpoint_twice_gives_the_same_version(store: Path) -> None:
    first = registry.register(checkpoint(store, "cheap"))
    again = registry.register(store / "cheap")
    other = registry.register(checkpoint(store, "dear"))
    assert (first.created, again.created, other.created) == (True, False, True)
    assert (first.number, again.number, other.number) == (1, 1, 2)


def test_a_version_belongs_to_the_run_that_trained_its_checkpoint(store: Path) -> None:
    from mlflow import MlflowClient

    folder = checkpoint(store, "cheap")
    with registry.track("train", Outer()) as run:
        run.tag(checkpoint_id=load_checkpoint(folder).id)
    with registry.track("evaluate", Outer(), {"checkpoint_id": load_checkpoint(folder).id}):
        pass
    version = registry.register(folder)
    client = MlflowClient(registry.tracking_uri())
    assert client.get_model_version(registry.NAME, str(version.number)).run_id == run.id
    assert client.get_run(run.id).info.status == "FINISHED"


def test_an_interrupted_registration_leaves_no_duplicate_version(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    folder = checkpoint(store, "cheap")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", dies)  # called only if tags are set after the version
        with contextlib.suppress(KeyboardInterrupt):
            registry.register(folder)
    assert registry.register(folder).number == 1
    assert len(MlflowClient(registry.tracking_uri()).search_model_versions(f"name='{registry.NAME}'")) == 1


def test_runs_nested_in_an_interrupted_run_are_resumed(store: Path) -> None:
    from mlflow import MlflowClient

    class Killed(BaseException):
        pass

    def attempt(config: Outer, die: bool) -> str:
        with registry.track_many("sweep", Outer(), "the key"), registry.track("train", config) as run:
            if die:
                raise Killed
        return run.id

    with pytest.raises(Killed):
        attempt(Outer(), die=True)
    first, again, other = attempt(Outer(), die=False), attempt(Outer(), die=False), attempt(Outer(seed=4), die=False)
    assert first == again != other
    client = MlflowClient(registry.tracking_uri())
    experiment = client.get_experiment_by_name(registry.NAME)
    runs = client.search_runs([experiment.experiment_id], "tags.job = 'train'")
    assert {run.info.run_id: run.info.status for run in runs} == {first: "FINISHED", other: "FINISHED"}


def test_a_broken_checkpoint_is_not_registered(store: Path) -> None:
    folder = checkpoint(store, "cheap")
    tensors = folder / "checkpoint.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(InputError, match="sha256"):
        registry.register(folder)


def test_an_evaluation_without_the_prefill_router_is_refused(store: Path) -> None:
    write_json(store / "evaluation/metrics.json", {"routers": {"knn": {}}})
    with pytest.raises(InputError, match=r"metrics\.json: has no figures of the router `prefill`"):
        registry.register(checkpoint(store, "cheap"), store / "evaluation")


def test_promote_keeps_previous_and_undo_swaps_back(store: Path) -> None:
    for name in ("cheap", "middle", "dear"):
        registry.register(checkpoint(store, name))
    assert registry.promote(1) is None
    with pytest.raises(InputError, match="nothing to undo, `previous` is not set"):
        registry.undo()
    former = registry.promote(3)
    assert former is not None
    assert former.number == 1
    assert registry.pin_version("models:/prefill-router@champion") == "models:/prefill-router/3"
    registry.promote(3)  # `previous` must not become the champion itself
    assert registry.pin_version("models:/prefill-router@previous") == "models:/prefill-router/1"
    champion, previous = registry.undo()
    assert (champion.number, previous and previous.number) == (1, 3)
    assert registry.pin_version("models:/prefill-router@champion") == "models:/prefill-router/1"
    assert registry.pin_version("models:/prefill-router@previous") == "models:/prefill-router/3"


def test_an_interrupted_promotion_leaves_the_champion_live(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    registry.register(checkpoint(store, "cheap"))
    registry.register(checkpoint(store, "dear"))
    registry.promote(1)
    set_alias = MlflowClient.set_registered_model_alias

    def dies_on_the_second(client: MlflowClient, name: str, alias: str, version: str) -> None:
        set_alias(client, name, alias, version)
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        registry.promote(2)
    assert registry.pin_version("models:/prefill-router@champion") == "models:/prefill-router/1"


def test_versions_on_trial_have_aliases_beside_the_champion(store: Path) -> None:
    assert registry.aliases() == {}
    for name in ("cheap", "middle", "dear"):
        registry.register(checkpoint(store, name))
    registry.promote(1)
    assert registry.set_alias("candidate", 2) is None
    assert registry.set_alias("candidate", 3) == 2
    assert registry.set_alias("shadow", 3) is None
    assert registry.aliases() == {"candidate": 3, "champion": 1, "shadow": 3}
    assert registry.pin_version("models:/prefill-router@shadow") == "models:/prefill-router/3"
    assert registry.remove_alias("candidate") == 3
    assert registry.remove_alias("candidate") is None
    assert registry.aliases() == {"champion": 1, "shadow": 3}
    with pytest.raises(InputError, match="no version 7; it has 1, 2, 3"):
        registry.set_alias("shadow", 7)


@pytest.mark.parametrize("alias", ["champion", "previous", "latest", ""])
def test_only_the_aliases_of_trials_are_set_freely(store: Path, alias: str) -> None:
    for change in (lambda: registry.set_alias(alias, 1), lambda: registry.remove_alias(alias)):
        with pytest.raises(InputError, match="allowed are candidate and shadow"):
            change()


def test_an_unknown_version_is_refused_with_the_known_ones(store: Path) -> None:
    with pytest.raises(InputError, match="no version 7; it has none yet"):
        registry.promote(7)
    registry.register(checkpoint(store, "cheap"))
    with pytest.raises(InputError, match="no version 7; it has 1"):
        registry.promote(7)


def test_resolve_fetches_a_version_whole_and_once(store: Path) -> None:
    folder = checkpoint(store, "cheap")
    registry.register(folder)
    registry.promote(1)
    fetched = registry.resolve("models:/prefill-router@champion")
    assert load_checkpoint(fetched).id == load_checkpoint(folder).id
    shutil.rmtree(store / "mlartifacts")
    assert registry.resolve("models:/prefill-router/1") == fetched
    assert not list(fetched.parent.glob(".*"))  # no temporary folder remains


@pytest.mark.parametrize("name", ["run #3", "a%20b", "q?x", "100%"])
def test_a_checkpoint_folder_of_any_name_can_be_fetched(store: Path, name: str) -> None:
    folder = checkpoint(store, "cheap").rename(store / name)
    number = registry.register(folder).number
    assert load_checkpoint(registry.resolve(f"models:/prefill-router/{number}")).id == load_checkpoint(folder).id


def test_a_version_that_keeps_the_folders_name_can_be_fetched(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(store, "cheap")
    monkeypatch.setattr(versions, "DATA", "my run")  # as earlier releases logged it
    registry.register(folder)
    assert load_checkpoint(registry.resolve("models:/prefill-router/1")).id == load_checkpoint(folder).id


def test_a_version_that_cannot_be_fetched_is_registered_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(store, "cheap")
    with monkeypatch.context() as patch:
        patch.setattr(versions, "DATA", "run #3")
        registry.register(folder)
    with pytest.raises(InputError, match=r"prefill-router 1 cannot be fetched .* register the checkpoint again"):
        registry.resolve("models:/prefill-router/1")
    assert registry.register(folder).number == 2
    assert registry.resolve("models:/prefill-router/2").is_dir()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "other", "file"])
def test_a_damaged_copy_is_downloaded_again(store: Path, damage: str) -> None:
    expected = load_checkpoint(checkpoint(store, "cheap")).id
    registry.register(store / "cheap")
    copy = registry.resolve("models:/prefill-router/1")
    if damage == "truncated":
        (copy / "checkpoint.safetensors").write_bytes((copy / "checkpoint.safetensors").read_bytes()[:-8])
    else:
        shutil.rmtree(copy)
        if damage == "emptied":
            copy.mkdir()
        elif damage == "other":
            checkpoint(store, "dear").rename(copy)
        else:
            copy.write_text("")
    assert load_checkpoint(registry.resolve("models:/prefill-router/1")).id == expected
    assert not list(copy.parent.glob(".*"))


def test_an_interrupted_download_is_removed_after_a_day(store: Path) -> None:
    registry.register(checkpoint(store, "cheap"))
    old, recent = (store / "cache/prefill-router" / name for name in (".download-old", ".download-recent"))
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    registry.resolve("models:/prefill-router/1")
    assert (old.exists(), recent.exists()) == (False, True)


@pytest.mark.parametrize("name", ["w?2", "w%203", "w#1", "w 4", "w%5"])
def test_the_default_store_is_in_a_working_directory_of_any_name(
    store: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    (store / name / "runs").mkdir(parents=True)
    database = (store / "mlflow.db").rename(store / name / "runs/mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(store / name)
    with registry.track("train", Outer()) as run:
        run.log_artifact(checkpoint(store, "cheap"), "checkpoint")
    assert MlflowClient(registry.tracking_uri()).list_artifacts(run.id, "checkpoint")
    assert not [
        path for path in store.rglob("*") if path.is_file() and path.parts[len(store.parts)] not in (name, "cheap")
    ]
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", "mlartifacts"}


def test_resolve_leaves_a_local_folder_as_it_is(store: Path) -> None:
    folder = checkpoint(store, "cheap")
    assert registry.resolve("cheap") == folder
    assert registry.pin_version("cheap") == str(folder)


@pytest.mark.parametrize(
    "where",
    [
        "nowhere",
        "models:/prefill-router",
        "models:/other/1",
        "models:/prefill-router@",
        "models:/prefill-router/0",
        "other:/prefill-router/1",
    ],
)
def test_a_wrong_address_is_refused_with_the_right_forms(store: Path, where: str) -> None:
    with pytest.raises(InputError, match=r"checkpoint: got '.*models:/prefill-router@ALIAS"):
        registry.resolve(where)


def test_a_missing_relative_folder_is_refused_with_the_working_directory(store: Path) -> None:
    with pytest.raises(InputError, match=rf"got 'runs/x', .*; relative paths count from {store}"):
        registry.resolve("runs/x")


def test_an_alias_that_is_not_set_is_refused(store: Path) -> None:
    with pytest.raises(InputError, match="no version with the alias 'champion'"):
        registry.resolve("models:/prefill-router@champion")


def test_a_run_keeps_configuration_metrics_and_files(store: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    (store / "plots").mkdir()
    (store / "plots/curve.svg").write_text("<svg/>")
    with registry.track("train", Outer(), {"split": "0"}) as run:
        run.log_metrics({"auc": 0.7, "efficacy": None, "loss": 1.5})
        run.log_artifact(store / "plots", "plots")
    kept = MlflowClient(registry.tracking_uri()).get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"seed": "3", "trunk.lr": "0.1", "layers": "[1, 2]"}
    assert kept.data.metrics == {"auc": 0.7, "loss": 1.5}
    assert (kept.data.tags["job"], kept.data.tags["split"]) == ("train", "0")
    files = Path(download_artifacts(run_id=run.id, dst_path=str(store / "fetched")))
    assert {str(path.relative_to(files)) for path in files.rglob("*.*")} == {"config.json", "plots/curve.svg"}
    assert kept.info.artifact_uri.startswith((store / "mlartifacts").as_uri())


def test_a_run_whose_body_raises_is_marked_failed(store: Path) -> None:
    from mlflow import MlflowClient

    with pytest.raises(RuntimeError, match="out of luck"), registry.track("train", Outer()) as run:
        raise RuntimeError("out of luck")
    kept = MlflowClient(registry.tracking_uri()).get_run(run.id)
    assert kept.info.status == "FAILED"
    assert kept.data.tags["error"] == "RuntimeError: out of luck"


def test_importing_the_registry_does_not_import_mlflow_or_make_files(tmp_path: Path) -> None:
    code = "import sys, os, prefill_router.registry; sys.exit('mlflow' in sys.modules or bool(os.listdir('.')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_mlflow_flavour_routes(store: Path, minilm: str) -> None:
    import mlflow
    import pandas as pd

    from prefill_router.prefill.config import EncoderConfig
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    encoder = TransformersEncoder(EncoderConfig(model=minilm, layers=(2,), poolings=("mean",), device="cpu"))
    save_checkpoint(tiny_router(encoder.info.fingerprint, "middle"), store / "real")
    registry.register(store / "real")
    model = mlflow.pyfunc.load_model("models:/prefill-router/1")
    assert model.predict(pd.DataFrame({"prompt": ["What is 2 + 2?", "Hello"]}))["model"].tolist() == ["middle"] * 2


def test_the_mlflow_flavour_refuses_an_encoder_with_other_weights(store: Path, minilm: str) -> None:
    import shutil

    import mlflow
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from prefill_router.prefill.bundled import bundled_weights
    from prefill_router.prefill.config import EncoderConfig
    from prefill_router.prefill.transformers_backend import TransformersEncoder

    folder = store / "encoder"
    shutil.copytree(bundled_weights(minilm).parent, folder)
    config = EncoderConfig(model=str(folder), layers=(2,), poolings=("mean",), device="cpu")
    fingerprint = TransformersEncoder(config).info.fingerprint
    router = tiny_router(fingerprint, "middle")
    save_checkpoint(replace(router, encoders={fingerprint: config}), store / "named")
    registry.register(store / "named")
    mlflow.pyfunc.load_model("models:/prefill-router/1")  # loads with unchanged weights
    weights, random = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    noisy = {
        name: (value * (1 + 0.05 * random.standard_normal(value.shape))).astype(value.dtype)
        if value.dtype.kind == "f"
        else value
        for name, value in weights.items()
    }
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"encoder: .* has the fingerprint \w{{16}}, .* trained on {fingerprint}"):
        mlflow.pyfunc.load_model("models:/prefill-router/1")


@pytest.mark.parametrize(
    ("module", "arguments", "code", "line"),
    [
        ("register", ["--checkpoint", "cheap"], 0, "version 1 of prefill-router"),
        ("register", ["--checkpoint", "nowhere"], 2, "error: checkpoint: got 'nowhere'"),
        ("promote", [], 2, "error: give one of --version N, --candidate and --undo"),
        ("promote", ["--version", "1", "--undo"], 2, "error: give one of --version N, --candidate and --undo"),
        ("promote", ["--undo"], 2, "error: undo: nothing to undo"),
    ],
)
def test_the_jobs_answer_in_one_line(
    store: Path, module: str, arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    from prefill_router.cli import main

    checkpoint(store, "cheap")
    job = import_module(f"jobs.{module}")
    kind = {"register": "RegisterConfig", "promote": "PromoteConfig"}[module]
    with pytest.raises(SystemExit) as end:
        main(getattr(job, kind), getattr(job, module), arguments)
    said = capsys.readouterr()
    assert end.value.code == code
    assert line in (said.out if code == 0 else said.err)
