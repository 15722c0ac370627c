"""Thirty handcrafted complexity features of a prompt: readability, lexical diversity, structure and information.

In: any texts. Out: [queries, 30], finite, in the order of `NAMES`; `FEATURES` gives each definition and its source. The
groups are those of paper 4.2. Runs in time linear in the text. Does not read files.

The readability formulas are made for English prose; other texts get a score that has no such meaning. A word is a run
of letters, digits and combining marks (apostrophes inside included), or one ideograph or kana. Syllables are counted as
vowel groups of the spelling, at least one per word. Scores are clipped to +-150; scores outside come from text that is
not prose (a base64 blob counts as one word).
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from unicodedata import category

import numpy as np
from jaxtyping import Float

VERSION = 1  # of the definitions; raise it whenever one changes
LIMIT = 150.0  # readability scores are clipped to +-LIMIT

# W: words; T: distinct words; S: sentences; Y: syllables; P: words of at least three syllables; C: characters in words;
# n: characters of the text, spaces included. A ratio with denominator 0 is 0.
FEATURES: dict[str, str] = {
    "flesch_reading_ease": "206.835 - 1.015 W/S - 84.6 Y/W (Flesch 1948)",
    "flesch_kincaid_grade": "0.39 W/S + 11.8 Y/W - 15.59 (Kincaid et al. 1975)",
    "coleman_liau": "5.88 C/W - 29.6 S/W - 15.8 (Coleman & Liau 1975)",
    "automated_readability": "4.71 C/W + 0.5 W/S - 21.43 (Smith & Senter 1967)",
    "smog": "1.0430 sqrt(30 P/S) + 3.1291 (McLaughlin 1969)",
    "gunning_fog": "0.4 (W/S + 100 P/W) (Gunning 1952)",
    "lix": "W/S + 100 (words of more than six characters)/W (Bjornsson 1968)",
    "type_token_ratio": "T/W, case folded (Johnson 1944)",
    "hapax_ratio": "words that occur once, over W, case folded",
    "yules_k": "10^4 (sum over words of count^2 - W) / W^2, case folded (Yule 1944)",
    "words": "ln(1 + W)",
    "sentences": "ln(1 + S); a sentence ends at . ! ? before a space, a full stop of another script, or a blank line",
    "lines": "ln(1 + lines)",
    "sentence_length": "ln(1 + W/S)",
    "word_length": "ln(1 + C/W)",
    "negations": "ln(1 + words such as not, never, without, isn't)",
    "questions": "ln(1 + question marks)",
    "number_density": "numbers per word; 3,141.59 is one number",
    "math_symbols": "share of n: Unicode category Sm, and ^",
    "latex": r"ln(1 + LaTeX commands, \( and \[, and inline $...$)",
    "code": "ln(1 + marks of code: fences, definitions, imports, lines ending in ; { }, operators such as == -> ::)",
    "nesting_depth": "ln(1 + deepest nesting of ( [ {); unmatched closing brackets are ignored",
    "brackets": "share of n: ( ) [ ] { }",
    "options": "ln(1 + lines that begin with an option label such as A. or (B) or 3))",
    "punctuation": "share of n: Unicode categories P*",
    "uppercase": "share of letters: Unicode category Lu",
    "digits": "share of n: Unicode category Nd",
    "non_ascii": "share of n: code points above 127",
    "entropy": "Shannon entropy of the character frequencies, bits per character (Shannon 1948)",
    "zlib_ratio": "zlib-compressed bytes (level 6) over UTF-8 bytes; above 1 for very short texts",
}
NAMES: tuple[str, ...] = tuple(FEATURES)

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # characters of scripts without spaces between words
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0df3\u0e31-\u0e4e\u200c\u200d"
_LETTER = rf"(?:(?![{_ALONE}_])[\w{_MARKS}])"  # re's \w does not match the combining marks of Indic vowels
# Possessive quantifiers (++, *+) and look-behinds keep every pattern linear: no pattern scans a run of text twice.
_WORD = re.compile(rf"[{_ALONE}]|{_LETTER}++(?:['\u2019]{_LETTER}++)*+")
_SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]++[\"'\u2019\u201d)\]]*+(?=\s|\Z)|[\u3002\uff01\uff1f\u0964\u061f\u06d4]"
    r"|\n[ \t\r]*+\n"
)
_VOWELS = re.compile("[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýÿœ]+")
_SILENT = re.compile("(?:[^aeiouyl]e|[aeiouy]le|[^aeiouytd]ed|[^aeiouysxzcgh]es)$")  # made, whole, walked, times
_NUMBER = re.compile(r"\d++(?:[.,]\d++)*+")
_LATEX = re.compile(r"\\[A-Za-z]{2,}+|\\[()\[\]]|\$[^$\n]{1,200}+\$")
_CODE = re.compile(
    r"```|^[ \t]*+(?:def|class|import|return|function|const|public|private|#include)\b|[;{}][ \t]*+$"
    r"|\w\(\)|[=!<>]=|->|=>|::|&&|\|\|",
    re.MULTILINE,
)
_OPTION = re.compile(r"^[ \t]*+\(?(?:[A-Za-z]|\d{1,2})[.):][ \t]", re.MULTILINE)
_BRACKET = re.compile(r"[()\[\]{}]")
_QUESTION_MARKS = "?\uff1f\u061f"
_NEGATIONS = frozenset(
    {"no", "not", "never", "none", "nothing", "nobody", "nowhere", "neither", "nor", "cannot", "without", "except"}
)


def complexity(prompts: Sequence[str]) -> Float[np.ndarray, "queries 30"]:
    """The features of each prompt, float64."""
    rows = [_features(prompt) for prompt in prompts]
    return np.asarray([[row[name] for name in NAMES] for row in rows], dtype=np.float64).reshape(-1, len(NAMES))


def _features(text: str) -> dict[str, float]:
    words = _WORD.findall(text)
    return {**_of_words(words, _sentences(text)), **_of_structure(text, len(words)), **_of_characters(text)}


def _of_words(words: list[str], sentences: int) -> dict[str, float]:
    """Readability, diversity and lengths."""
    counts = Counter(word.lower() for word in words)
    syllables = {word: _syllables(word) for word in counts}
    w, characters = len(words), sum(map(len, words))
    per_sentence, length = _ratio(w, sentences), _ratio(characters, w)
    hard = sum(count for word, count in counts.items() if syllables[word] >= 3)
    per_word = _ratio(sum(count * syllables[word] for word, count in counts.items()), w)
    scores = {
        "flesch_reading_ease": 206.835 - 1.015 * per_sentence - 84.6 * per_word,
        "flesch_kincaid_grade": 0.39 * per_sentence + 11.8 * per_word - 15.59,
        "coleman_liau": 5.88 * length - 29.6 * _ratio(sentences, w) - 15.8,
        "automated_readability": 4.71 * length + 0.5 * per_sentence - 21.43,
        "smog": 1.0430 * math.sqrt(30 * _ratio(hard, sentences)) + 3.1291,
        "gunning_fog": 0.4 * (per_sentence + 100 * _ratio(hard, w)),
        "lix": per_sentence + 100 * _ratio(sum(len(word) > 6 for word in words), w),
    }
    negations = sum(count for word, count in counts.items() if word in _NEGATIONS or word.endswith(("n't", "n\u2019t")))
    return {
        **{name: min(max(score, -LIMIT), LIMIT) if w else 0.0 for name, score in scores.items()},
        "type_token_ratio": _ratio(len(counts), w),
        "hapax_ratio": _ratio(sum(count == 1 for count in counts.values()), w),
        "yules_k": 1e4 * _ratio(sum(count * count for count in counts.values()) - w, w * w),
        "words": math.log1p(w),
        "sentences": math.log1p(sentences),
        "sentence_length": math.log1p(per_sentence),
        "word_length": math.log1p(length),
        "negations": math.log1p(negations),
    }


def _of_structure(text: str, words: int) -> dict[str, float]:
    """Lines, questions, numbers, LaTeX, code, brackets and options."""
    return {
        "lines": math.log1p(len(text.splitlines())),
        "questions": math.log1p(sum(text.count(mark) for mark in _QUESTION_MARKS)),
        "number_density": _ratio(_count(_NUMBER, text), words),
        "latex": math.log1p(_count(_LATEX, text)),
        "code": math.log1p(_count(_CODE, text)),
        "nesting_depth": math.log1p(_depth(text)),
        "options": math.log1p(_count(_OPTION, text)),
    }


def _of_characters(text: str) -> dict[str, float]:
    """Shares of character categories, character entropy and compression ratio."""
    counts = Counter(text)
    kinds: Counter[str] = Counter()
    for character, count in counts.items():
        kinds[category(character)] += count
    n, data = len(text), text.encode("utf-8", "surrogatepass")
    return {
        "math_symbols": _ratio(kinds["Sm"] + counts["^"], n),
        "brackets": _ratio(sum(counts[bracket] for bracket in "()[]{}"), n),
        "punctuation": _ratio(_sum(kinds, "P"), n),
        "uppercase": _ratio(kinds["Lu"], _sum(kinds, "L")),
        "digits": _ratio(kinds["Nd"], n),
        "non_ascii": _ratio(sum(count for character, count in counts.items() if character > "\x7f"), n),
        "entropy": math.fsum(count / n * math.log2(n / count) for count in counts.values() if count),
        "zlib_ratio": _ratio(len(zlib.compress(data, 6)), len(data)) if n else 0.0,
    }


def _sentences(text: str) -> int:
    """Number of sentences: pieces between sentence ends that contain a word."""
    return sum(_WORD.search(piece) is not None for piece in _SENTENCE_END.split(text))


def _syllables(word: str) -> int:
    """Vowel groups of a lower-case word minus a silent e; at least one."""
    return max(1, len(_VOWELS.findall(word)) - (_SILENT.search(word, max(0, len(word) - 3)) is not None))


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def _sum(kinds: Counter[str], initial: str) -> int:
    return sum(count for kind, count in kinds.items() if kind.startswith(initial))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
