"""The final answer in the text of a model, and its score by comparison with the right one.

In: the text of an answer. Out: a letter, a number, a text or a program; None if the text does not state it clearly. The
last statement of an answer is the final one. Without a statement, only a text or a last line that is nothing but the
answer is read. No letter or number of other prose is taken, because a wrong extraction scores a right answer as wrong.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from fractions import Fraction

import regex

from prefill_router.collect import numbers
from prefill_router.collect.choices import choice
from prefill_router.collect.numbers import same_number
from prefill_router.collect.questions import Question
from prefill_router.collect.statements import (
    LONGEST,
    comparable,
    first_sentence,
    lines_of,
    normalised,
    plain,
    retracted,
    statements,
    without_reasoning,
)

REGEX_SECONDS = 1.0
REGEX_CHARACTERS = 10_000
FEW_WORDS = 10  # at most, of an answer that is not in the form that the prompt asks for

SENTENCE = re.compile(r"\b(?:is|are|was|were|am|has|have|had|do|does|not|cannot|can't|it|I|you|we)\b")
NO_ANSWER = re.compile(
    r"^(?:not|in|that|because|clear\w*|obvious\w*|unclear|unknown|as follows|below|above|given|found|based|known|"
    r"likely|probably|somewhat|yet|what|which|how|why)\b",
    re.IGNORECASE,
)
FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})[ \t]*([^`\s]*)[^`\n]*$")
PYTHON = {"python", "py", "python3", "py3", "python2", "{python}", "{.python}"}
TEST = re.compile(r"^(?:import|from) (?:unittest|pytest)\b|^(?:def test_|class Test)", re.MULTILINE)
PROGRAM = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Grade:
    """The score of an answer. `score` is None if the answer was not parsed, or if it could not be compared.

    `extracted` is the final answer as text, and `why` the reason of the score.
    """

    score: float | None
    extracted: str | None
    parsed: bool
    why: str


def grade(question: Question, text: str) -> Grade:
    """The score of an answer to a question of kind exact, numeric, regex or choice: 1 right, 0 wrong.

    Raises ValueError for another kind, which needs a program or a judge.
    """
    match question.kind:
        case "choice":
            letter = choice(text, question.letters, question.choices)
            return _grade(letter, letter == question.letter, question.letter)
        case "numeric":
            value = number(text)
            right = value is not None and same_number(value, question.number, question.tolerance)
            return _grade(None if value is None else numbers.shown(value), right, numbers.shown(question.number))
        case "exact":
            given = final_text(text)
            right = given is not None and any(same_text(given, wanted) for wanted in question.accepted)
            return _grade(given, right, " or ".join(question.accepted))
        case "regex":
            return _by_pattern(str(question.answer), final_text(text))
    raise ValueError(f"kind: {question.kind!r} cannot be compared; it needs a program or a judge")


def number(text: str) -> Fraction | None:
    """The number that an answer states. None if it states none, several, a range or a symbol such as π."""
    rest = without_reasoning(text)
    if rest is None:
        return None
    rest = normalised(rest)
    for one in reversed(found := statements(rest)):
        value = numbers.parse(one.payload, words_before=one.formal)
        if value is not None:
            return None if retracted(rest, found[-1]) else value
        if one.formal or re.search(r"\d", one.payload):
            return None
    lines = lines_of(rest)
    if not lines or len(lines[-1]) > LONGEST or re.search(r"[.!?]\s+\w", lines[-1]):
        return None
    if len(lines) > 1 and re.search(r"=|^\W*\d+[.)]$", lines[-1]):
        return None  # it may be a step of a calculation, or the beginning of a list
    return numbers.parse(lines[-1], words_before=False)


def final_text(text: str) -> str | None:
    """The text that an answer states, without Markdown, quotes and the full stop. None if it states none."""
    rest = without_reasoning(text)
    if rest is None:
        return None
    rest = normalised(rest)
    for one in reversed(found := statements(rest)):
        given = plain(first_sentence(plain(one.payload)))
        if given and (one.formal or (len(given.split()) <= FEW_WORDS and not NO_ANSWER.match(given))):
            return None if retracted(rest, found[-1]) else given
        if one.formal:
            return None
    lines = lines_of(rest)
    bold = bool(lines) and re.fullmatch(r"\*\*[^*]+\*\*\.?", lines[-1]) is not None
    if not lines or len(lines[-1]) > LONGEST or (len(lines) > 1 and not bold):
        return None
    given = plain(lines[-1]).rstrip(".").rstrip()
    return given if given and len(given.split()) <= FEW_WORDS and not SENTENCE.search(given) else None


def same_text(given: str, wanted: str) -> bool:
    """Whether two texts are equal up to case, white space, quotes, Markdown, a final full stop and a leading article.

    An explanation in parentheses at the end of `given` may be missing in `wanted`.
    """
    shortened = re.sub(r"(?<=\S)\s+\([^()]*\)$", "", given.strip().rstrip("."))
    return comparable(wanted) in (comparable(given), comparable(shortened))


def code(text: str) -> str | None:
    """The Python program of an answer: the last complete code block that defines something or reads input.

    Blocks of tests do not count. Without such a block, it is the last complete block of Python, or the whole text if
    that is a program. None if there is none, or if the last block has no end: the answer was truncated.
    """
    rest = without_reasoning(text)
    blocks = None if rest is None else _blocks(rest)
    if rest is None or blocks is None:
        return None
    python = [body for language, body in blocks if language in PYTHON or (not language and _is_program(body))]
    programs = [body for body in python if _is_program(body) and not TEST.search(body)]
    if programs or python:
        return (programs or python)[-1]
    return rest.strip() if not blocks and _is_program(rest) else None


def _grade(extracted: str | None, right: bool, wanted: str) -> Grade:
    if extracted is None:
        return Grade(None, None, False, "the answer states no final answer, or several")
    return Grade(float(right), extracted, True, "equal" if right else f"not equal to {wanted[:80]}")


def _by_pattern(pattern: str, given: str | None) -> Grade:
    """The pattern is searched in the beginning of the final answer, for a limited time: some patterns take years."""
    if given is None:
        return _grade(None, False, pattern)
    try:
        found = regex.search(pattern, given[:REGEX_CHARACTERS], timeout=REGEX_SECONDS)
    except TimeoutError:
        return Grade(None, given, True, f"the pattern takes more than {REGEX_SECONDS:g} s; simplify it")
    return Grade(float(found is not None), given, True, f"{'matches' if found else 'does not match'} {pattern[:80]}")


def _blocks(text: str) -> list[tuple[str, str]] | None:
    """The fenced code blocks as (language, content), by the rules of CommonMark. None if the last one has no end."""
    blocks, fence, language, indent, body = list[tuple[str, str]](), "", "", 0, list[str]()
    for line in text.splitlines():
        found = FENCE.match(line)
        if not fence:
            if found:
                indent, fence, language, body = len(found[1]), found[2], found[3].lower(), []
        elif found and found[2].startswith(fence) and not found[3] and not line[found.end(2) :].strip():
            blocks.append((language, textwrap.dedent("\n".join(body)) if indent else "\n".join(body)))
            fence = ""
        else:
            body.append(line)
    return None if fence else blocks


def _is_program(text: str) -> bool:
    """Whether a text is Python that defines something, imports a module, or reads input or prints."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(one, PROGRAM) for one in tree.body) or bool(re.search(r"\b(?:input\(|stdin\b)", text))
