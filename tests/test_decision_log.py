"""The decision log: what is written, read again, rotated and lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefill_router.decisions.log import read_log
from serve import decision_log
from serve.decision_log import DecisionLog, DecisionLogConfig


def test_a_decision_its_answer_and_feedback_are_found_in_memory_and_on_disk(tmp_path: Path) -> None:
    log = DecisionLog(DecisionLogConfig(folder=tmp_path / "log"))
    log.note("a", "decision", {"model": "x"})
    log.note("b", "decision", {"model": "y"})
    log.note("a", "answer", {"served": "x"})
    for score in (0.0, 1.0):
        log.note("a", "feedback", {"score": score})
    log.close()
    for found in (log.recent("a"), log.find("a")):
        assert found is not None
        assert (found["decision"]["model"], found["answer"]["served"]) == ("x", "x")
        assert [one["score"] for one in found["feedback"]] == [0.0, 1.0]
        assert found["decision"]["time"] <= found["answer"]["time"]
    assert log.recent("c") is log.find("c") is None
    assert [record["kind"] for record in read_log(tmp_path / "log")] == [
        "decision",
        "decision",
        "answer",
        "feedback",
        "feedback",
    ]


def test_another_replica_finds_the_decision(tmp_path: Path) -> None:
    first, second = (DecisionLog(DecisionLogConfig(folder=tmp_path)) for _ in range(2))
    first.note("a", "decision", {"model": "x"})
    first.close()
    assert second.recent("a") is None
    second.note("a", "feedback", {"score": 1.0})
    second.close()
    assert second.recent("a") is None
    found = second.find("a")
    assert found is not None
    assert (found["decision"]["model"], [one["score"] for one in found["feedback"]]) == ("x", [1.0])


def redacted(prompt: str) -> str | None:
    """The redaction of the tests below."""
    if prompt == "fails":
        raise ValueError(prompt)
    return {"none": None, "number": 7}.get(prompt, prompt.replace("4711", "[number]"))  # type: ignore[return-value]


def test_prompts_are_redacted_or_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DecisionLogConfig(folder=tmp_path, prompts=True, redact=f"{__name__}:redacted")
    log = DecisionLog(config)
    for name in ("card 4711", "none", "fails", "number"):
        log.note(name, "decision", {"prompt": name})
    log.note("without", "decision", {"model": "x"})
    log.close()
    records = {record["decision_id"]: record for record in read_log(tmp_path)}
    logged = {name: record.get("prompt", "absent") for name, record in records.items()}
    assert logged == {"card 4711": "card [number]", "none": None, "fails": None, "number": None, "without": "absent"}
    assert "ValueError" in caplog.text
    assert "fails" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": True, "redact": "no_module:f"}, "no_module.*MODULE:FUNCTION"),
        ({"prompts": True, "redact": "json:f"}, "json:f.*MODULE:FUNCTION"),
        ({"prompts": True, "redact": "json:__name__"}, "type str; give a function"),
        ({"redact": "json:dumps"}, "no prompts are logged; set prompts to true"),
    ],
)
def test_a_redaction_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DecisionLogConfig(**settings)


def test_memory_holds_no_prompt_and_a_bounded_number_of_feedback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "RECENT_FEEDBACK", 2)
    log = DecisionLog(DecisionLogConfig(folder=tmp_path))
    log.note("a", "decision", {"prompt": "long"})
    for _ in range(5):
        log.note("a", "feedback", {"score": 1.0})
    log.close()
    recent, found = log.recent("a"), log.find("a")
    assert recent is not None
    assert found is not None
    assert ("prompt" in recent["decision"], len(recent["feedback"])) == (False, 2)
    assert ("prompt" in found["decision"], len(found["feedback"])) == (False, 5)


def test_without_a_folder_the_last_decisions_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "RECENT", 2)
    log = DecisionLog(DecisionLogConfig())
    for name in "abc":
        log.note(name, "decision", {})
    assert [log.recent(name) is None for name in "abc"] == [True, False, False]
    assert log.find("a") is None
    log.close()


def test_full_files_are_replaced_and_old_ones_deleted(tmp_path: Path) -> None:
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, file_bytes=200, files=2))
    number = 0
    for index in range(20):
        line = json.dumps({"decision_id": str(index), "kind": "decision", "pad": "x" * 50})
        number = log._append(f"{line}\n", number)
    log.close()
    kept = [record["decision_id"] for record in read_log(tmp_path)]
    assert len(list(tmp_path.iterdir())) == 2
    assert kept == ["16", "17", "18", "19"]  # two in a file


def test_a_line_that_was_cut_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "decisions-x-000000.jsonl").write_bytes(b'{"decision_id": "a", "kind": "answer"}\n[]\n{"decision_i\xff')
    assert list(read_log(tmp_path)) == [{"decision_id": "a", "kind": "answer"}]


def test_records_that_arrive_too_fast_or_cannot_be_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()

    def stuck(self: DecisionLog, text: str, number: int) -> int:
        entered.set()
        go.wait(10)
        raise OSError("No space left on device")

    monkeypatch.setattr(DecisionLog, "_append", stuck)
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, waiting=2))
    values: dict[str, Any] = {}
    log.note("first", "decision", values)
    assert entered.wait(10)
    for index in range(5):
        log.note(str(index), "decision", values)
    assert log.lost == 3
    go.set()
    log.close()
    assert log.lost == 6
    assert log.recent("4") is not None


def test_the_latest_decisions_are_those_of_the_key() -> None:
    log = DecisionLog(DecisionLogConfig())
    for name, key in (("a", "one"), ("b", "two"), ("c", "one")):
        log.note(name, "decision", {"key": key})
    assert [one["decision_id"] for one in log.latest(5, "one")] == ["c", "a"]
    assert [one["decision_id"] for one in log.latest(2)] == ["c", "b"]
