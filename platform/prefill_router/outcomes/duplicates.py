"""Equal and nearly equal prompts of different queries.

Queries with equal prompts are in one group, so that splits and folds keep them in one part (docs/equations.md, Splits).
Near-duplicates are equal after `normalised`; they are counted and not grouped. Knows nothing of tables or splits.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from jaxtyping import Int

REMOVED = "PZC"  # Unicode categories: punctuation, separators, control characters and the like
ASCII_REMOVED = bytes(code for code in range(128) if unicodedata.category(chr(code))[0] in REMOVED)


def join_groups(groups: np.ndarray, prompts: Int[np.ndarray, " queries"]) -> np.ndarray:
    """The groups of the queries after groups with an equal prompt have been united.

    `prompts` is equal for equal prompts. A united group has the first of its names in alphabetical order.
    """
    _, unit = np.unique(prompts, return_inverse=True)
    if unit.max(initial=-1) + 1 == len(groups):
        return groups
    parent = {name: name for name in groups}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[int, str] = {}
    for name, prompt in zip(groups, unit, strict=True):
        low, high = sorted((root(name), root(first.setdefault(int(prompt), name))))
        parent[high] = low
    return np.asarray([root(name) for name in groups], dtype=object)


def normalised(prompt: str) -> str:
    """The case-folded prompt without punctuation, white space and control characters (Unicode P, Z and C)."""
    if prompt.isascii():
        return prompt.encode().lower().translate(None, ASCII_REMOVED).decode()
    return _removed().sub("", prompt.casefold())


def count_equal(prompts: Iterable[str]) -> int:
    """The number of queries whose prompt is also the prompt of another query."""
    return sum(count for count in Counter(prompts).values() if count > 1)


def near_duplicates(prompts: Sequence[str] | np.ndarray, parts: Sequence[Int[np.ndarray, " _"]]) -> int:
    """The number of queries with a near-duplicate in another part. `parts` are positions of prompts.

    A prompt of which `normalised` leaves nothing has no near-duplicate.
    """
    found: dict[bytes, Counter[int]] = {}  # queries by part
    for number, part in enumerate(parts):
        for row in part:
            if text := normalised(prompts[row]):
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
                found.setdefault(digest, Counter())[number] += 1
    return sum(counts.total() for counts in found.values() if len(counts) > 1)


@cache
def _removed() -> re.Pattern[str]:
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in REMOVED]
    starts = [code for code, before in zip(codes, [-2, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if code != after - 1]
    return re.compile(
        "[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in zip(starts, ends, strict=True)) + "]+"
    )
