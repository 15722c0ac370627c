"""Meaning-preserving perturbations of prompts: another wording, to which the right answer is the same.

In: query ids and their prompts. Out: a table of perturbed prompts, one row per query and perturbation that changes it.
Pure text. What is drawn depends on the seed, the query's id and the perturbation's name alone, not on other queries.

Only *words* are touched: letters between blanks and punctuation, the first of either case, the rest small, outside
code (fences, backticks, indented lines, [TAG]...[/TAG]), LaTeX, [[...]] and short quotations. Numbers, formulas,
option letters, symbols (NaCl, pH, DNA) and scripts without case are therefore never touched. Code that nothing marks
as code is not recognised, and a typo may make another word (form for from).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from prefill_router.errors import InputError

Perturbation = Callable[[str, np.random.Generator], str | None]
SCHEMA = pa.schema(
    [("query_id", pa.string()), ("source", pa.string()), ("perturbation", pa.string()), ("prompt", pa.string())]
)
TYPO_SHARE = 0.05
DOUBLED_SHARE = 0.1
TEMPLATES = (
    "Please answer the following question.\n\n{prompt}",
    "I have a question for you:\n\n{prompt}",
    "Could you help me with this?\n\n{prompt}",
    "{prompt}\n\nThank you in advance.",
    "Below is a task.\n\n{prompt}\n\nPlease solve it.",
)

PROTECTED = re.compile(
    r"""
    ```.*?(?:```|\Z) | `[^`\n]{1,200}` | ^(?:[ ]{4}|\t)[^\n]*                      # code
  | \[([A-Za-z]{2,16})\].{0,4000}?\[/\1\]                                          # [PYTHON] ... [/PYTHON]
  | \$\$.+?\$\$ | \$(?!\s)[^$\n]{1,500}(?<!\s)\$(?!\d)                             # LaTeX; $5 and $6 are money
  | \\\(.{1,1000}?\\\) | \\\[.{1,1000}?\\\]
  | \[\[[^\]\n]{0,200}\]\] | "[^"\n]{1,60}" | “[^”\n]{1,60}”                       # answer formats, quoted strings
""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
WORD = re.compile(r"""(?<!\S)[(\["'“\u2018*_]*+([^\W\d_]{2,}+)(?=[.,;:!?…)\]"'”\u2019*_]*+(?!\S))""")
NUMBER = re.compile(
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|twenty|thirty|"
    r"forty|fifty|sixty|seventy|eighty|ninety|half|third|quarter|fifth|hundred|thousand|million|"
    r"billion)s?",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"(?:^|(##|\b(?i:options|choices):))[ \t]*(?:(\()([A-Z])\)|([A-Z])([.)]))(?:[ \t]+|(?(1)|(?!)))", re.MULTILINE
)
# An option that speaks of other options, by place or by letter, would mean something else elsewhere.
REFERS = re.compile(
    r"\b(?i:above|below|preceding|previous|foregoing|aforementioned)\b|\([A-Z]\)"
    r"|\b(?i:both|neither|either|only|options?|choices?|answers?)\s+[A-Z]\b"
    r"|\b[A-Z](?:,|\s+and|\s+or|\s*&|\s*/)\s*[A-Z]\b"
)


def case(prompt: str, rng: np.random.Generator) -> str | None:
    """Capitalised words of three letters or more in small letters. None where there are none."""
    edits = [
        (start, start + 1, prompt[start].lower())
        for start, end in _words(prompt)
        if end - start >= 3 and prompt[start].isupper()
    ]
    return _edited(prompt, edits) if edits else None


def whitespace(prompt: str, rng: np.random.Generator) -> str | None:
    """As pasted: some blanks between words doubled, CRLF line ends, blanks before them and at the end.

    None for a blank prompt. Line ends in code stay.
    """
    if not prompt.strip():
        return None
    words, protected = _words(prompt), _protected(prompt)
    gaps = [(left, right) for (_, left), (right, _) in pairwise(words) if prompt[left:right] == " "]
    doubled = rng.random(len(gaps)) < DOUBLED_SHARE
    edits = [(left, right, "  ") for (left, right), double in zip(gaps, doubled, strict=True) if double]
    edits += [
        (match.start(), match.end(), " " * int(rng.integers(3)) + "\r\n")
        for match in re.finditer(r"\r?\n", prompt)
        if not protected[match.start()]
    ]
    return _edited(prompt, edits) + " " * int(rng.integers(1, 3))


def typos(prompt: str, rng: np.random.Generator) -> str | None:
    """Two inner letters swapped, or one dropped or doubled, in 5 % of the words of four letters or more, at least one.

    Numbers in words are left alone. None where there are no such words.
    """
    words = [
        (start, end) for start, end in _words(prompt) if end - start >= 4 and not NUMBER.fullmatch(prompt, start, end)
    ]
    if not words:
        return None
    chosen = rng.choice(len(words), max(1, round(TYPO_SHARE * len(words))), replace=False)
    return _edited(prompt, [(*words[index], _misspelt(prompt[slice(*words[index])], rng)) for index in sorted(chosen)])


def options(prompt: str, rng: np.random.Generator) -> str | None:
    """The lettered options in another order: letters stay in place, contents move.

    Options are lines `A. ...`, `A) ...` or `(A) ...`, or stand on one line between `##`; of several lists the last.
    None where there are none, where one takes several lines, or where one speaks of others (all of the above).
    """
    spans = _option_spans(prompt)
    contents = [prompt[start:end] for start, end in spans]
    if len(set(contents)) < 2 or any(
        "\n" in content or "##" in content or REFERS.search(content) for content in contents
    ):
        return None
    order = rng.permutation(len(contents))
    moved = [contents[index] for index in order]
    if moved == contents:
        moved = contents[1:] + contents[:1]
    return _edited(prompt, [(*span, content) for span, content in zip(spans, moved, strict=True)])


def template(prompt: str, rng: np.random.Generator) -> str | None:
    """One of TEMPLATES around the prompt. None for a blank prompt."""
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(prompt=prompt) if prompt.strip() else None


PERTURBATIONS: Mapping[str, Perturbation] = {
    "case": case,
    "whitespace": whitespace,
    "typos": typos,
    "options": options,
    "template": template,
}


def perturb(
    query_ids: Iterable[str], prompts: Iterable[str], seed: int, names: Sequence[str] = tuple(PERTURBATIONS)
) -> pa.Table:
    """Perturbed prompts: `query_id` (q17#typos), `source` (q17), `perturbation`, `prompt`; see SCHEMA.

    By query, then by perturbation, as given. A perturbation that does not apply to a prompt or leaves it as it is gives
    no row. Raises InputError for a perturbation that is not there or one named twice.
    """
    if unknown := [name for name in names if name not in PERTURBATIONS]:
        raise InputError(f"perturbations: got {unknown[0]!r}, allowed are {', '.join(PERTURBATIONS)}")
    if len(set(names)) < len(names):
        raise InputError(f"perturbations: got {', '.join(names)}; name each once")
    rows = []
    for query_id, prompt in zip(query_ids, prompts, strict=True):
        for name in names:
            drawn = hashlib.sha256(f"{name}#{query_id}".encode()).digest()
            changed = PERTURBATIONS[name](prompt, np.random.default_rng((seed, int.from_bytes(drawn))))
            if changed is not None and changed != prompt:
                rows.append(
                    {"query_id": f"{query_id}#{name}", "source": query_id, "perturbation": name, "prompt": changed}
                )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _protected(text: str) -> bytearray:
    """1 for each character that no perturbation of words may touch."""
    mask = bytearray(len(text))
    for match in PROTECTED.finditer(text):
        mask[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    return mask


def _words(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word, as the module's docstring has it, of two letters or more."""
    mask = _protected(text)
    return [
        match.span(1)
        for match in WORD.finditer(text)
        if not mask[match.start(1)]
        and match[1][0].lower() != match[1][0].upper()
        and all(letter.islower() for letter in match[1][1:])
    ]


def _misspelt(word: str, rng: np.random.Generator) -> str:
    at = int(rng.integers(1, len(word) - 2))
    ways = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )
    changed = [way for way in ways if way != word and not NUMBER.fullmatch(way)]
    return changed[rng.integers(len(changed))]


def _option_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the contents of the last list of options lettered A, B, C, ... in one style."""
    last: list[re.Match[str]] = []
    for match in OPTION.finditer(text):
        letter, style = match[3] or match[4], (match[2], match[5])
        if letter == "A":
            last = [match]
        elif last and style == (last[0][2], last[0][5]) and letter == chr(ord("A") + len(last)):
            last.append(match)
    if len(last) < 2:
        return []
    line_end = text.find("\n", last[-1].end())
    ends = [match.start() for match in last[1:]] + [len(text) if line_end < 0 else line_end]
    return [
        (match.end(), match.end() + len(text[match.end() : end].rstrip()))
        for match, end in zip(last, ends, strict=True)
    ]


def _edited(text: str, edits: Sequence[tuple[int, int, str]]) -> str:
    """The text with each (start, end, new) in place; edits do not overlap."""
    pieces, at = [], 0
    for start, end, new in sorted(edits):
        pieces += [text[at:start], new]
        at = end
    return "".join([*pieces, text[at:]])
