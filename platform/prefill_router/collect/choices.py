"""The letter of the choice that an answer states.

In: the text of an answer. Out: a letter. A letter counts only in a statement ("Answer: C", "I choose C", "C is
correct") or as a line of its own; the pronoun "I", the article "A" and letters of a discussion do not count.
"""

# ruff: noqa: RUF001 (characters that models write)

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from prefill_router.collect.statements import (
    LONGEST,
    RETRACTION,
    Statement,
    comparable,
    lines_of,
    normalised,
    plain,
    retracted,
    statements,
    without_reasoning,
)

AMBIGUOUS = "?"  # a statement that names several choices, or says that a choice is not the answer
A_LETTER = r"[A-Z](?![A-Za-z'’])"
# Words between "the answer is" and the letter.
BEFORE_LETTER = re.compile(
    r"^(?:(?:most likely|probably|clearly|definitely|actually|therefore|thus|simply|then|the|la|le|el|die|der|a|é|"
    r"option|choice|letter|answer|opción|opzione|opção|letra|lettre|alternativa|buchstabe|вариант|选项|選項|選択肢)[\s:]+|选项|選項|"
    r"選択肢)+(?=\W*[A-Za-zАС]\b|\W*[A-Z](?![A-Za-z]))",
    re.IGNORECASE,
)
# "C", "(c)", "C) Paris", "**C**. Paris"; not "C++", "C-reactive", "I'm" or "B12".
LETTER = re.compile(
    r"^[(\[<*_{]*(?P<letter>[A-Za-zАС])(?![A-Za-zÀ-ɏЀ-ӿ0-9_'’+#]|-\w)[*_]*(?P<closed>[)\]}>.:]?)[*_]*(?P<tail>.*)",
    re.DOTALL,
)
CYRILLIC = str.maketrans("АС", "AC")  # Cyrillic letters that look like Latin ones, in Russian answers
# A second letter after the first: "A and C", "A/C", "A, or maybe C", "(A) (C)".
SECOND = re.compile(
    r"^[\s,/&+)]*(?:,|/|&|\+|\band\b|\bor\b|\bund\b|\boder\b|\bet\b|\bou\b|\by\b|\bo\b|и|или|和|或|、)\s*"
    rf"(?:maybe|possibly|perhaps|both|option|choice)?\s*[(\[*]*{A_LETTER}|^[\s(\[*]*[A-Z][)\]*.\s]*$"
)
# The beginning of a statement that names no choice, or several.
NEGATION = re.compile(
    r"^(?:not|neither|nor|none|no|nicht|keine?|either|both|between|any|all|actually|instead|rather)\b", re.IGNORECASE
)
AFTER_ARTICLE = re.compile(
    r"^\s+(?!because|since|as |for |which|is |due|given|with|based|by )[a-z]"
)  # "A good example"
BECAUSE = re.compile(r"\s*(?:[,;(]|\.\s|\s[-–—]\s|\s(?:because|since|as)\b)")
CHOSEN = re.compile(
    r"(?P<before>\b(?:not|n't|never|if|why|may|might|could)\s+)?"
    r"(?:\b(?:go(?:ing)? with|choose|chose|pick|select|opt for)\s+|(?:故|因此|所以|应|應|我)[选選][择擇]?\s*)"
    rf"(?P<payload>(?:(?:option|choice|answer|letter)\s+)?[*(]*{A_LETTER}.*)"
)
# "Option B is correct", "So B is the best answer"; not "Vitamin C is the best".
IS_RIGHT = re.compile(
    r"(?P<before>\b(?:neither|nor|not|if|whether|or|and|why|that)\s+)?"
    r"(?:\b(?:option|choice|answer|so|thus|therefore|hence)\b|^|[.!?:;,\n])[\s,*(]*(?-i:(?P<letter>[A-Z]))[)*]*\s+"
    r"(?:is|must be)\s+(?:therefore\s+|clearly\s+)?(?:the\s+)?(?:only\s+)?(?:most\s+)?(?:correct|right|best)"
    r"(?!\s+(?:that|to|if|about|in\b))",
    re.IGNORECASE,
)
OPTION_LINE = re.compile(r"^[ \t>*_\-•]*\(?([A-Z])[).:]", re.MULTILINE)
THEREFORE = re.compile(r"^(?:so|thus|therefore|hence|answer)[,:]?\s+", re.IGNORECASE)


def choice(text: str, letters: int, choices: Sequence[str] | None = None) -> str | None:
    """The letter of the choice that an answer states, of the first `letters` of the alphabet.

    With `choices`, their texts, an answer may state a text instead. None if it states no choice, several, or a letter
    with the text of another choice.
    """
    rest = without_reasoning(text)
    if rest is None:
        return None
    rest = normalised(rest)
    chosen = [Statement(one.start(), one["payload"], False) for one in CHOSEN.finditer(rest) if not one["before"]]
    last = None
    for one in sorted([*statements(rest), *chosen], key=lambda one: one.start, reverse=True):
        letter = _letter(one.payload, letters, choices)
        last = last or one
        if letter is not None and letter != AMBIGUOUS:
            return None if retracted(rest, last) else letter
        if letter == AMBIGUOUS or one.formal:
            return None
    right = {one["letter"] for one in IS_RIGHT.finditer(rest) if not one["before"]}
    if not right:
        return _bare(rest, letters, choices)
    known = len(right) == 1 and right <= set(ascii_uppercase[:letters]) and not RETRACTION.search(rest)
    return right.pop() if known else None


def _letter(payload: str, letters: int, choices: Sequence[str] | None) -> str | None:
    """The letter of a statement. AMBIGUOUS if it names several choices; None if it names none."""
    given = plain(payload)
    alone = re.fullmatch(r"\W*[A-Za-z]\W*", given) is not None  # a letter, also where it is the text of another choice
    if not alone and (by_text := _of_text(given, choices)) is not None:
        return by_text
    given = BEFORE_LETTER.sub("", given)
    if NEGATION.match(given):
        return AMBIGUOUS
    if (found := LETTER.match(given)) is None:
        return None
    letter, tail = found["letter"].translate(CYRILLIC), found["tail"]
    if letter.islower() and found["closed"] not in (")", "]") and re.search(r"\w", tail):
        return None
    letter = letter.upper()
    if tail.lstrip().startswith("?") or letter not in ascii_uppercase[:letters]:
        return None
    if not found["closed"] and letter in "AI" and AFTER_ARTICLE.match(tail):
        return None
    return AMBIGUOUS if SECOND.match(tail) or _of_text(tail, choices) not in (None, letter) else letter


def _of_text(given: str, choices: Sequence[str] | None) -> str | None:
    """The letter of the choice whose text is `given`, or its part before an explanation."""
    texts = [comparable(text) for text in choices or ()]
    cuts = [found.start() for found in BECAUSE.finditer(given)] if texts else []
    candidates = (comparable(given[:cut]) for cut in [len(given), *reversed(cuts)])
    return next((ascii_uppercase[texts.index(one)] for one in candidates if one and texts.count(one) == 1), None)


def _bare(text: str, letters: int, choices: Sequence[str] | None) -> str | None:
    """The letter of a text without statements whose first or last line is nothing but a choice."""
    lines = [line[:LONGEST] for line in lines_of(text)]
    if not lines or len(set(OPTION_LINE.findall(text))) > 1 or RETRACTION.search(text):
        return None
    found = set()
    for line in {lines[0], lines[-1]}:
        line = BEFORE_LETTER.sub("", THEREFORE.sub("", plain(line)))
        match = LETTER.match(line)
        if _of_text(line, choices) or (match and _is_bare(match, len(lines) == 1, choices)):
            found.add(_letter(line, letters, choices))
    return found.pop() if len(found) == 1 and AMBIGUOUS not in found else None


def _is_bare(match: re.Match[str], only_line: bool, choices: Sequence[str] | None) -> bool:
    """Whether a line is a letter alone, or a letter with the text of a choice or, as the only line, with any text."""
    marked = match["closed"] in (")", ".") and match["letter"].isupper()
    return not re.search(r"\w", match["tail"]) or (
        marked and (only_line or _of_text(match["tail"], choices) is not None)
    )
