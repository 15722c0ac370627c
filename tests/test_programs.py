"""Programs against tests, and LiveCodeBench over files in the layout of its release."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed; pip install 'prefill-router[eval]'")

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from prefill_router.collect.livecodebench import livecodebench
from prefill_router.collect.programs import Case, passes, passes_check
from prefill_router.collect.sandbox import check_host
from prefill_router.collect.tasks import questions_task
from prefill_router.errors import InputError

DOUBLE = "n = int(input())\nprint(2 * n)"
STARTER = "class Solution:\n    def widest(self, widths: List[int]) -> int:\n        "


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    try:
        check_host()
    except InputError as error:
        pytest.skip(f"no sandbox: {error}")


def run(program: str, *cases: tuple[str, str], function: str | None = None, seconds: float = 10.0) -> tuple[bool, str]:
    return asyncio.run(passes(program, [Case(*case) for case in cases], function, seconds))


def test_a_program_passes_if_all_outputs_are_right() -> None:
    assert run(DOUBLE, ("3\n", "6\n"), ("-1\n", "-2")) == (True, "2 tests passed")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print(6)", r"test 2 of 2: line 1 is '6', expected '-2'"),
        ("n = int(input())\nprint(2 * n)\nprint()\nprint('done')", r"test 1 of 2: 3 lines of output, expected 1"),
        ("print(1 / 0)", r"test 1 of 2: exit code 1, ZeroDivisionError: division by zero"),
        ("while True: pass", r"test 1 of 2: stopped by the limit of time"),
        ("import sys; sys.exit(0)", r"test 1 of 2: 0 lines of output, expected 1"),
        ("def f(:", r"test 1 of 2: exit code 1, SyntaxError"),
    ],
)
def test_a_program_that_is_wrong_fails_with_its_first_fault(program: str, why: str) -> None:
    passed, reason = run(program, ("3\n", "6\n"), ("-1\n", "-2"), seconds=2.0)
    assert not passed
    assert reason.startswith(why)


def test_spaces_at_the_ends_and_the_form_of_numbers_do_not_count() -> None:
    assert run("print('1.50  2 \\n\\n')", ("", "1.5 2"))[0]
    assert not run("print('1.51 2')", ("", "1.5 2"))[0]
    assert not run("print('nan')", ("", "yes"))[0]


def test_a_function_is_called_with_its_arguments() -> None:
    program = f"{STARTER}return max(widths)"
    assert run(program, ("[1, 5, 2]", "5"), ("[-1]", "-1"), function="widest") == (True, "2 tests passed")
    passed, why = run(program, ("[1, 5, 2]", "4"), function="widest")
    assert (passed, why) == (False, "test 1 of 1: the result is 5, expected 4")


def test_a_function_outside_a_class_and_a_future_import_are_fine() -> None:
    program = "from __future__ import annotations\ndef pair(a: List[int], b: int): return (a, b)"
    assert run(program, ("[1]\n2", "[[1], 2]"), function="pair")[0]


def test_output_of_a_function_does_not_count_as_its_result() -> None:
    assert run(f"{STARTER}print(9); return 1", ("[0]", "1"), function="widest")[0]
    assert not run(f"{STARTER}print(1)", ("[0]", "1"), function="widest")[0]


def test_a_check_sees_the_names_of_the_program() -> None:
    program = "def double(n): return 2 * n"
    assert asyncio.run(passes_check(program, "assert double(4) == 8"))[0]
    passed, why = asyncio.run(passes_check(program, "assert double(4) == 9"))
    assert not passed
    assert why == "exit code 1, AssertionError"


def test_a_program_that_ends_early_does_not_pass_a_check() -> None:
    passed, why = asyncio.run(passes_check("import os; os._exit(0)", "assert False"))
    assert (passed, why) == (False, "the check did not reach its end")


def test_no_tests_are_no_success() -> None:
    assert run(DOUBLE) == (False, "there are no tests")


def evaluated(task: Task, answers: list[str], folder: Path) -> list[Any]:
    """The samples of a log of `task`, with these answers in order."""
    usage = ModelUsage(
        input_tokens=1, output_tokens=1, total_tokens=2
    )  # mockllm would count with a file of the network
    outputs = [ModelOutput.from_content("mockllm/model", text).model_copy(update={"usage": usage}) for text in answers]
    (log,) = inspect_eval(
        task,
        model=get_model("mockllm/model", custom_outputs=outputs, memoize=False),
        log_dir=str(folder / "logs"),
        display="none",
        max_samples=1,
        log_realtime=False,
        ctl_server=False,
    )
    assert log.samples is not None
    return log.samples


# LiveCodeBench


def problem(number: int, **changes: Any) -> dict[str, Any]:
    private = json.dumps([{"input": "5\n", "output": "10\n", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    return {
        "question_title": "Twice",
        "question_content": "A number is given. Print twice the number.",
        "platform": "atcoder",
        "question_id": f"abc{number}_a",
        "contest_id": f"abc{number}",
        "contest_date": f"2024-0{number}-15T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
        "private_test_cases": packed,
        "metadata": "{}",
    } | changes


CALLED = {
    "question_content": "Return the widest of the boards.",
    "platform": "leetcode",
    "starter_code": STARTER,
    "public_test_cases": json.dumps([{"input": "[1, 5]", "output": "5", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "[7, 2]", "output": "7", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "widest"}),
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Two files: release v1 has two problems, v2 three."""
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(problem(1))}\n{json.dumps(problem(2, **CALLED))}\n")
    (tmp_path / "test2.jsonl").write_text(f"{json.dumps(problem(3, difficulty='hard'))}\n")
    return tmp_path


def ids(folder: Path, **given: Any) -> list[Any]:
    return [sample.id for sample in livecodebench(str(folder), **given).dataset]


def test_a_release_has_the_files_up_to_its_number(release: Path) -> None:
    assert ids(release, release=1) == ["abc1_a", "abc2_a"]
    assert ids(release, release=2) == ["abc1_a", "abc2_a", "abc3_a"]
    with pytest.raises(InputError, match=r"test3.jsonl: no such file; release 6"):
        ids(release)
    with pytest.raises(InputError, match="release: got 7, allowed is 1 to 6"):
        ids(release, release=7)


def test_problems_are_chosen_by_day_and_difficulty(release: Path) -> None:
    assert ids(release, release=2, since="2024-02-15", before="2024-03-15") == ["abc2_a"]
    assert ids(release, release=2, difficulty="hard") == ["abc3_a"]
    with pytest.raises(InputError, match="since: got 'May', expected a day as YYYY-MM-DD"):
        ids(release, release=2, since="May")
    with pytest.raises(InputError, match="no problem in these days"):
        ids(release, release=2, since="2025-01-01")


def test_pass_at_1_needs_the_private_tests_too(release: Path) -> None:
    answers = {
        "abc1_a": f"```python\n{DOUBLE}\n```",
        "abc2_a": f"```python\n{STARTER}return sorted(widths)[-1]\n```",
        "abc3_a": "```python\nprint(6)\n```",  # passes the public test alone
    }
    samples = evaluated(livecodebench(str(release), 2), list(answers.values()), release)
    scores = {sample.id: sample.scores["passes_all_tests"] for sample in samples}
    assert {name: score.value for name, score in scores.items()} == {"abc1_a": 1.0, "abc2_a": 1.0, "abc3_a": 0.0}
    assert scores["abc3_a"].explanation == "test 2 of 2: line 1 is '6', expected '10'"
    assert "starter_code" not in samples[1].metadata


class _Harm:
    def __reduce__(self) -> Any:
        return (print, ("harm",))


@pytest.mark.parametrize("packed", ["no base64", base64.b64encode(zlib.compress(pickle.dumps(_Harm()))).decode()])
def test_tests_that_are_no_text_are_refused(tmp_path: Path, packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(problem(1, private_test_cases=packed)))
    with pytest.raises(InputError, match=r"test.jsonl, line 1: the tests cannot be read"):
        ids(tmp_path, release=1)
    assert "harm" not in capsys.readouterr().out


# Questions of one's own with programs


def test_own_questions_with_programs_are_scored_in_the_sandbox(tmp_path: Path) -> None:
    questions = [
        {"question": "Twice", "kind": "code", "tests": [{"input": "2\n", "output": "4\n"}]},
        {"question": "double(n)", "kind": "code", "tests": ["assert double(2) == 4", "assert double(0) == 0"]},
        {"question": "Nothing", "kind": "code", "tests": ["assert True"]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in questions))
    answers = [f"```python\n{DOUBLE}\n```", "```python\ndef double(n): return n + n\n```", "I cannot."]
    samples = evaluated(questions_task(path), answers, tmp_path)
    scores = [sample.scores["graded"] for sample in samples]
    assert [score.value for score in scores] == [1.0, 1.0, 0.0]
    assert [score.metadata["parsed"] for score in scores] == [True, True, False]
