"""Questions of own benchmarks: the fields of each kind, refused lines, and prompts."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from prefill_router.collect.questions import Question, prompt, read_questions
from prefill_router.errors import InputError

VALID: dict[str, dict[str, Any]] = {
    "exact": {"answer": ["Paris", "City of Paris"]},
    "numeric": {"answer": 3.5, "tolerance": 0.01},
    "regex": {"answer": r"(?i)\bparis\b"},
    "choice": {"answer": "B", "choices": ["Rome", "Paris"]},
    "code": {"tests": ["assert add(1, 2) == 3"]},
    "judge": {"answer": "A good answer names the treaty."},
}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(kind: str = "exact", **fields: Any) -> Question:
    return Question(**{"id": "1", "benchmark": "own", "question": "Which city?", "kind": kind} | fields)


@pytest.mark.parametrize("kind", VALID)
def test_every_kind_is_read(kind: str, tmp_path: Path) -> None:
    one = read_questions(written(tmp_path, {"question": "Which city?", "kind": kind, **VALID[kind]}))[0]
    assert one == made(kind, **VALID[kind])


def test_id_and_benchmark_have_defaults(tmp_path: Path) -> None:
    row = {"question": "Which city?", "kind": "exact", "answer": "Paris"}
    first, second = read_questions(written(tmp_path, row, row | {"id": 17, "benchmark": "cities", "group": "france"}))
    assert (first.id, first.benchmark, first.group) == ("1", "own", None)
    assert (second.id, second.benchmark, second.group) == ("17", "cities", "france")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answr": "Paris"}, r"own\.jsonl, line 2: answr: unknown field.*leave it out"),
        ({"id": "1"}, r"own\.jsonl, line 2: id: '1' is also that of .*line 1"),
        ({"kind": "essay"}, r"kind: Input should be .*'judge'.*got 'essay'"),
        ({"answer": None}, r"answer: missing; a question of kind exact needs 'answer'"),
        ({"answer": True}, r"answer: must be text, a number or a list of texts.*got True"),
        ({"answer": []}, r"answer: must be text"),
        ({"choices": ["Rome", "Paris"]}, r"choices: kind exact has no 'choices'; leave it out.*choice"),
        ({"kind": "numeric"}, r"answer: 'Paris' is not one number; write it as"),
        ({"kind": "numeric", "answer": 1, "tolerance": 1}, r"tolerance: .*less than 1 \(got 1\)"),
        ({"kind": "numeric", "answer": float("inf")}, r"answer: got inf, it must be finite"),
        ({"kind": "numeric", "answer": ["1", "2"]}, r"answer: kind numeric takes one number"),
        ({"kind": "regex", "answer": "(Paris"}, r"answer: '\(Paris' is not a regular expression \(missing \)"),
        ({"kind": "choice", "choices": ["Rome", "Bern"]}, r"answer: 'Paris' is neither a letter from A to B nor one"),
        (
            {"kind": "choice", "choices": ["Rome", "Bern"], "answer": "C"},
            r"answer: 'C' is neither a letter from A to B",
        ),
        ({"kind": "choice", "choices": ["Paris", "Paris"]}, r"choices: a text is repeated"),
        ({"kind": "choice", "choices": ["B", "A"], "answer": "A"}, r"'A' is the letter of one choice and the text of"),
        ({"kind": "choice", "choices": [str(n) for n in range(27)], "answer": "A"}, r"choices: .*at most 26"),
        ({"kind": "choice"}, r"answer: 'Paris' is not a letter; give `choices`"),
        ({"kind": "code", "answer": None}, r"tests: missing; a question of kind code needs 'tests'"),
        ({"kind": "code", "answer": None, "tests": "assert f()"}, r"tests: must be a list of"),
        ({"kind": "code", "answer": None, "tests": ["assert f("]}, r"tests: 'assert f\(' is not Python"),
        ({"kind": "code", "answer": None, "tests": [{"input": "1"}]}, r"tests.*output: Field required"),
        ({"kind": "judge", "answer": ["a", "b"]}, r"answer: kind judge takes one reference answer"),
    ],
)
def test_an_invalid_question_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"question": "Which city?", "kind": "exact", "answer": "Paris"}
    with pytest.raises(InputError, match=message):
        read_questions(written(tmp_path, row, row | {"id": "two"} | fields))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own\.jsonl: no questions"):
        read_questions(written(tmp_path))


@pytest.mark.parametrize("answer", ["B", "b", "Paris"])
def test_the_answer_of_a_choice_is_a_letter_or_a_text(answer: str) -> None:
    assert made("choice", choices=["Rome", "Paris"], answer=answer).letter == "B"


def test_choices_may_be_numbers() -> None:
    one = made("choice", choices=[0.5, 12], answer=12)
    assert (one.choices, one.letter) == (("0.5", "12"), "B")


def test_letters_of_a_lettered_question_are_counted() -> None:
    text = "Which city?\n" + "\n".join(f"{letter}) city {letter}" for letter in "ABCDEF")
    assert made("choice", question=text, answer="B").letters == 6
    assert made("choice", question="Which of the figures?", answer="G").letters == 7


@pytest.mark.parametrize(
    ("answer", "number"), [(3, Fraction(3)), (0.1, Fraction(1, 10)), ("3/4", Fraction(3, 4)), ("1,200", Fraction(1200))]
)
def test_a_number_is_exact(answer: Any, number: Fraction) -> None:
    assert made("numeric", answer=answer).number == number


def test_the_prompt_letters_the_choices() -> None:
    expected = (
        'Which city?\n\nA) Rome\nB) Paris\n\nEnd with a line "Answer: X", where X is the letter of the right choice.'
    )
    assert prompt(made("choice", **VALID["choice"])) == expected


def test_the_prompt_says_how_a_program_is_tested() -> None:
    reads = made("code", tests=[{"input": "1 2\n", "output": "3\n"}])
    assert "standard input" in prompt(reads)
    assert "standard input" not in prompt(made("code", **VALID["code"]))


def test_the_prompt_of_a_judged_question_is_the_question() -> None:
    assert prompt(made("judge", **VALID["judge"])) == "Which city?"
