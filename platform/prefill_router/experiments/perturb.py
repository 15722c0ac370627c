"""Meaning-preserving perturbations of prompts: edits that do not change the right answer.

In: query ids and their prompts. Out: a table of perturbed prompts, one row per query and perturbation that changes it.
Random choices depend only on the seed, the query's id and the perturbation's name, not on other queries.

Edits of words apply only to words of letters between spaces and punctuation whose letters after the first are lower
case, outside code (fences, backticks, indented lines, [TAG]...[/TAG]), LaTeX, [[...]] and short quotations. Numbers in
digits, formulas, option letters, symbols (NaCl, pH, DNA) and scripts without case are therefore never changed. Unmarked
code is not recognised, and a typo may produce another word (form for from).
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
# An option that refers to other options, by position or by letter, changes its meaning when options are moved.
REFERS = re.compile(
    r"\b(?i:above|below|preceding|previous|foregoing|aforementioned)\b|\([A-Z]\)"
    r"|\b(?i:both|neither|either|only|options?|choices?|answers?)\s+[A-Z]\b"
    r"|\b[A-Z](?:,|\s+and|\s+or|\s*&|\s*/)\s*[A-Z]\b"
)


def case(prompt: str, rng: np.random.Generator) -> str | None:
    """Lower-cases the first letter of capitalised words of at least three letters. None if there are no such words."""
    edits = [
        (start, start + 1, prompt[start].lower())
        for start, end in _words(prompt)
        if end - start >= 3 and prompt[start].isupper()
    ]
    return _edited(prompt, edits) if edits else None


def whitespace(prompt: str, rng: np.random.Generator) -> str | None:
    """White space as in pasted text: some spaces doubled, CRLF line ends, trailing spaces.

    None for a blank prompt. Line ends in code are kept.
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
    """Swaps two inner letters, or drops or doubles one, in 5 % (at least one) of the words of at least four letters.

    Number words are not changed. None if there are no such words.
    """
    words = [
        (start, end) for start, end in _words(prompt) if end - start >= 4 and not NUMBER.fullmatch(prompt, start, end)
    ]
    if not words:
        return None
    chosen = rng.choice(len(words), max(1, round(TYPO_SHARE * len(words))), replace=False)
    return _edited(prompt, [(*words[index], _misspelt(prompt[slice(*words[index])], rng)) for index in sorted(chosen)])


def options(prompt: str, rng: np.random.Generator) -> str | None:
    """Permutes the contents of lettered options; the letters stay in place.

    Options are lines `A. ...`, `A) ...` or `(A) ...`, or parts of one line separated by `##`. Only the last of several
    lists is changed. None if there are no options, an option spans several lines, or an option refers to others (all
    of the above).
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
    """Inserts the prompt into an instruction of TEMPLATES, drawn at random. None if the prompt is only white space."""
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
    """Table of perturbed prompts: `query_id` (q17#typos), `source` (q17), `perturbation`, `prompt`; see SCHEMA.

    Rows are ordered by query, then by perturbation, in the given orders. A perturbation that does not apply to a prompt
    or does not change it gives no row. Raises InputError for an unknown or repeated perturbation.
    """
    if unknown := [name for name in names if name not in PERTURBATIONS]:
        raise InputError(f"perturbations: got {unknown[0]!r}, allowed are {', '.join(PERTURBATIONS)}")
    if len(set(names)) < len(names):
        raise InputError(f"perturbations: got {', '.join(names)}; give each name once")
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
    """A mask: 1 for each character that no perturbation of words may change."""
    mask = bytearray(len(text))
    for match in PROTECTED.finditer(text):
        mask[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    return mask


def _words(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word of at least two letters, as defined in the module's docstring."""
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
    candidates = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )
    changed = [text for text in candidates if text != word and not NUMBER.fullmatch(text)]
    return changed[rng.integers(len(changed))]


def _option_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each option's contents, for the last list of options A, B, C, ... in one style."""
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
    """Applies edits (start, end, new), which do not overlap."""
    pieces, at = [], 0
    for start, end, new in sorted(edits):
        pieces += [text[at:start], new]
        at = end
    return "".join([*pieces, text[at:]])
