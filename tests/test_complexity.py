"""The complexity features: the published formulas by hand, every definition once, finite and linear on anything."""

from __future__ import annotations

import math
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.semantic.complexity import LIMIT, NAMES, complexity

LONG = 100_000
NASTY = {
    "empty": "",
    "blank": " \t\n \r\n",
    "one word": "word",
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469",
    "no space": "a" * LONG,
    "blob": "QUJD" * (LONG // 4),
    "vowels": "ae" * (LONG // 2),
    "stops": "." * LONG,
    "stops before a letter": "." * LONG + "x",
    "stops at letters": ".x" * (LONG // 2),
    "stops and quotes": ".\"'" * (LONG // 3) + "x",
    "openers": "(" * LONG,
    "closers": "]" * LONG,
    "spaces": " " * LONG,
    "indented blank lines": "\n  " * (LONG // 3) + "x",
    "dollars": "$a" * (LONG // 2),
    "backslashes": "\\" * LONG,
    "apostrophes": "a'" * (LONG // 2),
    "commas in a number": "1," * (LONG // 2),
    "semicolons": ";  " * (LONG // 3),
    "options": "A.\t" * (LONG // 3),
    "tabs": "\t" * LONG,
    "underscores": "_" * LONG,
    "Chinese": "天气怎么样\uff1f" * (LONG // 6),
    "Arabic": "ما هي عاصمة فرنسا؟ " * 1000,
    "Devanagari": "हिन्दी में लिखा। " * 1000,
    "surrogates": "\ud800" * LONG,
    "NUL": "a\0b",
    "unbalanced": ")]}((([[{",
    "combining": "e\u0301\u0327" * (LONG // 3),
    "lone mark": "\u0301",
}


def features(text: str) -> dict[str, float]:
    return dict(zip(NAMES, complexity([text])[0].tolist(), strict=True))


def test_there_are_thirty_of_different_names_and_no_prompts_make_no_rows() -> None:
    assert len(set(NAMES)) == len(NAMES) == 30
    assert complexity([]).shape == (0, 30)


def test_the_formulas_by_hand() -> None:
    # 10 words, 2 sentences, 11 syllables, 30 characters; `the` occurs twice.
    got = features("The cat sat on the mat. It was not happy!")
    want = {
        "flesch_reading_ease": 206.835 - 1.015 * 5 - 84.6 * 1.1,
        "flesch_kincaid_grade": -0.66,
        "coleman_liau": 17.64 - 5.92 - 15.8,
        "automated_readability": -4.8,
        "smog": 3.1291,
        "gunning_fog": 2.0,
        "lix": 5.0,
        "type_token_ratio": 0.9,
        "hapax_ratio": 0.8,
        "yules_k": 200.0,
        "words": math.log(11),
        "sentences": math.log(3),
        "sentence_length": math.log(6),
        "word_length": math.log(4),
        "negations": math.log(2),
        "lines": math.log(2),
        "punctuation": 2 / 41,
        "uppercase": 2 / 30,
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    # 4 words in 1 sentence; photosynthesis and atmospheric have 5 and 4 syllables, three words over six letters.
    got = features("Photosynthesis converts atmospheric carbon.")
    assert got["smog"] == pytest.approx(1.0430 * math.sqrt(60) + 3.1291)
    assert got["gunning_fog"] == pytest.approx(0.4 * (4 + 50))
    assert got["lix"] == pytest.approx(4 + 75)
    assert got["flesch_kincaid_grade"] == pytest.approx(0.39 * 4 + 11.8 * 13 / 4 - 15.59)


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("made", 1),
        ("table", 2),
        ("whole", 1),
        ("walked", 1),
        ("wanted", 2),
        ("times", 1),
        ("boxes", 2),
        ("only", 2),
        ("probability", 5),
        ("the", 1),
        ("42", 1),
        ("rhythms", 1),
    ],
)
def test_syllables_are_vowel_groups_less_a_silent_e(word: str, count: int) -> None:
    # One word, one sentence: the grade is 0.39 + 11.8 syllables - 15.59.
    assert features(word)["flesch_kincaid_grade"] == pytest.approx(0.39 + 11.8 * count - 15.59)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("Is it 3.14? Or 2? x", "sentences", math.log(4)),
        ("one\n\ntwo\nthree", "sentences", math.log(3)),
        ("one\n\ntwo\nthree", "lines", math.log(5)),
        ("今天好。明天呢\uff1f", "sentences", math.log(3)),
        ("今天好。", "words", math.log(4)),
        ("हिन्दी में", "words", math.log(3)),
        ("don't won\u2019t stop", "negations", math.log(3)),
        ("don't won\u2019t stop", "words", math.log(4)),
        ("Why? 为什么\uff1f", "questions", math.log(3)),
        ("add 3,141.59 and 2", "number_density", 2 / 6),
        ("a+b=c^2", "math_symbols", 3 / 7),
        (r"$x$ and \frac{1}{2} and \(y\) but not \n", "latex", math.log(5)),
        ("```\ndef f():\n    return a == b;\n```", "code", math.log(8)),
        ("It was $5, then a class trip.", "code", 0.0),
        ("a (b [c] {d (e)})", "nesting_depth", math.log(4)),
        (")) (a)", "nesting_depth", math.log(2)),
        ("(a) [b", "brackets", 3 / 6),
        ("Which?\nA. one\n(B) two\n 3) three\nfour", "options", math.log(4)),
        ("ab 12", "digits", 2 / 5),
        ("aé", "non_ascii", 1 / 2),
        ("aabb", "entropy", 1.0),
        ("abcdabcd", "entropy", 2.0),
        ("ab" * 50, "zlib_ratio", len(zlib.compress(b"ab" * 50, 6)) / 100),
    ],
)
def test_every_other_definition_on_a_text_of_its_own(text: str, name: str, value: float) -> None:
    assert features(text)[name] == pytest.approx(value)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nasty_texts_are_finite_and_take_well_under_a_second(text: str) -> None:
    started = time.process_time()
    values = complexity([text])
    assert time.process_time() - started < 1  # the slowest takes 0.15 s; quadratic time would take minutes
    assert np.isfinite(values).all()


@given(st.lists(st.text(st.characters()), max_size=3))
def test_any_text_has_finite_features_that_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    values = complexity(texts)
    assert np.isfinite(values).all()
    by_name = dict(zip(NAMES, values.T, strict=True))
    for name in ("type_token_ratio", "hapax_ratio", "punctuation", "uppercase", "digits", "non_ascii", "brackets"):
        assert ((by_name[name] >= 0) & (by_name[name] <= 1)).all(), name
    assert (np.abs(values[:, :7]) <= LIMIT).all()
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(values[row], complexity([text])[0])


def test_blank_and_empty_prompts_have_no_words_and_no_score() -> None:
    for text in ("", " \n"):
        got = features(text)
        assert {got[name] for name in NAMES[:12]} == {0.0}
