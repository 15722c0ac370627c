"""The form of answers: unparsed, truncated, refused and empty ones, whose labels say little about ability.

In: `LabelTable`. Out: a `Finding` per check, in (query, model) pairs. Knows nothing of what the answers should be.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from prefill_router.outcomes.quality.findings import (
    MIN_QUERIES,
    Finding,
    Share,
    Table,
    accuracy,
    differing_models,
    rates,
    suspects,
)
from prefill_router.outcomes.quality.table import LabelTable

TRUNCATED = ("max_tokens", "length", "model_length", "max_output_tokens")  # values of `stop`
FILTERED = ("content_filter", "refusal", "safety")
SMALLEST_LIMIT = 32  # tokens: short answers often have equal lengths without a limit
ODD_LIMIT, FAR = 256, 2  # a limit that is no round number: tokens, and ratio to the median length
PILE, PILE_RATIO = 10, 3  # answers of the largest length: at least PILE, and PILE_RATIO times as many as of any other
LONGEST_REFUSAL = 1000  # characters: a longer text that begins with an apology may still answer
# Refusals at the beginning of an answer, by language, for RE2. `~` is an apostrophe, `,` an optional comma or stop.
REFUSALS = (
    "i(~m| am) (really |very |so )?sorry, (but )?(i|we)( can~t| can ?not| won~t| am (unable|not able)|~m unable)",
    "(sorry|my apologies|i apologi[sz]e|unfortunately), (but )?i( can~t| cannot| am unable to|~m unable to) "
    "(assist|help|comply|fulfil|provide|answer|engage|discuss|continue)",
    "i( can~t| cannot| won~t| am unable to|~m unable to) (assist|help|comply|fulfil|engage|answer th(is|at))",
    "(es )?tut mir leid, (aber )?((da|dabei|das) kann ich|ich kann)[^.]{0,60} nicht",
    "(je suis )?désolée?, (mais )?je ne (peux|puis) pas",
    "lo siento, (pero )?no puedo",
    "mi dispiace, (ma )?non posso",
    "(desculpe|sinto muito|lamento), (mas )?(eu )?não posso",
    "(извините|простите|к сожалению), (но )?я не могу",
    "(很|非常)?(抱歉|对不起), ?但?我(无法|不能)",
    "申し訳(ありません|ございません)[^。]{0,40}(できません|できかねます)",
)
APOSTROPHE, COMMA = "['\N{RIGHT SINGLE QUOTATION MARK}]?", "[.,\N{FULLWIDTH COMMA}\N{IDEOGRAPHIC FULL STOP}]?"
REFUSAL = (
    r"(?i)^[\s\"'*#>_-]*("
    + "|".join(REFUSALS).replace("{0,", "{0;").replace(",", COMMA).replace("~", APOSTROPHE).replace("{0;", "{0,")
    + ")"
)


def unparsed(labels: LabelTable) -> Finding:
    """Answers in which no final answer was found. Their label 0 comes from the extraction, not from a comparison."""
    if labels.parsed is None:
        return Finding("unparsed", "answers", None, "the column parsed")
    known = np.isfinite(labels.parsed)
    flags = known & (labels.parsed == 0)
    queries, models = np.nonzero(flags)
    right = labels.outcomes.correct[queries, models] == 1
    order = np.argsort(~right, kind="stable")  # the contradictions first
    detail = [
        "no final answer was found, but the label is right" if one else "no final answer was found" for one in right
    ]
    return Finding(
        "unparsed",
        "answers",
        **rates(labels, flags, known),
        tables=_filled(differing_models(labels, flags, known)),
        figures={
            "accuracy_of_parsed": accuracy(labels, known & ~flags).estimate,
            "unparsed_with_right_label": int(right.sum()),
        },
        suspects=suspects(labels, "unparsed", queries[order], models[order], detail=[detail[place] for place in order]),
    )


def truncated(labels: LabelTable) -> Finding:
    """Answers that a limit of output tokens has cut: by `stop`, or where it is unknown by their number of tokens."""
    tokens = labels.outcomes.output_tokens
    stopped = np.zeros(tokens.shape, dtype=bool) if labels.stop is None else labels.stop.known
    by_stop = np.zeros(tokens.shape, dtype=bool) if labels.stop is None else labels.stop.is_in(TRUNCATED)
    counted = np.isfinite(tokens) & ~stopped
    known = stopped | counted
    if not known.any():
        return Finding("truncated", "answers", None, "the column stop or output_tokens")
    at_limit, limits = _at_limits(labels, np.where(counted, tokens, np.nan))
    flags = by_stop | at_limit
    queries, models = np.nonzero(flags)
    detail = [
        "stop" if by_stop[query, model] else f"{tokens[query, model]:.0f} output tokens, the limit of this model"
        for query, model in zip(queries, models, strict=True)
    ]
    rows = [
        (
            name,
            ", ".join(f"{limit:,}" for limit in sorted(limits.get(model, ()))) or "by stop",
            Share(int(flags[:, model].sum()), int(known[:, model].sum())),
            accuracy(labels, flags, model),
            accuracy(labels, known & ~flags, model),
        )
        for model, name in enumerate(labels.models)
        if flags[:, model].any()
    ]
    rows.sort(key=lambda row: -(row[2].estimate or 0.0))
    columns = ("model", "limit (tokens)", "truncated", "accuracy of truncated", "accuracy of the others")
    return Finding(
        "truncated",
        "answers",
        **rates(labels, flags, known),
        tables=_filled(
            Table("Accuracy of truncated answers", columns, tuple(rows)), differing_models(labels, flags, known)
        ),
        figures={
            "accuracy_of_truncated": accuracy(labels, flags).estimate,
            "accuracy_of_the_others": accuracy(labels, known & ~flags).estimate,
            "by_stop": int(by_stop.sum()),
            "by_output_tokens": int((at_limit & ~by_stop).sum()),
        },
        suspects=suspects(labels, "truncated", queries, models, detail=detail),
    )


def refusals(labels: LabelTable) -> Finding:
    """Answers that refuse in words, that a content filter has stopped, and empty answers."""
    if labels.stop is None and labels.answer is None:
        return Finding("refusals", "answers", None, "the column answer or stop")
    none = np.zeros(labels.has_row.shape, dtype=bool)
    refused = empty = filtered = none
    if labels.answer is not None:
        values = labels.answer.values
        text = pc.and_(
            pc.match_substring_regex(values, REFUSAL), pc.less_equal(pc.utf8_length(values), LONGEST_REFUSAL)
        )
        refused = labels.answer.where(text.to_numpy(zero_copy_only=False).astype(bool))
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0)
        empty = labels.answer.where(blank.to_numpy(zero_copy_only=False).astype(bool))
    if labels.stop is not None:
        filtered = labels.stop.is_in(FILTERED)
    known = (
        none
        | (False if labels.answer is None else labels.answer.known)
        | (False if labels.stop is None else labels.stop.known)
    )
    kinds = {
        "refusal in words": refused,
        "stopped by a content filter": filtered & ~refused,
        "empty answer": empty & ~filtered,
    }
    flags = refused | filtered | empty
    queries, models = np.nonzero(flags)
    detail = [
        next(name for name, kind in kinds.items() if kind[query, model])
        for query, model in zip(queries, models, strict=True)
    ]
    rows = tuple(
        (name, Share(int(kind.sum()), int(known.sum())), accuracy(labels, kind)) for name, kind in kinds.items()
    )
    table = Table("Kinds", ("kind", "answers", "accuracy"), tuple(row for row in rows if row[1].count))
    return Finding(
        "refusals",
        "answers",
        **rates(labels, flags, known),
        tables=_filled(table, differing_models(labels, flags, known)),
        figures={"refused_with_right_label": int((labels.outcomes.correct[flags] == 1).sum())},
        suspects=suspects(labels, "refusal", queries, models, detail=detail),
    )


def token_limit(tokens: Float[np.ndarray, " answers"]) -> int | None:
    """The limit of output tokens at which answers have piled up; None if there is none.

    The largest length is a limit if at least PILE answers have it, PILE_RATIO times as many as any length from half
    of it on. Answers of a fixed format also pile up: a length below ODD_LIMIT tokens or below FAR times the median
    length is a limit only if it is a multiple of 100 or of 128.
    """
    lengths, counts = np.unique(tokens[np.isfinite(tokens)], return_counts=True)
    if len(lengths) < 2 or lengths[-1] < SMALLEST_LIMIT or counts[-1] < PILE:
        return None
    limit = int(lengths[-1])
    near = counts[:-1][lengths[:-1] >= limit / 2].max(initial=0)
    usual = limit < max(ODD_LIMIT, FAR * np.nanmedian(tokens)) and limit % 100 and limit % 128
    return None if usual or counts[-1] < PILE_RATIO * near else limit


def _at_limits(
    labels: LabelTable, tokens: Float[np.ndarray, "queries models"]
) -> tuple[Bool[np.ndarray, "queries models"], dict[int, set[int]]]:
    """The answers at the limit of their model, or of their model and benchmark, and the limits of each model."""
    found, limits = np.zeros(tokens.shape, dtype=bool), dict[int, set[int]]()
    parts = [labels.of_benchmark == number for number in range(len(labels.benchmarks))]
    for model in range(tokens.shape[1]):
        for part in (np.ones(len(tokens), dtype=bool), *parts):
            if np.isfinite(tokens[part, model]).sum() < MIN_QUERIES:
                continue
            if (limit := token_limit(tokens[part, model])) is not None:
                found[:, model] |= part & (tokens[:, model] == limit)
                limits.setdefault(model, set()).add(limit)
    return found, limits


def _filled(*tables: Table) -> tuple[Table, ...]:
    """The tables that have rows."""
    return tuple(table for table in tables if table.rows)
