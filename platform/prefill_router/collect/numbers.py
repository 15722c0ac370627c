"""The number in a final answer: separators, fractions, powers, percent, units and LaTeX.

In: a short text such as "$1,234.50" or "\\frac{3}{4} cm". Out: an exact `Fraction`, or None if the text has not exactly
one number. Expressions with π or roots are not evaluated.
"""

# ruff: noqa: RUF001 (characters that models write)

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from prefill_router.collect.statements import normalised, plain

RELATIVE = 1e-6  # tolerance without another one, for numbers that are not whole
LARGEST_EXPONENT = 400

# Notations of a decimal number: pattern, separators of thousands, decimal sign. The first that matches is meant.
DECIMALS = [
    (re.compile(r"(?:\d+\.?\d*|\.\d+)"), "", "."),  # 1234.5
    (re.compile(r"[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?:\.\d+)?"), ",", "."),  # 1,234.5 and the Indian 12,34,567
    (re.compile(r"\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?"), " '", "."),  # 1 234.5 and 1'234.5
    (re.compile(r"\d{1,3}(?:[ ']\d{3})+,\d+"), " '", ","),  # 1 234,5
    (re.compile(r"\d{1,3}(?:\.\d{3})+,\d+"), ".", ","),  # 1.234,5
    (re.compile(r"\d{1,3}(?:\.\d{3}){2,}"), ".", ","),  # 1.234.567
    (re.compile(r"\d+,(?:\d{1,2}|\d{4,})|0,\d+"), "", ","),  # 3,14; three digits after a comma are thousands
]
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# Replacements before a number is read, in this order.
NOTATION = [
    (re.compile(r"[−–—‒](?=\s?[\d.(\\])"), "-"),  # the Unicode minus, and dashes that are used as one
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|!)"), ""),
    (re.compile(r"\\[,;:~ ]|~"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" (\1)/(\2)"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" (\1)/(\2)"),
    (re.compile(r"\((-?[\d.]+)\)/\((-?[\d.]+)\)"), r"\1/\2"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\(?:times|cdot)\b|[·⋅∙]|(?<=\d)\s?[x*]\s?(?=10\s?\^)|(?<=\d)\*(?=10\*\*)"), "×"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\{\s*([+-]?\d+)\s*\}|\^\(([+-]?\d+)\)"), r"^\1\2"),
    (re.compile(r"\\(?:approx|simeq)\b|[≃≅∼]"), "≈"),
    (re.compile(r"\b(?:minus|negative)\s+(?=\S)", re.IGNORECASE), "-"),
]
DECIMAL = r"(?:\d[\d.,' ]*\d|\d|\.\d+)"
NUMBER = re.compile(
    rf"(?<![\w/.,^×)])(?P<sign>[-+]?)\s?[$€£¥₹]?\s?(?:(?P<whole>\d+) (?P<part>\d+)/(?P<of>\d+)"
    rf"|(?:(?P<factor>{DECIMAL})\s?×\s?)?(?P<base>\d+)\s?\^\s?(?P<power>[+-]?\d{{1,4}})"
    rf"|(?P<over>{DECIMAL})\s?/\s?(?P<under>-?{DECIMAL})"
    rf"|(?P<decimal>{DECIMAL})(?:[eE](?P<exponent>[+-]?\d{{1,4}}))?)(?![\d/^×])"
    rf"(?:[\s-](?P<scale>{'|'.join(SCALES)})s?\b)?",
    re.IGNORECASE,
)
# A unit: up to six words and signs with exponents, such as "%", "km/h", "m/s^2" or "apples".
UNIT = re.compile(
    r"\s?(?:[%°′″$€£¥₹]|per\s?cent)?(?:[\s/·×-]{0,2}(?:[^\W\d_]|[°%$€£Ω])+(?:\^-?[1-6])?(?:'s)?\.?){0,6}[\s.。*]?[\s*]*"
)
# What makes the text after a number more than a unit: "5k", "2n", "3rd", "5 pm", "2 Millionen", "3 or", "0.33...".
NO_UNIT = re.compile(
    r"(?-i:[kKMBnxyzieπ]|bn|st|nd|rd|th|pi)(?![^\W\d_])|[!万億亿千百만억천]|\.\."
    r"|[\s-]*(?:(?-i:[kxyzienπ])|am|pm|a\.m|p\.m|pi|sqrt|mill?i\w*|bill?i\w*|mrd|mio|mil|lakhs?|crores?|ten\w*|"
    r"hundred\w*|thousand\w*|тыс\w*|млн|млрд|(?:jan|feb|mar|apr|jun|jul|aug|sep|oct|nov|dec)\w*)\b"
    r"|.*\b(?:to|or|and|through|bis|oder|und|out)\b",
    re.IGNORECASE,
)
# What makes a number a bound, a range or a name: "at least 5", "step 4", "May 3".
NO_NUMBER = re.compile(
    r"[\d<>≥≤±^_×√π≠\\(\[{+*/!]|-\s*$|\b(?:between|least|most|not|no|nor|than|up to)\b|\b(?:or|and|over|under|above|"
    r"below|from|step|chapter|page|section|option|choice|question|problem|part|figure|equation|case|version|log|ln|sin|"
    r"cos|tan|root of|square of|"
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)\W*$",
    re.IGNORECASE,
)
# Words before a number that leave it a bare number.
QUALIFIER = re.compile(
    r"(?:[\s:*~\"'-]|\b(?:approximately|approx|about|around|roughly|exactly|precisely|simply|just|only|nearly|almost|"
    r"therefore|thus|then|actually|equal to|a total of|usd|eur|gbp|ungefähr|etwa|environ|aproximadamente|circa|"
    r"примерно)\b\.?)*",
    re.IGNORECASE,
)
SCALED_MONEY = re.compile(r"[$€£¥₹]\s?[\d.,]+\s?[mbk](?![\w$])", re.IGNORECASE)  # "$5 m"
ARITHMETIC = re.compile(r"[\d\s+\-×*/().,^%$]+")
CLAUSE = re.compile(
    r"\s\([^()]*\)?|;|(?<=\w)!(?=\s)|,?\s+(?:because|since|which|where|giving|so|as|but)\b"
    r"|,\s+(?=[^\W\d])(?!\w{1,2}\s*=)",
    re.IGNORECASE,
)


def parse(text: str, words_before: bool = True) -> Fraction | None:
    """The number in a final answer. None if it has none, several, a range, a bound, a date or a symbol such as π.

    "It takes 3 hours" has the number 3; without `words_before` only words such as "about" may stand before it. Of
    "7/2 = 3.5" and "1/3 ≈ 0.333" the first number is the answer, if the numbers differ by less than 1%.
    """
    if SCALED_MONEY.search(text):
        return None
    sides = [side for side in _notation(text).split("=") if side.strip()]
    values = [_approximated(side, words_before) for side in sides]
    if any(value is None and _another(side) for side, value in zip(sides[1:], values[1:], strict=True)):
        return None
    known = [value for value in values if value is not None]
    agree = all(abs(value - known[0]) <= abs(known[0]) / 100 for value in known)
    return known[0] if known and agree else None


def same_number(given: Fraction, wanted: Fraction, tolerance: float | None = None) -> bool:
    """Whether two numbers are equal up to a tolerance, relative to `wanted`.

    Without `tolerance`, a whole number must be equal, and any other within 1e-6.
    """
    if tolerance is None:
        tolerance = 0.0 if wanted.denominator == 1 else RELATIVE
    return abs(given - wanted) <= Fraction(tolerance) * abs(wanted)


def shown(value: Fraction) -> str:
    """A number as text: a decimal number, or a fraction if that has no end."""
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return str(value) if value.denominator == 1 or Fraction(decimal) != value else str(decimal)


def _notation(text: str) -> str:
    """A text in one notation, up to the end of the clause with its first number."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1", normalised(text))
    for pattern, replacement in NOTATION[:5]:
        text = pattern.sub(replacement, text)
    text = plain(re.sub(r"(?<!\d)\$(?=[^$]*[\\^])|(?<=[\d}])\$", "", text))
    for pattern, replacement in NOTATION[5:]:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^\(([^()]*)\)$", r"\1", text.strip())
    digit = re.search(r"\d", text)
    for end in re.finditer(r"[.?。](?=\s|$)", text):
        if digit is not None and end.start() > digit.start():
            text = text[: end.start()]
            break
    cut = next((one for one in CLAUSE.finditer(text) if digit is None or one.start() > digit.start()), None)
    return text[: cut.start()] if cut else text


def _approximated(side: str, words_before: bool) -> Fraction | None:
    """The first number of one side of an equation, such as the exact one of "1/3 ≈ 0.333"."""
    values = (_one_number(part.strip(), words_before) for part in side.split("≈"))
    return next((value for value in values if value is not None), None)


def _another(side: str) -> bool:
    """Whether a side of an equation that is not a number has one, such as the middle of "x = 4 or x = 5"."""
    return bool(re.search(r"\d", side)) and not ARITHMETIC.fullmatch(side)


def _one_number(text: str, words_before: bool) -> Fraction | None:
    """The only number in a text with words before it and a unit after it."""
    if (word := text.lower().removeprefix("-")) in WORDS:
        return Fraction(WORDS.index(word)) * (-1 if text.startswith("-") else 1)
    found = NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if NO_NUMBER.search(before) or not (words_before or QUALIFIER.fullmatch(before)):
        return None
    if NO_UNIT.match(after) or not UNIT.fullmatch(after):
        return None
    return _value(found)


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; None if its separators follow no notation."""
    value: Fraction | None
    if found["whole"] is not None:
        top, bottom = Fraction(int(found["part"])), Fraction(int(found["of"]))
        value = None if bottom == 0 else int(found["whole"]) + top / bottom
    elif found["base"] is not None:
        factor = Fraction(1) if found["factor"] is None else _decimal(found["factor"])
        value = None if factor is None else _scaled(factor, Fraction(int(found["base"])), int(found["power"]))
    elif found["over"] is not None:
        over, under = _decimal(found["over"]), _decimal(found["under"].lstrip("-"))
        value = None if over is None or not under else over / under * (-1 if found["under"][0] == "-" else 1)
    else:
        value = _decimal(found["decimal"])
        if value is not None and found["exponent"] is not None:
            value = _scaled(value, Fraction(10), int(found["exponent"]))
    if value is None:
        return None
    scale = SCALES[found["scale"].lower()] if found["scale"] else 1
    return value * scale * (-1 if found["sign"] == "-" else 1)


def _decimal(token: str) -> Fraction | None:
    for pattern, thousands, sign in DECIMALS:
        if pattern.fullmatch(token):
            digits = token.translate(dict.fromkeys(map(ord, thousands)))
            return Fraction(digits.replace(sign, ".").rstrip("."))
    return None


def _scaled(value: Fraction, base: Fraction, power: int) -> Fraction | None:
    if abs(power) > LARGEST_EXPONENT or base > 1000 or (base == 0 and power < 0):
        return None
    return value * base**power
