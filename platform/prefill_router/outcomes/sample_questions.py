"""The questions of the built-in sample: ten task families, 24 templates each, written for this project.

A template is a scene (its opening and its closing question) told in one of three dialects (the layout of the steps
and one of three wordings of every step). A question fills it with steps, remarks, numbers and names. How difficult
it is shows in its text, in four ways (`Question.facets`):

  depth   how many steps there are to follow
  load    what the steps ask for: plain, demanding or intricate things; and what the scene asks in the end
  scale   how large the numbers are, or how long the words and lists
  twist   how many of the remarks are conditions, exceptions or reversals

Length says little of it: a plain step is as long as an intricate one, a calm remark as long as a twist, and small
talk before and after makes a question longer and no harder. The questions carry no answers: the sample simulates
who gets them right (sample.py), which is not this file's business.

How to read the texts below: a scene is `WEIGHT opening | closing`, a step `LEVEL wording | wording | wording`. A slot
keeps its value within one piece of text: {n} {m} {v} are numbers (v without comma, {plenty} a larger one), {small}
{several} {k} little ones, {p} {q} two neighbours in a chain of people or jobs, {first} {last} its ends, {count} the
number of steps. {name} {other} {item} {object} {place} stay the same in the whole question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

FACETS = ("depth", "load", "scale", "twist")
DIALECTS = 3
MIN_STEPS, MAX_STEPS = 2, 6
REMARKS = 2  # sentences after the steps; 0, 1 or 2 of them are twists, the others are calm

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_PEOPLE = (
    "Amara",
    "Bruno",
    "Chidi",
    "Dalia",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kirsten",
    "Luca",
    "Mina",
    "Noor",
    "Oskar",
    "Priya",
    "Quentin",
    "Rosa",
    "Sven",
    "Tala",
    "Uma",
    "Viktor",
    "Wanda",
    "Yusuf",
    "Zora",
)
_JOBS = (
    "sanding",
    "priming",
    "painting",
    "wiring",
    "plumbing",
    "tiling",
    "glazing",
    "sweeping",
    "plastering",
    "roofing",
    "insulating",
    "polishing",
)
_ITEMS = ("marbles", "stamps", "postcards", "apples", "pencils", "seashells", "buttons", "coins", "tickets", "bricks")
_PLACES = ("library", "bakery", "ferry terminal", "school hall", "workshop", "garden centre", "museum", "bus station")
_OBJECTS = ("letter", "lantern", "brass key", "map", "violin", "ledger", "parcel", "blue umbrella")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_WORDS = (
    ("lamp", "tree", "fish", "moon", "sand", "bolt", "corn", "drum", "harp", "milk"),
    ("lantern", "gravity", "blanket", "orchard", "thunder", "cabinet", "pilgrim", "whistle", "journey", "mustard"),
    (
        "constellation",
        "thermodynamics",
        "misunderstanding",
        "circumnavigate",
        "extraordinarily",
        "photosynthesis",
        "archaeologist",
        "incomprehensible",
        "counterbalance",
        "kaleidoscopic",
    ),
)
_GREETINGS = (
    "Hello, and thank you for your help last week with the posters for the {elsewhere}.",
    "A kettle is boiling next door and a radio is playing, so forgive me if I sound distracted.",
    "We have a quiet afternoon at the {elsewhere}, so I thought I would ask you something.",
    "I hope that you are well and that the move to the new office went smoothly.",
)
_SOURCES = (
    "Here is something that came up at the {elsewhere} this morning.",
    "{friend} heard this one from a colleague over lunch and could not stop thinking about it.",
    "I found the following in an old magazine that somebody had left at the {elsewhere}.",
    "My neighbour {friend} keeps a collection of puzzles and lent me this one.",
    "This was sent in by a reader who signs as {friend}.",
)
_FAREWELLS = (
    "Feel free to explain your answer in a sentence or two.",
    "There is no hurry, and you may use a pencil.",
    "Please answer politely, since my aunt is going to read the reply aloud.",
    "I will pass your answer on to {friend}, who works at the {elsewhere}.",
    "Thanks in advance, and greetings from everyone at the {elsewhere}.",
    "A short reply is fine, as I am reading this on my phone on the way home.",
    "By the way, the {elsewhere} will be closed tomorrow, so write to me here.",
)
_SCALED = re.compile(r"\{(n|m|v|plenty|word|list)\}")  # the slots whose size is the facet `scale`


@dataclass(frozen=True)
class Family:
    """A task family, parsed. `style` says what its steps are: things to do, statements, or lines of code."""

    name: str
    style: str
    cast: tuple[str, ...]
    scenes: tuple[tuple[int, str, str], ...]
    steps: tuple[tuple[tuple[str, ...], ...], ...]
    twists: tuple[str, ...]
    calm: tuple[str, ...]

    @property
    def n_templates(self) -> int:
        return len(self.scenes) * DIALECTS


@dataclass(frozen=True)
class Question:
    """One question. `facets` stands in the order of FACETS, each about zero mean and unit variance."""

    family: str
    template: str
    prompt: str
    facets: tuple[float, float, float, float]


def ask(family: Family, template: int, rng: np.random.Generator) -> Question:
    """Draws a question from a template, 0 .. family.n_templates - 1."""
    scene, dialect = divmod(template, DIALECTS)
    weight, opening, closing = family.scenes[scene]
    n_steps = int(rng.integers(MIN_STEPS, MAX_STEPS + 1))
    load, scale, n_twists = (int(level) for level in rng.integers(0, 3, size=3))
    fill = _Filler(family, n_steps, scale, rng)

    levels = [load if rng.random() < 0.7 else int(rng.integers(3)) for _ in range(n_steps)]
    decks = [[wordings[dialect] for wordings in _shuffled(rng, level)] for level in family.steps]
    wordings = []
    for level in levels:
        wordings.append(decks[level].pop(0))
        decks[level].append(wordings[-1])  # it comes again only after all others of its level
    twists = _shuffled(rng, family.twists)[:n_twists]
    remarks = _shuffled(rng, twists + _shuffled(rng, family.calm)[: REMARKS - n_twists])
    is_scaled = any(_SCALED.search(text) for text in (opening, *wordings, *remarks, closing))
    facets = (
        (n_steps - 4) / 1.41,
        (float(np.mean(levels)) - 1 + 0.4 * weight) / 0.75,
        (scale - 1) / 0.82 if is_scaled else 0.0,
        (n_twists - 1) / 0.82,
    )

    greeting, source = (_shuffled(rng, texts)[: rng.integers(2)] for texts in (_GREETINGS, _SOURCES))
    before = [fill(text) for text in (*greeting, *source, opening)]
    steps = [fill(wording, index) for index, wording in enumerate(wordings)]
    after = [fill(text) for text in (*remarks, closing, *_shuffled(rng, _FAREWELLS)[: rng.integers(2)])]
    prompt = _lay_out(family.style, dialect, " ".join(before), steps, " ".join(after))
    return Question(family.name, f"{family.name}/t{template:02d}", prompt, facets)


def _lay_out(style: str, dialect: int, before: str, steps: list[str], after: str) -> str:
    """The steps between `before` and `after`, in the dialect's layout."""
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
    """Fills the slots of one question's pieces of text, each piece by one call."""

    def __init__(self, family: Family, n_steps: int, scale: int, rng: np.random.Generator) -> None:
        people = _shuffled(rng, _PEOPLE)
        places = _shuffled(rng, _PLACES)
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
            "word": lambda: _one_of(rng, _WORDS[scale]),
            "letter": lambda: _one_of(rng, tuple("BCDFGKMNPST")),
            "list": lambda: ", ".join(str(v) for v in rng.integers(low, high * 3, size=(4, 6, 9)[scale])),
            "date": lambda: f"{rng.integers(1, 29)} {_one_of(rng, _MONTHS)} {rng.integers(1900, 2040)}",
            "day": lambda: _one_of(rng, _DAYS),
            "month": lambda: _one_of(rng, _MONTHS),
        }
        self._fixed = {
            "name": people[0],
            "other": people[1],
            "friend": people[2],
            "place": places[0],
            "elsewhere": places[1],
            "item": _one_of(rng, _ITEMS),
            "object": _one_of(rng, _OBJECTS),
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
        for slot in re.findall(r"\{(\w+)\}", text):
            if slot not in values:
                values[slot] = self._draw[slot]()
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)


def _one_of(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _family(
    name: str, style: str, scenes: str, steps: str, twists: str, calm: str, cast: tuple[str, ...] = ()
) -> Family:
    """Parses a family's texts; the module docstring says how they are written."""
    pairs = tuple((weight, opening, closing) for weight, (opening, closing) in _entries(scenes))
    by_level = tuple(tuple(wordings for level, wordings in _entries(steps) if level == wanted) for wanted in range(3))
    return Family(
        name, style, cast, pairs, by_level, tuple(twists.strip().split("\n")), tuple(calm.strip().split("\n"))
    )


def _entries(text: str) -> list[tuple[int, tuple[str, ...]]]:
    """`NUMBER part | part`, one entry a line; a line that begins with `|` goes on with the one before."""
    lines = re.sub(r"\s*\n\s*\|\s*", " | ", text.strip()).split("\n")
    return [
        (int(line.split()[0]), tuple(part.strip() for part in line.split(maxsplit=1)[1].split(" | "))) for line in lines
    ]


FAMILIES = (
    _family(
        "arithmetic",
        "do",
        scenes="""
-1 Start with the number {n}. | Is the result greater than zero?
0 {name} types {n} into a pocket calculator and follows {count} instructions.
  | What does the display show at the end?
0 Take {n} as the first value of a running total and change it in {count} steps. | What is the final total?
0 A machine with {count} stages is fed the number {n}. | What number comes out of the last stage?
1 Think of the number {n} and work through the following.
  | Give the sum of the digits of the result, in base two.
0 On the whiteboard stands {n}, and the class alters it {count} times. | What is written there in the end?
1 Let the value be {n} and transform it as described. | What is the largest prime factor of the final value?
-1 Suppose you begin at {n} on the number line. | Did you end up to the right of where you began?
""",
        steps="""
0 add {n} to the number that you have now | increase the current number by {n} | put another {n} on top of it
0 subtract {n} from the number that you have now | decrease the current number by {n}
  | take {n} away from what is there
0 double the number that you have now | let the current number grow to twice its size
  | add it once more to itself
0 round the number to the nearest ten | bring the number to the closest multiple of ten
  | round what is there to full tens
1 multiply it by {n} | scale it by a factor of {n} | take it {n} times
1 divide it by {small} and drop the fraction | split it into {small} equal parts, rounding down
  | share it out by {small}, rounded down
1 find {percent} percent of it | reduce it to {percent} percent of itself | keep only {percent} percent of it
2 raise it to the power of {small} | replace it by its {small}-fold product with itself
  | exponentiate it with exponent {small}
2 take its remainder modulo {n} | keep only its residue modulo {n} | reduce it modulo {n}
2 replace it by the number of primes below it | count the prime numbers smaller than it and keep that count
  | swap it for the count of primes under it
2 take its square root, truncated to an integer | replace it by the integer part of its square root
  | extract the square root and discard the decimals
""",
        twists="""
Whenever the running value is odd, however, skip the next instruction instead of carrying it out.
Note that no instruction may make the value negative; if one would, reverse its digits instead.
Except for the very last one, an instruction that mentions an even number has to be applied twice.
Unless the intermediate value is divisible by three, negate it before the following instruction.
The order of the instructions is the reverse of the order in which they are given here.
""",
        calm="""
There is enough room on the sheet to write the value down after each of the instructions.
The instructions were typed out by hand on an old machine and then copied for the whole class.
All numbers are ordinary decimal numbers, written down in the usual way with commas for the thousands.
Somebody else has already done the same calculation and only wants to compare notes with you.
""",
    ),
    _family(
        "word_problems",
        "say",
        scenes="""
0 {name} starts the day with {plenty} {item}. | How many {item} does {name} have at the end of the day?
-1 At the {place}, {name} puts {plenty} {item} into an empty box. | Are there any {item} left in the box?
0 {name} and {other} keep their {item} in one jar, which holds {plenty} at first.
  | How many {item} are in the jar now?
0 The {place} runs a stall where {name} looks after {plenty} {item}.
  | How many {item} are still on the stall at closing time?
1 {name} collects {item} and owns {plenty} of them, a few of them counterfeit.
  | At most how many genuine {item} can be left?
0 For the fair, {name} has prepared {plenty} {item}. | What number of {item} remains after the fair?
1 Two rival clubs fight over {plenty} {item} in the care of {name}.
  | By what fraction has the number of {item} changed?
-1 Yesterday {name} found {plenty} {item} in the attic. | Does {name} have more {item} now than before?
""",
        steps="""
0 {p} comes by with a full bag and brings {n} more | Another {n} come from {p}, who had them in a bag at home
  | {p} has a bag of them at home and adds {n}
0 {p} asks nicely and is given {n} to take home
  | {n} go to {p}, who puts them in a paper bag and says thank you
  | {p} says thank you and carries {n} home in a bag
0 {p} pays in cash and buys {n} of them | {n} are sold to {p}, who pays in cash and is pleased with them
  | {p} pays for {n} in cash and is pleased with them
0 {p} finds {n} on the floor and hands them in | {n} turn up on the floor and are handed in by {p}
  | {p} picks up {n} that were lost and returns them
1 {p} takes a third of what is there and gives back {n} | A third goes to {p}, who returns {n}
  | {p} removes one in three and later restores {n}
1 {p} doubles what is left, then keeps {percent} percent of the increase
  | After {p} has doubled the rest, {percent} percent of the gain goes to {p}
  | What remains is doubled by {p}, less a commission of {percent} percent
1 {p} swaps {n} of them for {m} others | In an exchange, {p} receives {n} and returns {m}
  | {p} trades in {m} and walks away with {n}
2 {p} takes what {q} would get in a ratio of {small} to {several}
  | In proportion {small} to {several}, {p} and {q} split a quarter of it
  | {p} claims the share of {q} in the ratio of {small} to {several}
2 Hourly {p} removes {percent} percent, compounding, until fewer than {n} are left
  | With {p} the stock shrinks {percent} percent an hour, compounding
  | The stock decays by {percent} percent hourly until {p} has {n}
2 {p} wagers the square root of the stock against {q} {n} times, winning once
  | In {n} bets against {q}, {p} stakes the square root of the stock
  | {p} bets {n} times against {q} for the square root of the stock
""",
        twists="""
However, nobody who has already been given something may take anything without returning half of it first.
None of this applies to the last person but one, whose visit has to be undone.
If the number is ever odd, the next visitor leaves empty-handed, unless that would leave more than {n}.
Only those whose names come before {name} in the alphabet are actually telling the truth about their amounts.
Apart from the first visitor, everyone's amount is understood as a percentage rather than a count.
""",
        calm="""
All of this happens on one and the same day, a sunny Saturday at the end of the summer.
The {item} are all of one kind and colour, and everybody is content with the ones they have.
The weather is fine, the mood is friendly, and all the visitors know each other from school.
Each visitor says hello, stays for a cup of tea, and goes straight home again afterwards.
""",
    ),
    _family(
        "calendar",
        "do",
        scenes="""
0 Start from {date}. | Which date do you reach?
-1 Open your diary at {date}. | Is the date that you reach in the same century?
0 {name} marks {date} on a wall calendar and moves the marker {count} times. | Where does the marker end up?
0 A contract is signed on {date}, and its deadline is worked out in {count} steps. | When is the deadline?
1 An archive counts its files from {date}.
  | On which weekday does the resulting date fall, and in which calendar week?
0 The clerk at the {place} stamps a form with {date} and corrects it as follows.
  | What date is on the form afterwards?
-1 Imagine that today is {date}. | Are you then in the past or in the future?
1 A comet was last sighted on {date}. | How many full moons lie between that day and the computed one?
""",
        steps="""
0 go forward {n} days from the day where you are | turn the pages to the day that is {n} days later
  | add {n} days to the date
0 go back {n} days from the day where you are | turn the pages back to the day {n} days earlier
  | subtract {n} days from the date
0 go on to the {day} that comes next after that | turn the pages to the {day} that comes after it
  | move on to the next {day}
0 let exactly one week go by from there | turn the pages to the day one week later | add one week to the date
1 jump {n} weeks and {small} days ahead | add {n} weeks plus {small} days
  | go forward by {n} weeks and {small} days
1 move to the last day of {month} | go to the final day of the nearest {month} | shift to the end of {month}
1 step back {n} working days | count {n} business days backwards | go back {n} days, weekends not counted
2 move to the second {day} of the next leap year
  | jump to the second {day} in the first leap year that follows
  | take the next leap year's second {day}
2 convert it to the Julian calendar | advance to Easter Sunday by the Julian reckoning
  | take the following Julian Easter Sunday
2 reflect it about the midpoint of its quarter | mirror it within its quarter, less {n} business days
  | invert it within its quarter
2 find the nearest date whose day times month is divisible by {k}
  | shift until {k} divides the product of day and month
  | maximise day times month modulo {k}
""",
        twists="""
Public holidays do not count, and whenever you land on one, return to the working day before it.
If a move ends in February, undo it, unless the year is a leap year.
Every second move is carried out in the opposite direction.
All moves but the first are measured from midnight in a time zone that is {small} hours behind.
A move that crosses the end of a year has to be repeated, except when it ends on a {day}.
""",
        calm="""
There is enough room on each page to make a note of the date that has been reached.
The calendar is the ordinary one that hangs on the kitchen wall, with a picture for each month.
All dates are written with the day first, then the month, and then the year in full.
The same exercise was set last week to a class of pupils, who enjoyed it a great deal.
""",
    ),
    _family(
        "strings",
        "do",
        scenes="""
0 Take the word "{word}". | What do you get?
-1 Write down the word "{word}". | Is your result longer than the word you began with?
0 {name} spells "{word}" with wooden letters and rearranges them in {count} moves.
  | What do the letters spell now?
0 The text "{word}" goes through a filter of {count} stages. | What text leaves the filter?
1 A password is derived from "{word}". | How many distinct anagrams does the password have?
0 On a sign at the {place} it says "{word}", and a prankster alters it. | What does the sign say afterwards?
-1 Look at the string "{word}". | Which letter comes first in the result?
1 An agent encodes "{word}" before sending it. | Which of its letters are fixed points of the whole procedure?
""",
        steps="""
0 put the letter {letter} in front of everything else | write the letter {letter} on the left of it
  | place the letter {letter} at the very beginning
0 drop the letter that stands last of all | remove the letter on the far right of it
  | cut off the letter at the very end
0 write all of it in capital letters | turn all of it into upper case letters
  | change every letter to a capital one
0 add the word "{word}" after the last letter | write the word "{word}" on the right of it
  | place the word "{word}" at the very end
1 write it backwards | reverse it | flip the order of its letters
1 swap the first and the last letter | exchange its two outermost letters
  | let the first and last letters change places
1 remove every vowel | delete all the vowels | strip out its vowels
2 shift each letter cyclically by {small} places | rotate its alphabet cyclically by {small} positions
  | encipher it with a cyclic shift of {small}
2 interleave it with its own mirror image | alternate its letters with those of its reversal
  | weave it together with its reversed copy
2 sort its letters stably by frequency | order the letters by frequency, ties by position
  | permute its letters into order of frequency
2 encode each run by its length in base {k} | replace every run by its length in base {k}
  | compress its runs, lengths in base {k}
""",
        twists="""
Letters that have already been moved once must not be touched again, unless they are vowels.
Positions are counted from the right, and blanks count as letters everywhere except at the ends.
Whenever the length becomes odd, the preceding step has to be undone before you go on.
If a letter occurs more than once, apply each step only to its second occurrence.
Treat every consonant after {letter} as though it were its successor, but not in the last step.
""",
        calm="""
The letters are large and easy to read, and there are plenty of spare ones in the box.
Only ordinary letters of the English alphabet occur here, the same ones as on a keyboard.
The letters are written next to each other in a single row and read from left to right.
It may help to write down the result after each step and to look at it once more.
""",
    ),
    _family(
        "code_tracing",
        "code",
        scenes="""
0 In this program x starts at {v} and y at {k}. | What is the value of x at the end?
-1 Both x and y are equal to {v} before these lines run. | Does the program finish without an error?
0 {name} is reviewing a snippet in which x = {v} and y = {k} at first. | What will it leave in y?
0 Trace the {count} statements below by hand, with x = {v} and y = {k}.
  | Which values do x and y have afterwards?
1 A fuzzer calls the fragment with x = {v} and y = {k}.
  | What is the exact asymptotic running time as x grows?
0 Before the following code is executed, x holds {v} and y holds {k}. | What would printing x show?
-1 Here x begins as {v} while y begins as {k}. | Is y ever assigned to?
1 A compiler has to fold these statements, given x = {v} and y = {k}.
  | Which statements are dead code, and why?
""",
        steps="""
0 x = x + {v} | set x to x plus {v} | x += {v};
0 y = x - {v} | set y to x minus {v} | y = x - {v};
0 x = 2 * y | set x to twice y | x = 2 * y;
0 y = {v} | set y to {v} | y = {v};
1 if x % {k} == 0: x = x // {k} | if x is a multiple of {k}, divide x by {k} | if (x % {k} === 0) x = x / {k};
1 for i in range({k}): y = y + i | for each i from 0 up to but excluding {k}, add i to y
  | for (let i = 0; i < {k}; i++) y += i;
1 x, y = y, x | exchange the values of x and y | [x, y] = [y, x];
2 while y > {v}: y = y - x % {k} - 1
  | as long as y exceeds {v}, lower y by one more than x modulo {k}
  | while (y > {v}) y -= x % {k} + 1;
2 x = (lambda f: f(f(x)))(lambda t: t ^ {v})
  | apply twice to x the anonymous function that maps t to t xor {v}
  | x = (f => f(f(x)))(t => t ^ {v});
2 y = sum(int(d) ** {k} for d in str(abs(x)) if d not in str(y))
  | set y to the sum of d to the power {k} over those digits d of x that do not occur in y
  | y = [...String(Math.abs(x))].filter(d => !String(y).includes(d)).reduce((s, d) => s + d ** {k}, 0);
2 x = max(range(1, y), key=lambda t: (t * x) % {v}, default=x)
  | set x to that t below y for which t times x modulo {v} is largest, if there is one
  | x = [...Array(y).keys()].reduce((a, t) => t * x % {v} > a * x % {v} ? t : a, x);
""",
        twists="""
Mind that the whole block sits inside a recursive function that calls itself until x stops changing.
Assume that integers overflow silently at {v}, but only in assignments to y.
A second thread runs the same lines in reverse order between every two of them, without locks.
If a line would divide by zero, an exception handler restores x and resumes two lines earlier.
Inside every nested scope the name x shadows the outer one, except in the last line.
""",
        calm="""
The listing fits on a single page and was printed in a large and pleasant typeface.
Both variables are ordinary integers, with the short names that beginners like to give them.
The code was written by a student as an exercise and has been tidied up a little for printing.
It may help to keep a small table with a column for each of the variables.
""",
    ),
    _family(
        "logic",
        "say",
        scenes="""
0 Some people are compared by age. | Who is older, {first} or {last}?
-1 Read these statements about a group of friends. | Is {first} mentioned at all?
0 {name} has written down {count} facts about who is older than whom. | Is {last} the youngest of them?
0 In a family, the following {count} statements are known to be true. | Can {first} be younger than {last}?
1 On an island everybody is either a knight or a knave.
  | Which of them must be knaves, whatever the others are?
0 The staff of the {place} were asked about their ages. | Does it follow that {first} is older than {last}?
-1 Consider what we know about these people. | Name one person who is older than somebody else.
1 A detective has collected these statements.
  | Which single statement could be dropped without changing what follows?
""",
        steps="""
0 Everybody in the village agrees that {p} is older than {q}
  | As everybody in the village will tell you, {q} is younger than {p}
  | It is well known in the village that {p} was born before {q}
0 From their birth certificates we see that {p} is two years older than {q}
  | {q} has a birth certificate and is two years younger than {p}
  | According to their birth certificates, {p} was born two years before {q}
0 {p} went to school a few years before {q} and is the older one of the two
  | {q} went to school a few years after {p} and is the younger one of the two
  | {p} left school a few years before {q}, being the older one of the two
1 {p} is at least as old as {q} and not the same age | {q} is no older than {p}, nor of the same age
  | {p} and {q} differ in age, and {q} is not the elder
1 Either {p} is older than {q}, or they are twins and {q} lied about it
  | {p} is older than {q}, or else the two are twins
  | Unless they are twins, {p} is older than {q}
1 Both {p} and {q} are older than {name}, {p} by more
  | {name} is younger than {p} and {q}, of whom {p} is older
  | {p} and {q} were born before {name}, {q} not first
2 Were {p} not older than {q}, then {q} would deny being the eldest
  | {q} would deny being the eldest only if not older than {p}
  | It is false that {q} denies not being older than {p}
2 {p} is a knave if and only if {q} claims otherwise | {q} claims to be no knight exactly when {p} is a knave
  | {p} being a knave is equivalent to {q} denying it
2 Neither {p} nor {q} is truthful only when {other} is not
  | It holds for neither {p} nor {q} that {other} implies their lying
  | Not both {p} and {q} lie just in case {other} does not
""",
        twists="""
Exactly one of these statements is false, but it is not one of those that mention {name}.
Whoever is neither the oldest nor the youngest always says the opposite of what is the case.
Unless two of them share a birthday, no conclusion may be drawn from a statement that contains a negation.
All but one of them know this, and none of those who know it would admit it if asked by {other}.
If it cannot be decided, assume the contrary of the first statement and see whether a contradiction follows.
""",
        calm="""
All of them live in the same street, and none of them has been away on a journey lately.
The people know each other well and meet every Friday for a game of cards and a meal.
The statements were collected by a friendly neighbour, who wrote them down just as they were said.
It may help to draw a line on a sheet of paper and to put the names along it.
""",
    ),
    _family(
        "units",
        "say",
        scenes="""
0 A courier's route is made up of {count} parts. | How long is the whole route in metres?
-1 {name} goes for a walk near the {place}. | Is the walk longer than one metre?
0 A cable is joined together from several pieces. | What is its total length in centimetres?
0 {name} measures a hedge around the {place} in {count} pieces. | Give its full length in metres.
1 A surveyor adds up the sides of an irregular field.
  | What is the total in nautical miles, to four significant digits?
0 The stages of a race are listed below. | How many kilometres are there in all?
-1 Several ribbons are laid end to end on a table. | Which part is the longest one?
1 An engineer tallies a pipeline for an audit.
  | By how many parts per million is the total off if feet are survey feet?
""",
        steps="""
0 The {ordinal} part lies on level ground and is {n} metres long
  | Part {number}, on level ground: a length of {n} metres
  | For the {ordinal} part, which is straight, allow {n} metres
0 The {ordinal} part is easy to reach and is {n} centimetres long
  | Part {number}, easy to reach: a length of {n} centimetres
  | For the {ordinal} part, which is straight, allow {n} centimetres
0 The {ordinal} part lies in plain view and is {n} kilometres long
  | Part {number}, in plain view: a length of {n} kilometres
  | For the {ordinal} part, which is straight, allow {n} kilometres
1 The {ordinal} part is {n} feet and {small} inches long | Part {number}: {n} feet and {small} inches
  | For the {ordinal} part allow {n} feet and {small} inches
1 The {ordinal} part measures {n} yards | Part {number}: {n} yards | For the {ordinal} part allow {n} yards
1 The {ordinal} part runs for {n} miles and {m} yards | Part {number}: {n} miles and {m} yards
  | For the {ordinal} part allow {n} miles and {m} yards
2 The {ordinal} part is what light crosses in glass in {n} nanoseconds
  | Part {number}: the way of light in glass in {n} nanoseconds
  | For the {ordinal} part allow {n} nanoseconds of light in glass
2 The {ordinal} part spans {n} chains, {small} rods and {several} links
  | Part {number}: {n} chains, {small} rods and {several} links
  | For the {ordinal} part allow {n} chains, {small} rods and {several} links
2 The {ordinal} part equals {n} fathoms less {small} ancient cubits
  | Part {number}: {n} fathoms minus {small} ancient cubits
  | For the {ordinal} part allow {n} fathoms minus {small} cubits
2 The {ordinal} part takes {n} seconds, decelerating from {m} knots
  | Part {number}: {n} seconds, decelerating from {m} knots
  | For the {ordinal} part allow {n} seconds, decelerating from {m} knots
""",
        twists="""
Neighbouring parts overlap by {percent} percent of the shorter one, except where both are given in the same unit.
The tape that was used had stretched by {small} percent, but only for lengths above {n} of its own units.
Do not count any part twice, and leave out the longest one unless it comes first.
Lengths not given in metric units were rounded up to the next whole unit before being written down.
If a part is shorter than the one before it, it was walked in both directions.
""",
        calm="""
All the parts lie in the same town, and each of them can be reached easily on foot.
The lengths were measured with great care on a dry day by two people with a new steel tape.
All the numbers are written in the usual way, with commas for the thousands and no decimals.
It may help to write all the lengths below each other in a column and to add them up.
""",
    ),
    _family(
        "reading",
        "say",
        scenes="""
0 Read this report about the {object}. | Who has the {object} now?
-1 Here is a story about the {object}. | What object is the story about?
0 {name} remembers {count} things about the evening at the {place}. | Who was the last to hold the {object}?
0 The following was told to {other} about the {object}. | With whom did the {object} finally stay?
1 A passage from a mystery novel deals with the {object}.
  | Who wrongly believes that {last} never had the {object}?
0 These notes were found in the {place}, next to where the {object} had been. | Where did the {object} go?
-1 Somebody describes what happened at the {place}. | Name any person in the description.
1 A witness gives this account of the {object}.
  | Which sentence contradicts what {first} must have known at the time?
""",
        steps="""
0 In front of everybody in the hall, {p} gave the {object} to {q}
  | {q} got the {object} from {p} in front of everybody in the hall
  | With everybody in the hall looking on, {p} handed the {object} to {q}
0 {p} left the {object} on the bench by the door and {q} picked it up
  | {q} picked up the {object} from the bench by the door after {p} had put it there
  | The {object} that {p} put on the bench by the door was picked up by {q}
0 After a cup of coffee in the kitchen, {p} sold the {object} to {q}
  | {q} bought the {object} from {p} over a cup of coffee
  | Over a cup of coffee in the kitchen, {p} let {q} buy the {object}
1 Although {p} had promised it to {name}, the {object} went to {q}
  | {q} received the {object}, even though {p} had promised it to {name}
  | Despite a promise made to {name}, {p} let {q} keep the {object}
1 {p} only pretended to keep the {object} and slipped it to {q} later
  | While pretending to keep the {object}, {p} later slipped it to {q}
  | {q} was later slipped the {object} that {p} pretended to keep
1 {p} would have kept the {object} if {q} had not asked for it first
  | Had {q} not asked for the {object} first, {p} would have kept it
  | But for the request of {q}, {p} would have kept the {object}
2 {p} suspected that {q} knew the {object} to be a copy, which {name} denied
  | That the {object} was a copy was known to {q}, or so {p} suspected
  | What {p} suspected {q} of knowing was that {name} had a copy
2 {p} did not doubt that {q} had been misled about the belief of {other}
  | Whether {other} believed it was what {p} thought {q} misled about
  | {q} had been misled, {p} did not doubt, about {other} believing it
2 {p} was unaware that {q} had not lied when denying the exchange
  | Unaware that {q} had not lied, {p} disbelieved the denial of an exchange
  | That {q} did not lie in denying the exchange was unknown to {p}
""",
        twists="""
None of the people named here would have said so in the presence of {other}, who nevertheless learned of it.
It later turned out that the order of the sentences is not the one in which things happened.
Everything after the first sentence is hearsay, unless {name} could have seen it.
Not all of those named were speaking of the same {object}, although each of them assumed so.
Except for one of them, nobody realised that two of the names belong to the same person.
""",
        calm="""
Everything happened on one evening, in a large and comfortable house at the end of the lane.
The people mentioned have been friends for a long time and often spend the weekend together.
It was raining outside, there was a fire in the hall, and dinner was served at eight.
The account was written down the next morning by someone who had been there the whole time.
""",
    ),
    _family(
        "sorting",
        "do",
        scenes="""
0 Here is a list: {list}. | What does the list look like at the end?
-1 You are given the numbers {list}. | Is the list empty now?
0 {name} lays out cards numbered {list} and handles them in {count} moves. | In what order do the cards lie?
0 A queue holds the tickets {list}, and {count} operations are carried out on it.
  | Which ticket is at the front?
1 Let a sequence be given by {list}.
  | How many inversions does the final sequence have compared with the first?
0 The shelf numbers {list} at the {place} are put in a new order. | Which number is in the middle?
-1 Write these numbers on a sheet: {list}. | Name one number that is on your sheet.
1 A scheduler keeps the keys {list} in an array. | What is the longest increasing subsequence of the result?
""",
        steps="""
0 remove the number that stands first in the row | cross out the number on the far left of the row
  | take away the number at the very front
0 write the number {n} after all the others | put the number {n} on the far right of the row
  | add the number {n} at the very end
0 put all the numbers in order, the smallest one first
  | arrange the whole row from the smallest to the largest number
  | bring the numbers in order, beginning with the smallest
0 remove the largest of all the numbers in the row | cross out the largest number in the row
  | take away the biggest number that you can find
1 reverse the first half | turn the front half around | flip the order within the first half
1 drop every entry that is divisible by {small} | discard all multiples of {small}
  | throw out whatever {small} divides
1 move the largest entry to the front | bring the maximum to the first place
  | let the biggest entry go to the head
2 replace each entry by its count of smaller successors
  | substitute for each entry the count of inversions it begins
  | give every entry's count of smaller successors instead
2 partition it stably around its median of three | do one stable quicksort pass, the median of three as pivot
  | split it stably around the median of three
2 form the symmetric difference with the squares modulo {small}
  | drop the intersection with the squares modulo {small}
  | take the symmetric difference with the residues modulo {small}
2 apply the inverse of its sorting permutation | permute it by the inverse of its sorting permutation
  | rearrange it by its sorting permutation, inverted
""",
        twists="""
Entries that are equal to their own position stay where they are, and no operation may move past them.
Whenever the number of entries is even, the next operation works from the back instead of the front.
If an operation changes nothing, undo the one before it, unless that was the first.
Each operation sees the list as it was two operations earlier, except for the last.
Ignore duplicates for the purpose of comparing, but not for the purpose of counting.
""",
        calm="""
The numbers are written large enough to be read by everybody at the back of the room.
The entries are ordinary whole numbers, written next to each other in a row from left to right.
It may help to write the whole list down again after each operation and to look it over.
The list was made up this morning for practice, and there is nothing special about the numbers.
""",
    ),
    _family(
        "scheduling",
        "say",
        scenes="""
0 A small building job has to be planned. | How many minutes does the whole job take?
-1 Here is the plan for renovating the {place}. | Is there anything to do at all?
0 {name} has {count} notes on the renovation of the {place}.
  | When can everything be finished at the earliest, from noon?
0 The workers at the {place} agree on the following. | How long do they need in total?
1 A foreman must assign the tasks to identical crews.
  | What is the smallest number of crews that attains the shortest time?
0 {other} wants the kitchen done and gets this timetable. | After how many minutes is the {last} over?
-1 These are the tasks for today. | Which task is mentioned first?
1 A consultant is asked to shorten the plan for the {place}. | Which tasks have no slack on any critical path?
""",
        steps="""
0 The {p} is a simple piece of work and takes {n} minutes from beginning to end
  | It is a simple piece of work to do the {p} and takes {n} minutes in all
  | {n} minutes are needed for the {p}, which is a simple piece of work
0 The {p} lasts {n} minutes and comes some time before the {q} in the plan
  | In the plan, the {p} comes some time before the {q} and lasts {n} minutes
  | {n} minutes go to the {p}, followed by a pot of tea and then the {q}
0 The {p} is done by {name}, who likes the work, in {n} minutes
  | {name}, who likes the work, does all of the {p} in {n} minutes
  | {n} minutes are enough for {name}, who likes the work, to do the {p}
1 The {q} cannot begin until the {p} has been done for {n} minutes
  | Only when the {p} has gone on for {n} minutes can the {q} begin
  | {n} minutes of the {p} must have passed before the {q} begins
1 The {p} and the {q} may overlap by at most {n} minutes
  | At most {n} minutes of overlap are allowed between the {p} and the {q}
  | {n} minutes is the longest that the {p} and the {q} may overlap
1 The {p} takes {n} minutes alone, or half of that if {name} helps
  | Alone one needs {n} minutes for the {p}, with the help of {name} half of that
  | {n} minutes go to the {p}, or half as many when {name} helps
2 Whichever of the {p} and the {q} goes second needs {n} minutes more
  | Unless it goes first, the {p} or the {q} is longer by {n} minutes
  | {n} more minutes go to the {p} or the {q}, whichever is later
2 The {p} must not run while anyone needed for the {q} rests
  | While anyone needed for the {q} rests, the {p} must not run
  | Never may the {p} run while anyone needed for the {q} rests
2 The {p} may be interrupted only by the {q}, costing {n} minutes each time
  | Only the {q} may interrupt the {p}, costing {n} minutes each time
  | Interrupting the {p}, only ever for the {q}, costs {n} minutes
""",
        twists="""
No two tasks that share a worker may overlap, unless one of them has been delayed already.
If anything ends later than planned, all that follows except for the last task has to be done in reverse order.
Only one of the two ladders can be used after the first hour, and never by {name} and {other} at once.
Tasks that are not mentioned twice may be left out, provided that nothing else depends on them.
Each break counts as work for everybody but {other}, whose hours must neither exceed {n} minutes nor be split.
""",
        calm="""
The owner of the building is a friendly person and brings coffee and cake in the afternoon.
All the tools and materials are already there, neatly stacked in the hall and ready for use.
Everybody on the team has done this kind of work before and knows where everything is kept.
It may help to draw a line for each of the tasks on a sheet of squared paper.
""",
        cast=_JOBS,
    ),
)
