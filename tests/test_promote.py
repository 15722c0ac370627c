"""Promotion through gates, on a registry of tiny checkpoints with made-up evaluations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paired_pool import two_routers
from pydantic import ValidationError
from tiny_router import tiny_router

from jobs.promote import POLICY, promote
from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.files import read_json, write_json
from prefill_router.metrics.paired import CANDIDATE, CHAMPION
from prefill_router.metrics.predictions import Predictions, write_predictions
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.workflows import promote as workflow
from prefill_router.workflows.gate_policy import GatePolicy, load_policy
from prefill_router.workflows.promote import PromoteConfig


def policy(**changes: Any) -> GatePolicy:
    """The policy of configs/gates.yaml with few resamples and without timings."""
    return load_policy(POLICY).model_copy(update={"resamples": 200, "decision_ms": None, **changes})


@pytest.fixture(scope="module")
def registered(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry of versions 1 (`cheap`), 2 (`dear`) and 3 (`middle`), and their checkpoints."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copy(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in ("cheap", "dear", "middle"):
            save_checkpoint(tiny_router("a" * 16, name), folder / name)
            registry.register(folder / name)
    return folder


@pytest.fixture
def versions(registered: Path, store: Path) -> Path:
    """The working directory of one test, with its own copy of the registry. Artefacts are those of `registered`."""
    shutil.copy(registered / "mlflow.db", store / "mlflow.db")
    return store


def write_evaluation(folder: Path, checkpoint: str, predictions: Predictions, router: str) -> Path:
    """The files of jobs.evaluate that gates read, with the confidences of `router` as those of the prefill router."""
    own = replace(predictions, routers={"prefill": predictions.routers[router]})
    folder.mkdir()
    write_predictions(own, folder / "predictions.parquet")
    figures = {
        "auc": {"estimate": 0.7, "lower": 0.68, "upper": 0.72},
        "robustness": {"all": {"flip_rate": {"estimate": 0.1, "lower": 0.08, "upper": 0.12}}},
    }
    write_json(folder / "metrics.json", {"pool": {}, "routers": {"prefill": figures}})
    write_json(folder / "provenance.json", {"checkpoint": checkpoint})
    return folder


def against(store: Path, **noise: float) -> dict[str, Any]:
    """Makes version 1 the champion, and writes evaluations of versions 1 and 2; returns their folders as options."""
    registry.promote(1)
    predictions = two_routers(**noise)
    folders = [
        write_evaluation(store / name, registry.checkpoint_of(number), predictions, name)
        for name, number in ((CHAMPION, 1), (CANDIDATE, 2))
    ]
    return {"champion_evaluation": folders[0], "evaluation": folders[1], "output": store / "gates"}


def run(options: Mapping[str, Any], **more: Any) -> workflow.Promotion:
    return workflow.run(PromoteConfig(**{"version": 2, **options, **more}), policy())


def test_a_better_candidate_becomes_the_champion_and_its_version_says_why(versions: Path) -> None:
    promotion = run(against(versions, candidate=0.6))
    assert registry.aliases() == {"champion": 2, "previous": 1}
    assert promotion.summary.startswith("champion is version 2, previous is 1; 10 gates passed")
    tags = registry.version_tags(2)
    assert (tags["gate"], tags["gate_against"], tags["gate_policy"]) == ("passed", "1", policy().digest)
    assert tags["gate.auc"].startswith("passed: +0.")
    assert "gate_reason" not in tags
    assert tags["gate_who"]


def test_a_worse_candidate_is_refused_and_the_champion_stays(versions: Path) -> None:
    promotion = run(against(versions, candidate=2.5))
    assert promotion.refused
    assert registry.aliases() == {"champion": 1}
    assert "version 2, version 1 stays champion: auc failed: " in promotion.summary
    assert registry.version_tags(2)["gate"] == "failed"


def test_the_verdict_and_its_page_are_artefacts_of_the_versions_run(versions: Path) -> None:
    from mlflow.artifacts import download_artifacts

    run(against(versions, candidate=2.5))
    folder = registry.version_tags(2)["gate_page"].rpartition("/")[0]
    run_id = registry.connect().get_model_version(registry.NAME, "2").run_id
    files = Path(download_artifacts(run_id=run_id, artifact_path=folder, dst_path=str(versions / "fetched")))
    assert sorted(file.name for file in files.iterdir()) == ["gates.html", "verdict.json"]
    record = read_json(files / "verdict.json")
    assert record == read_json(versions / "gates/version-2/verdict.json")
    assert (record["version"], record["champion"], record["passed"], record["state"]) == (2, 1, False, "failed")
    assert record["policy"] == policy().model_dump(mode="json")
    assert "Version 2 is refused" in (files / "gates.html").read_text()


def test_a_forced_promotion_keeps_its_reason_until_the_gates_run_again(versions: Path) -> None:
    options = against(versions, candidate=2.5)
    promotion = run(options, force=True, reason="the champion leaks prompts")
    assert not promotion.refused
    assert registry.aliases() == {"champion": 2, "previous": 1}
    tags = registry.version_tags(2)
    assert (tags["gate"], tags["gate_reason"]) == ("forced", "the champion leaks prompts")
    assert tags["gate.auc"].startswith("failed: ")
    registry.undo()
    run(options)
    assert registry.version_tags(2)["gate"] == "failed"
    assert "gate_reason" not in registry.version_tags(2)


def test_force_is_not_recorded_for_a_version_that_passes(versions: Path) -> None:
    run(against(versions, candidate=0.6), force=True, reason="in a hurry")
    assert registry.version_tags(2)["gate"] == "passed"


def test_the_first_champion_needs_no_comparison(versions: Path) -> None:
    promotion = workflow.run(PromoteConfig(version=1, output=versions / "gates"), policy())
    assert registry.aliases() == {"champion": 1}
    assert [gate.name for gate in promotion.verdict.gates if gate.status == "passed"] == ["checkpoint"]
    tags = registry.version_tags(1)
    assert (tags["gate"], tags["gate_against"]) == ("unmeasured", "none")
    assert "the quality of its decisions is unmeasured" in promotion.summary
    page = (versions / "gates/version-1/gates.html").read_text()
    assert "Version 1 may become the champion, with unmeasured quality" in page


def test_the_first_champion_with_an_evaluation_passes(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    registry.connect().delete_registered_model_alias(registry.NAME, "champion")
    promotion = run(options)
    assert (registry.version_tags(2)["gate"], registry.version_tags(2)["gate_against"]) == ("passed", "none")
    assert "unmeasured" not in promotion.summary


def test_a_second_version_without_evaluations_is_refused_with_the_way_out(versions: Path) -> None:
    registry.promote(1)
    promotion = run({"output": versions / "gates"})
    assert promotion.refused
    assert (
        "auc, brier, p_auccc_exact, headroom_captured, benchmarks not measured: no evaluation of checkpoint"
        in promotion.summary
    )
    assert "run jobs.evaluate, or give --outcomes and --activations" in promotion.summary


def test_tracked_evaluations_are_found_by_themselves(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    for name, number in ((CHAMPION, 1), (CANDIDATE, 2)):
        with registry.track("evaluate", policy(), {"checkpoint_id": registry.checkpoint_of(number)}) as tracked:
            for file in ("predictions.parquet", "metrics.json"):
                tracked.log_artifact(versions / name / file, "evaluation")
    explicit = workflow.measure(2, registry.checkpoint_of(2), 1, sources(options), policy())
    found = workflow.measure(2, registry.checkpoint_of(2), 1, sources({}), policy())
    assert found.paired is not None
    assert found.to_json() == explicit.to_json()


def test_an_evaluation_whose_files_cannot_be_fetched_is_not_said_to_be_missing(versions: Path) -> None:
    checkpoint = registry.checkpoint_of(2)
    with registry.track("evaluate", policy(), {"checkpoint_id": checkpoint}):
        pass
    with pytest.raises(InputError, match="its files cannot be fetched from the artefact store"):
        registry.fetch_evaluation(checkpoint, ["metrics.json"], versions / "fetched")


def sources(options: Mapping[str, Any]) -> Any:
    return workflow.Sources(options.get("evaluation"), options.get("champion_evaluation"))


def test_an_evaluation_of_another_checkpoint_is_not_used(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    promotion = run(options, evaluation=options["champion_evaluation"], champion_evaluation=options["evaluation"])
    assert promotion.refused
    assert "is the evaluation of checkpoint" in promotion.summary


def test_a_checkpoint_that_cannot_route_gets_no_alias_at_all(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    router = tiny_router("a" * 16, "middle")
    (weight, bias), *_ = router.ensemble.layers
    broken = replace(router, ensemble=replace(router.ensemble, layers=((weight * np.nan, bias),)))
    save_checkpoint(broken, versions / "broken")
    number = registry.register(versions / "broken").number
    for how in (
        {"alias": "shadow"},
        {"alias": "candidate"},
        {"output": options["output"]},
        {"output": options["output"], "force": True, "reason": "now"},
    ):
        promotion = workflow.run(PromoteConfig(version=number, **how), policy())
        assert promotion.refused, how
        assert "192 of 192 are not finite" in promotion.summary
    assert registry.aliases() == {"champion": 1}
    assert registry.version_tags(number)["gate"] == "failed"


def test_a_version_whose_files_are_damaged_in_the_store_is_refused(store: Path) -> None:
    save_checkpoint(tiny_router("a" * 16), store / "cheap")
    number = registry.register(store / "cheap").number
    (tensors,) = (store / "mlartifacts").rglob("checkpoint.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    promotion = workflow.run(PromoteConfig(version=number, alias="candidate"), policy())
    assert promotion.refused
    assert "sha256 differs" in promotion.summary


def test_a_candidate_whose_pool_lacks_a_model_is_refused(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    whole = tiny_router("a" * 16, "dear")
    (weight, bias), *_ = whole.ensemble.layers
    costs = {name: value[:2] for name, value in vars(whole.costs).items() if isinstance(value, np.ndarray)}
    smaller = replace(
        whole,
        pool=type(whole.pool)(models=whole.pool.models[:2]),
        ensemble=replace(whole.ensemble, layers=((weight[:, :, :2], bias[:, :2]),)),
        calibrator=type(whole.calibrator)(whole.calibrator.slope[:2], whole.calibrator.offset[:2]),
        costs=replace(whole.costs, **costs),
    )
    save_checkpoint(smaller, versions / "smaller")
    number = registry.register(versions / "smaller").number
    promotion = workflow.run(PromoteConfig(version=number, output=options["output"]), policy())
    assert promotion.refused
    assert "pool failed: lacks dear; see pool.may_remove" in promotion.summary


def test_a_version_that_a_server_stopped_as_a_canary_is_refused(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    registry.connect().set_model_version_tag(registry.NAME, "2", "rollout", "stopped: errors")
    promotion = run(options)
    assert promotion.refused
    assert "champion: canary failed: stopped: errors; page" in promotion.summary
    assert registry.version_tags(2)["rollout"] == "stopped: errors"


def test_the_candidate_is_promoted_by_its_alias_which_it_gives_up(versions: Path) -> None:
    options = against(versions, candidate=0.6)
    workflow.run(PromoteConfig(version=2, alias="candidate"), policy())
    workflow.run(PromoteConfig(version=2, alias="shadow"), policy())
    assert registry.aliases() == {"candidate": 2, "champion": 1, "shadow": 2}
    workflow.run(PromoteConfig(candidate=True, **options), policy())
    assert registry.aliases() == {"champion": 2, "previous": 1, "shadow": 2}
    workflow.run(PromoteConfig(alias="shadow", clear=True), policy())
    workflow.run(PromoteConfig(undo=True), policy())
    assert registry.aliases() == {"champion": 1, "previous": 2}
    with pytest.raises(InputError, match="no version has the alias `candidate`"):
        workflow.run(PromoteConfig(candidate=True), policy())


def test_a_champion_that_changes_meanwhile_stops_the_promotion(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = against(versions, candidate=0.6)
    third = 3
    measure = workflow.measure

    def another_promotes(*args: Any) -> Any:
        registry.promote(third)
        return measure(*args)

    monkeypatch.setattr(workflow, "measure", another_promotes)
    with pytest.raises(InputError, match="it changed while the gates ran"):
        run(options)
    assert registry.aliases() == {"champion": third, "previous": 1}
    assert "gate" not in registry.version_tags(2)


def test_a_refusal_is_one_line_and_exit_code_1(
    versions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = against(versions, candidate=2.5)
    monkeypatch.setattr("jobs.promote.load_policy", lambda _: policy())
    with pytest.raises(SystemExit) as end:
        promote(PromoteConfig(version=2, **options))
    assert str(end.value).startswith("promote: refused: version 2, version 1 stays champion: auc failed: ")
    assert "\n" not in str(end.value)
    assert "benchmarks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of --version N, --candidate and --undo"),
        ({"version": 1, "candidate": True}, "give one of --version N, --candidate and --undo"),
        ({"version": 1, "force": True}, "give --force and --reason TEXT together"),
        ({"version": 1, "reason": "why"}, "give --force and --reason TEXT together"),
        ({"version": 1, "alias": "shadow", "force": True, "reason": "why"}, "force: it only applies to gates"),
        ({"version": 1, "outcomes": "o.parquet"}, "give --outcomes and --activations together"),
        ({"clear": True}, "clear: give it with --alias candidate or --alias shadow"),
        ({"clear": True, "alias": "shadow", "version": 1}, "clear: give it with --alias"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromoteConfig(**options)


def test_the_stated_policy_states_every_field() -> None:
    assert set(GatePolicy.model_fields) == load_policy(POLICY).model_fields_set
