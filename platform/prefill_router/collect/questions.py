"""Questions of users' own benchmarks: JSON Lines, one question per line (docs/questions.md).

In: a file. Out: `Question` objects, and the prompt of each. Knows nothing of models and their answers.
"""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal

import regex
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prefill_router.collect import numbers
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.importing.records import Record, json_lines

Kind = Literal["exact", "numeric", "regex", "choice", "code", "judge"]

# Fields beside `question` of each kind: those that it needs, and those that it may have.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "exact": ({"answer"}, set()),
    "numeric": ({"answer"}, {"tolerance"}),
    "regex": ({"answer"}, set()),
    "choice": ({"answer"}, {"choices"}),
    "code": ({"tests"}, set()),
    "judge": ({"answer"}, set()),
}
# The last paragraph of the prompt of each kind.
INSTRUCTIONS = {
    "exact": 'End with a line "Answer: X", where X is the answer alone.',
    "numeric": 'End with a line "Answer: X", where X is the number alone, in digits.',
    "regex": 'End with a line "Answer: X", where X is the answer alone.',
    "choice": 'End with a line "Answer: X", where X is the letter of the right choice.',
    "code": "Give the complete Python program in one code block that starts with ```python.",
    "judge": "",
}
LETTERED = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s", re.MULTILINE)
FEWEST_LETTERS = 4  # letters of a question without `choices` whose text shows fewer


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _answer(value: Any) -> Any:
    texts = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, str) for one in value)
    if value is None or texts or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    raise ValueError("must be text, a number or a list of texts; put other values in quotes")


def _tests(value: Any) -> Any:
    forms = {type(one) for one in value} if isinstance(value, list | tuple) else set()
    if value is None or (len(forms) == 1 and forms <= {dict, str, InputOutput}):
        return value
    raise ValueError('must be a list of {"input": TEXT, "output": TEXT} objects, or a list of texts of Python')


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, BeforeValidator(_text)]
Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


class InputOutput(FrozenModel):
    """A test of a program that reads standard input: what it reads and what it must write."""

    input: Annotated[str, Field(description="standard input")]
    output: Annotated[str, Field(description="standard output; white space at the ends of lines does not count")]


class Question(FrozenModel):
    """A question of a benchmark, and how its answers are scored."""

    id: Annotated[Name, Field(description="id in the benchmark")]
    benchmark: Annotated[Text, Field(description="benchmark of the question")]
    question: Annotated[Text, Field(description="text of the question")]
    kind: Annotated[Kind, Field(description="how answers are scored")]
    answer: Annotated[
        Number | Text | tuple[Text, ...] | None,
        BeforeValidator(_answer),
        Field(
            description="right answer; exact: text or a list of accepted texts; numeric: number; regex: pattern; "
            "choice: letter or text of the right choice; judge: reference answer"
        ),
    ] = None
    choices: Annotated[
        Annotated[tuple[Name, ...], Field(min_length=2, max_length=26)] | None,
        Field(description="texts of the choices, without letters; none: the question has the letters"),
    ] = None
    tolerance: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        Field(description="largest error relative to the answer; none: 1e-6, or 0 if the answer is a whole number"),
    ] = None
    tests: Annotated[
        tuple[InputOutput, ...] | tuple[Text, ...] | None,
        BeforeValidator(_tests),
        Field(description="pairs of standard input and output, or Python statements that are appended to the program"),
    ] = None
    group: Annotated[Name | None, Field(description="questions of one group stay in one part of every split")] = None

    @model_validator(mode="after")
    def _fields_of_kind(self) -> Question:
        needed, optional = FIELDS[self.kind]
        for name in ("answer", "choices", "tolerance", "tests"):
            given = getattr(self, name) is not None
            if name in needed and not given:
                raise ValueError(f"{name}: missing; a question of kind {self.kind} needs {name!r}")
            if given and name not in needed | optional:
                kinds = ", ".join(kind for kind, fields in FIELDS.items() if name in fields[0] | fields[1])
                raise ValueError(f"{name}: kind {self.kind} has no {name!r}; leave it out, or set `kind` to {kinds}")
        check = {"numeric": self._check_number, "regex": self._check_pattern, "choice": self._check_choice}
        check.get(self.kind, self._check_text)()
        return self

    @property
    def letters(self) -> int:
        """The number of choices of kind choice. Without `choices`, it is that of the letters in the question."""
        if self.choices is not None:
            return len(self.choices)
        found = set(LETTERED.findall(self.question))
        shown = next((index for index, letter in enumerate(ascii_uppercase) if letter not in found), 26)
        return max(shown, FEWEST_LETTERS, ascii_uppercase.index(self.letter) + 1)

    @property
    def letter(self) -> str:
        """The letter of the right choice, of kind choice."""
        answer = str(self.answer)
        if self.choices is not None and answer in self.choices:
            return ascii_uppercase[self.choices.index(answer)]
        return answer.upper()

    @property
    def number(self) -> Fraction:
        """The right number, of kind numeric."""
        value = numbers.parse(self.answer) if isinstance(self.answer, str) else Fraction(str(self.answer))
        assert value is not None
        return value

    @property
    def accepted(self) -> tuple[str, ...]:
        """The accepted texts, of kind exact."""
        return self.answer if isinstance(self.answer, tuple) else (str(self.answer),)

    def _check_number(self) -> None:
        if isinstance(self.answer, tuple):
            raise ValueError("answer: kind numeric takes one number, it is a list")
        if isinstance(self.answer, str) and numbers.parse(self.answer) is None:
            raise ValueError(
                f"answer: {self.answer[:80]!r} is not one number; write it as 1234.5, 3/4 or 1.2e-3, or use kind exact"
            )
        if isinstance(self.answer, float) and not abs(self.answer) < float("inf"):
            raise ValueError(f"answer: got {self.answer}, it must be finite")

    def _check_pattern(self) -> None:
        if not isinstance(self.answer, str):
            raise ValueError(f"answer: kind regex takes a pattern as text, it is {self.answer!r:.80}")
        try:
            regex.compile(self.answer)
        except regex.error as error:
            raise ValueError(
                f"answer: {self.answer[:80]!r} is not a regular expression ({error}); correct it"
            ) from None

    def _check_choice(self) -> None:
        if isinstance(self.answer, tuple):
            raise ValueError("answer: kind choice takes one letter or text, it is a list")
        answer, choices = str(self.answer), self.choices
        is_letter = len(answer) == 1 and answer.upper() in ascii_uppercase[: 26 if choices is None else len(choices)]
        if choices is None:
            if not is_letter:
                raise ValueError(
                    f"answer: {answer[:80]!r} is not a letter; give `choices`, or the letter of the choice"
                )
            return
        if len(set(choices)) < len(choices):
            raise ValueError("choices: a text is repeated; each choice must differ from the others")
        if answer not in choices and not is_letter:
            last = ascii_uppercase[len(choices) - 1]
            raise ValueError(f"answer: {answer[:80]!r} is neither a letter from A to {last} nor one of `choices`")
        if is_letter and answer in choices and ascii_uppercase[choices.index(answer)] != answer.upper():
            raise ValueError(f"answer: {answer!r} is the letter of one choice and the text of another; reorder them")

    def _check_text(self) -> None:
        if self.kind == "judge" and isinstance(self.answer, tuple):
            raise ValueError("answer: kind judge takes one reference answer, it is a list")
        for test in self.tests or ():
            try:
                ast.parse(test if isinstance(test, str) else "")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"tests: {test!r:.80} is not Python ({error}); correct it") from None


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file of JSON Lines, or of one JSON array.

    The default of `id` is the position in the file, from 1, and that of `benchmark` the name of the file without its
    ending. Raises InputError for a file without questions, an unknown, missing or invalid field, and a repeated id.
    """
    questions = list[Question]()
    places = dict[str, str]()
    for position, record in enumerate(json_lines(path), 1):
        question = _question(record, {"id": str(position), "benchmark": path.stem})
        if question.id in places:
            raise InputError(
                f"{record.place}: id: {question.id!r} is also that of {places[question.id]}; give each question "
                "its own, or leave all out"
            )
        places[question.id] = record.place
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: no questions; write one JSON object per line")
    return tuple(questions)


def prompt(question: Question) -> str:
    """The text that is sent to the model: the question, its choices with letters, and how to end the answer."""
    choices = (f"{letter}) {text}" for letter, text in zip(ascii_uppercase, question.choices or (), strict=False))
    parts = [question.question.strip(), "\n".join(choices), INSTRUCTIONS[question.kind]]
    if question.kind == "code" and isinstance((question.tests or ("",))[0], InputOutput):
        parts.append("The program reads standard input and writes its result to standard output.")
    return "\n\n".join(part for part in parts if part)


def _question(record: Record, defaults: dict[str, str]) -> Question:
    unknown = sorted(record.values.keys() - Question.model_fields.keys())
    if unknown:
        raise InputError(
            f"{record.place}: {unknown[0]}: unknown field; correct its name or leave it out. "
            f"The fields are {', '.join(Question.model_fields)}"
        )
    try:
        return Question(**{**defaults, **record.values})
    except ValidationError as error:
        raise InputError(f"{record.place}: {one_line(error)}") from None
