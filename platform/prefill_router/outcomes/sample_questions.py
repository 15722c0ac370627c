"""The questions of the built-in sample: ten task families with 24 templates each, written for this project.

In: the texts in sample_questions.jsonl, a template and a random generator. Out: a `Question`, without its answer. Knows
nothing of target models or of who answers correctly (see sample.py).

A template is a scene in one of three dialects. A scene is an opening and a closing question. A dialect is the layout of
the steps and one of the three wordings of every step. A question fills a template with steps, remarks, numbers and
names. Its text shows its difficulty in four ways, the facets:

  depth   the number of steps
  load    the level of the steps (0 plain, 1 demanding, 2 intricate) and the weight of the scene's closing question
  scale   the size of the numbers, or the length of the words and lists
  twist   the number of remarks that are conditions, exceptions or reversals

The length of a text says little about its difficulty: plain and intricate steps are equally long, and so are calm
remarks and twists. Small talk makes a question longer but not harder.

Each line of sample_questions.jsonl is a JSON object of one `kind`:

  list    `name`, `values`: words and sentences for all families
  family  `family`, `style` (do: instructions, say: statements, code: lines of code), `cast` (a list; default: people)
  scene   `family`, `weight` (-1, 0 or 1), `opening`, `closing`
  step    `family`, `level`, `wordings` (one per dialect)
  twist   `family`, `text`
  calm    `family`, `text`

Slots in braces are filled at random. {n} {m} {v} are numbers ({v} without thousands separators, {plenty} a larger one),
{small} {several} {k} small numbers. {p} {q} are neighbours in a chain of people or jobs, {first} {last} its ends,
{count} the number of steps. {name} {other} {item} {object} {place} have one value per question, all other slots one
value per text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Entry = dict[str, Any]  # a line of sample_questions.jsonl

FACETS = ("depth", "load", "scale", "twist")
DIALECTS = 3
LEVELS = 3
MIN_STEPS, MAX_STEPS = 2, 6
REMARKS = 2  # sentences after the steps: 0, 1 or 2 twists, the others calm

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_WORDS_BY_SCALE = ("words_short", "words_medium", "words_long")
_SCALED = re.compile(r"\{(n|m|v|plenty|word|list)\}")  # the slots whose size is the facet `scale`
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Family:
    """A task family. `scenes` are (weight, opening, closing); `steps` are wordings by level, step and dialect.

    `style` is `do` (instructions), `say` (statements) or `code` (lines of code). `cast` names the chain of people or
    jobs; empty for people.
    """

    name: str
    style: str
    cast: tuple[str, ...]
    scenes: tuple[tuple[int, str, str], ...]
    steps: tuple[tuple[tuple[str, ...], ...], ...]
    twists: tuple[str, ...]
    calm: tuple[str, ...]

    @property
    def n_templates(self) -> int:
        """Number of templates: every scene in every dialect."""
        return len(self.scenes) * DIALECTS


@dataclass(frozen=True)
class Question:
    """One question. `facets` are in the order of FACETS, each with about zero mean and unit variance."""

    family: str
    template: str
    prompt: str
    facets: tuple[float, float, float, float]


@cache
def load_families() -> tuple[Family, ...]:
    """The ten task families in the order of the file."""
    lists, by_kind = _texts()
    return tuple(_family(entry, lists, by_kind) for entry in by_kind["family"])


def _family(entry: Entry, lists: Mapping[str, tuple[str, ...]], by_kind: Mapping[str, list[Entry]]) -> Family:
    name = entry["family"]
    scenes, steps, twists, calm = (
        [own for own in by_kind[kind] if own["family"] == name] for kind in ("scene", "step", "twist", "calm")
    )
    return Family(
        name,
        entry["style"],
        lists[entry["cast"]] if "cast" in entry else (),
        tuple((scene["weight"], scene["opening"], scene["closing"]) for scene in scenes),
        tuple(tuple(tuple(step["wordings"]) for step in steps if step["level"] == level) for level in range(LEVELS)),
        tuple(twist["text"] for twist in twists),
        tuple(remark["text"] for remark in calm),
    )


@cache
def _texts() -> tuple[dict[str, tuple[str, ...]], dict[str, list[Entry]]]:
    """The lists by name, and the other lines of the file by kind."""
    text = files(__package__).joinpath("sample_questions.jsonl").read_text(encoding="utf-8")
    lists: dict[str, tuple[str, ...]] = {}
    by_kind: dict[str, list[Entry]] = {}
    for entry in map(json.loads, text.splitlines()):
        if entry["kind"] == "list":
            lists[entry["name"]] = tuple(entry["values"])
        else:
            by_kind.setdefault(entry["kind"], []).append(entry)
    return lists, by_kind


def ask(family: Family, template: int, rng: np.random.Generator) -> Question:
    """Draws a question from template number 0 .. family.n_templates - 1."""
    lists, _ = _texts()
    scene, dialect = divmod(template, DIALECTS)
    weight, opening, closing = family.scenes[scene]
    n_steps = int(rng.integers(MIN_STEPS, MAX_STEPS + 1))
    load, scale, n_twists = (int(level) for level in rng.integers(0, LEVELS, size=3))
    fill = _Filler(family, n_steps, scale, rng)

    levels = [load if rng.random() < 0.7 else int(rng.integers(LEVELS)) for _ in range(n_steps)]
    decks = [[wordings[dialect] for wordings in _shuffled(rng, level)] for level in family.steps]
    wordings = []
    for level in levels:
        wordings.append(decks[level].pop(0))
        decks[level].append(wordings[-1])  # a step is repeated only after all others of its level
    twists = _shuffled(rng, family.twists)[:n_twists]
    remarks = _shuffled(rng, twists + _shuffled(rng, family.calm)[: REMARKS - n_twists])
    is_scaled = any(_SCALED.search(text) for text in (opening, *wordings, *remarks, closing))
    facets = (
        (n_steps - 4) / 1.41,
        (float(np.mean(levels)) - 1 + 0.4 * weight) / 0.75,
        (scale - 1) / 0.82 if is_scaled else 0.0,
        (n_twists - 1) / 0.82,
    )

    greeting, source = (_shuffled(rng, lists[name])[: rng.integers(2)] for name in ("greetings", "sources"))
    before = [fill(text) for text in (*greeting, *source, opening)]
    steps = [fill(wording, index) for index, wording in enumerate(wordings)]
    after = [fill(text) for text in (*remarks, closing, *_shuffled(rng, lists["farewells"])[: rng.integers(2)])]
    prompt = _lay_out(family.style, dialect, " ".join(before), steps, " ".join(after))
    return Question(family.name, f"{family.name}/t{template:02d}", prompt, facets)


def _lay_out(style: str, dialect: int, before: str, steps: list[str], after: str) -> str:
    """The steps between `before` and `after`, in the layout of the dialect."""
    capitalised = [step[0].upper() + step[1:] for step in steps]
    numbered = [f"{number}. {step}." for number, step in enumerate(capitalised, 1)]
    if style == "code":
        return "\n".join([before, "", *(steps if dialect != 1 else numbered), "", after])
    if dialect == 1:
        return "\n".join([before, *numbered, after])
    if style == "say":
        if dialect == 0:
            return " ".join([before, *(f"{step}." for step in capitalised), after])
        return "\n".join([before, *(f"- {step}." for step in capitalised), after])
    if dialect == 2:
        return f"{before} {', then '.join([capitalised[0], *steps[1:-1]])}, and finally {steps[-1]}. {after}"
    links = ["First, ", *["Then ", "Next, ", "After that, ", "Then "][: len(steps) - 2], "Finally, "]
    return " ".join([before, *(f"{link}{step}." for link, step in zip(links, steps, strict=True)), after])


def _shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[index] for index in rng.permutation(len(values))]


class _Filler:
    """Fills the slots of one question; each call fills one text."""

    def __init__(self, family: Family, n_steps: int, scale: int, rng: np.random.Generator) -> None:
        lists, _ = _texts()
        people = _shuffled(rng, lists["people"])
        places = _shuffled(rng, lists["places"])
        low, high = ((2, 10), (12, 99), (103, 4999))[scale]
        self._cast = _shuffled(rng, family.cast) if family.cast else people[3:]
        self._draw: dict[str, Callable[[], str]] = {
            "n": lambda: f"{rng.integers(low, high):,}",
            "m": lambda: f"{rng.integers(low, high):,}",
            "plenty": lambda: f"{rng.integers(8 * low, 8 * high):,}",
            "v": lambda: str(rng.integers(low, high)),
            "k": lambda: str(rng.integers(3, 10)),
            "small": lambda: _NUMBER_WORDS[rng.integers(3, 10)],
            "several": lambda: _one_of(rng, ("two", "ten", "eleven", "twelve")),
            "percent": lambda: str(5 * rng.integers(2, 19)),
            "word": lambda: _one_of(rng, lists[_WORDS_BY_SCALE[scale]]),
            "letter": lambda: _one_of(rng, tuple("BCDFGKMNPST")),
            "list": lambda: ", ".join(str(v) for v in rng.integers(low, high * 3, size=(4, 6, 9)[scale])),
            "date": lambda: f"{rng.integers(1, 29)} {_one_of(rng, lists['months'])} {rng.integers(1900, 2040)}",
            "day": lambda: _one_of(rng, lists["days"]),
            "month": lambda: _one_of(rng, lists["months"]),
        }
        self._fixed = {
            "name": people[0],
            "other": people[1],
            "friend": people[2],
            "place": places[0],
            "elsewhere": places[1],
            "item": _one_of(rng, lists["items"]),
            "object": _one_of(rng, lists["objects"]),
            "count": _NUMBER_WORDS[n_steps],
            "first": self._cast[0],
            "last": self._cast[n_steps],
        }

    def __call__(self, text: str, step: int = 0) -> str:
        values = self._fixed | {
            "p": self._cast[step],
            "q": self._cast[step + 1],
            "ordinal": _ORDINALS[step],
            "number": _NUMBER_WORDS[step + 1],
        }
        for slot in _SLOT.findall(text):
            if slot not in values:
                values[slot] = self._draw[slot]()
        return _SLOT.sub(lambda match: values[match[1]], text)


def _one_of(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
