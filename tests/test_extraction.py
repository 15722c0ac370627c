"""Extraction of final answers: answers in the styles of models, comparison, and scores.

tests/data/answers.jsonl has the answers. `expected` is what a careful reader extracts; null: the answer states nothing
clearly. `known_error`: the extraction differs from it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.collect import extraction, numbers
from prefill_router.collect.extraction import Grade, grade, same_number, same_text
from prefill_router.collect.questions import Question

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]
PAGE = Path(__file__).parents[1] / "docs" / "questions.md"
KINDS = ("choice", "numeric", "exact", "code")


def extracted(case: dict[str, Any]) -> str | Fraction | None:
    text, choices = case["text"], case.get("choices")
    match case["kind"]:
        case "choice":
            return extraction.choice(text, case.get("letters") or len(choices), choices)
        case "numeric":
            return extraction.number(text)
        case "exact":
            return extraction.final_text(text)
    return extraction.code(text)


def expected(case: dict[str, Any]) -> str | Fraction | None:
    wanted = case["expected"]
    return Fraction(wanted) if case["kind"] == "numeric" and wanted is not None else wanted


def question(kind: str, answer: Any, **fields: Any) -> Question:
    return Question(id="1", benchmark="own", question="Which?", kind=kind, answer=answer, **fields)


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case['kind']}" for n, case in enumerate(CASES, 1)])
def test_the_final_answer_is_extracted(case: dict[str, Any]) -> None:
    assert (extracted(case) != expected(case)) == case.get("known_error", False), (extracted(case), expected(case))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_counts_of_the_answers(kind: str) -> None:
    counts = Counter[str]()
    for case in (one for one in CASES if one["kind"] == kind):
        found = extracted(case)
        counts["right" if found == expected(case) else "not parsed" if found is None else "wrong"] += 1
    row = f"| {kind} | {counts.total()} | {counts['right']} | {counts['not parsed']} | {counts['wrong']} |"
    assert row in PAGE.read_text(encoding="utf-8")


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{:d}", "{:,d}", "${:d}$", "**{:,d}**", "{:d} apples", "{:.1f}"])
)
def test_a_stated_integer_is_read_in_every_format(value: int, form: str) -> None:
    assert extraction.number(f"Answer: {form.format(value)}") == value


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_read_as_text_and_as_latex(top: int, bottom: int) -> None:
    latex = rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}"
    assert extraction.number(f"Answer: {top}/{bottom}") == extraction.number(latex) == Fraction(top, bottom)


@given(st.text(alphabet="ABCDI ()*.,:?\nansweri\\boxed{}/</think>`0123456789=-", max_size=80))
def test_any_text_is_accepted(text: str) -> None:
    letter = extraction.choice(text, 4, ["Rome", "Paris", "Bern", "Oslo"])
    assert letter is None or letter in "ABCD"
    extraction.number(text)
    extraction.final_text(text)
    extraction.code(text)


@pytest.mark.parametrize(
    "text", ["answer " * 20_000, r"\boxed{" * 5_000, "1," * 50_000, "**" * 50_000, "```\n" * 20_001, "(" * 100_000]
)
def test_a_repetition_takes_little_time(text: str) -> None:
    start = time.process_time()
    extraction.choice(text, 4)
    extraction.number(text)
    extraction.final_text(text)
    extraction.code(text)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("given_number", "wanted", "tolerance", "equal"),
    [
        ("1000000008", "1000000007", None, False),
        ("0.3333333", "1/3", None, True),
        ("0.333", "1/3", None, False),
        ("0.333", "1/3", 0.001, True),
        ("101", "100", 0.01, True),
        ("102", "100", 0.01, False),
        ("-5", "5", 0.5, False),
    ],
)
def test_numbers_are_compared_relative_to_the_answer(
    given_number: str, wanted: str, tolerance: float | None, equal: bool
) -> None:
    assert same_number(Fraction(given_number), Fraction(wanted), tolerance) is equal


@pytest.mark.parametrize(
    ("text", "wanted", "equal"),
    [
        ("the  eiffel tower.", "Eiffel Tower", True),
        ("**Paris**", "paris", True),
        ("“Hamlet”", '"Hamlet"', True),
        ("Paris (France)", "Paris", True),
        ("f(x)", "f", False),
        ("Cafe\u0301", "café", True),
        ("resume", "résumé", False),
        ("A", "a", True),
    ],
)
def test_texts_are_compared_without_their_form(text: str, wanted: str, equal: bool) -> None:
    assert same_text(text, wanted) is equal


@pytest.mark.parametrize(
    ("one", "text", "result"),
    [
        (question("choice", "B", choices=["Rome", "Paris"]), "Answer: B", (1.0, "B", True)),
        (question("choice", "Paris", choices=["Rome", "Paris"]), "Answer: A", (0.0, "A", True)),
        (question("choice", "B"), "A or B, I cannot say.", (None, None, False)),
        (question("numeric", 2.5), "Answer: 5/2", (1.0, "2.5", True)),
        (question("numeric", "1/3"), "Answer: 2/3", (0.0, "2/3", True)),
        (question("exact", ["NYC", "New York"]), "Answer: new york.", (1.0, "new york", True)),
        (question("exact", "Paris"), "Answer: Rome", (0.0, "Rome", True)),
        (question("regex", r"^[a-f\d]{4}$"), "Answer: 0af3", (1.0, "0af3", True)),
        (question("regex", r"^[a-f\d]{4}$"), "Answer: 0af3x", (0.0, "0af3x", True)),
        (question("regex", "a"), "<think>a", (None, None, False)),
    ],
)
def test_a_comparable_answer_has_a_score(
    one: Question, text: str, result: tuple[float | None, str | None, bool]
) -> None:
    found = grade(one, text)
    assert (found.score, found.extracted, found.parsed) == result


def test_a_slow_pattern_gives_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "REGEX_SECONDS", 0.05)
    found = grade(question("regex", r"^(\w|\w\w)*$"), f"Answer: {'a' * 200}!b")
    assert found == Grade(None, f"{'a' * 200}!b", True, "the pattern takes more than 0.05 s; simplify it")


def test_a_grade_names_the_right_answer() -> None:
    assert grade(question("numeric", 7), "Answer: 8").why == "not equal to 7"


@pytest.mark.parametrize("kind", ["code", "judge"])
def test_a_kind_that_cannot_be_compared_is_refused(kind: str) -> None:
    fields = {"answer": "a"} if kind == "judge" else {"answer": None, "tests": ["assert f()"]}
    with pytest.raises(ValueError, match=f"kind: '{kind}' cannot be compared"):
        grade(question(kind, **fields), "Answer: a")


@pytest.mark.parametrize(("value", "text"), [("3", "3"), ("157/50", "3.14"), ("1/3", "1/3"), ("-1/4", "-0.25")])
def test_a_number_is_shown_as_a_decimal_if_it_has_an_end(value: str, text: str) -> None:
    assert numbers.shown(Fraction(value)) == text
