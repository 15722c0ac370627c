"""The texts of the page on labels: what each check looks for, what a finding means, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefill_router.reports.format import number, percent


@dataclass(frozen=True)
class Section:
    """The texts of one check. `short` is its name within a sentence."""

    heading: str
    short: str
    meaning: str
    action: str


SECTIONS = {
    "duplicates": Section(
        "Duplicate prompts",
        "duplicates",
        "Prompts are duplicates if they are equal when case, punctuation and white space are ignored. Labels of "
        "duplicates that differ are noise of sampling or scoring, or the prompt lacks a part of the question. The"
        " reader keeps queries with equal prompts in one part of a split; near-duplicates can be in different "
        "parts.",
        "Give near-duplicates one group, and compare the reference answers of duplicates whose labels differ.",
    ),
    "unparsed": Section(
        "Unparsed answers",
        "unparsed",
        "No final answer was found in the text, so that a label 0 comes from the extraction and not from a "
        "comparison. A model whose rate differs clearly from that of the others has a problem of format, not of "
        "ability.",
        "Read some of the texts. Repair the extraction or the instructions on the format, and score the answers again.",
    ),
    "truncated": Section(
        "Truncated answers",
        "truncated",
        "A limit of output tokens has cut the answer before its end. Such a label measures the limit. Without the"
        " column stop, a limit is recognised by many answers with exactly the largest number of tokens.",
        "Raise the limit and ask again, or keep the labels if the limit is the same in production.",
    ),
    "refusals": Section(
        "Refusals and empty answers",
        "refusals",
        "The answer begins with a common refusal in one of several languages, was stopped by a content filter, or"
        " is empty. The label says nothing about ability; empty answers are often failures of the server.",
        "Ask again where the answer is empty. Decide whether a refusal counts as wrong in your application.",
    ),
    "constant": Section(
        "Constant labels",
        "constant labels",
        "A model has the same label for at least 99 % of 50 or more queries of a benchmark. If it is always wrong"
        " where other models are often right, its answers were probably not understood. If it is always right, "
        "the benchmark is easy for it and teaches the router little.",
        "Read answers of models that are always wrong. Replace benchmarks on which all models agree.",
    ),
    "alike": Section(
        "Models that are alike",
        "models that are alike",
        "Kappa is the agreement of two models' labels beyond what their accuracies predict. A pair is reported if"
        " kappa is at least 0.9 or far above that of all other pairs, or if half of the long answers are equal or"
        " have equal numbers of tokens: one model may have two names, or labels may be copied.",
        "Compare the endpoints of the two models, and remove one of them from the pool.",
    ),
    "judges": Section(
        "Disagreement of judges and answers",
        "disagreement",
        "Several answers of a model to one query, or several judges of one answer, do not agree. No router can "
        "predict this part of a label: it is a floor for its Brier score.",
        "Ask for more answers per query, or use a stricter rubric, where the noise is large.",
    ),
    "implausible": Section(
        "Implausible labels",
        "implausible labels",
        "Strong models are wrong and weak models are right, or all models are wrong in a benchmark that is easy "
        "for them: the reference answer may be wrong. These are suspects only. Difficult and ambiguous questions "
        "look the same.",
        "Check the reference answers of the suspects, in the order of the list.",
    ),
    "missing": Section(
        "Missing labels",
        "missing labels",
        "The table has no row for the pair, or its label is null. Missing labels are never counted as wrong, but "
        "accuracy and cost are compared on the queries with a label for every model.",
        "Complete the models with many missing labels, or leave them out of the pool.",
    ),
    "sources": Section(
        "Several scorers",
        "several scorers",
        "Different models of a benchmark were scored by different scorers. Their labels cannot be compared, and "
        "the router learns the difference of the scorers.",
        "Score all models of a benchmark with one scorer.",
    ),
}
FIGURES = {
    "label_pairs": "pairs of labels of duplicates",
    "label_pairs_that_differ": "pairs of labels that differ",
    "leaked_queries": "queries with a duplicate in the other part of the default split",
    "leaked_pairs": "pairs of duplicates in different parts of the default split",
    "unparsed_with_right_label": "unparsed answers with a right label",
    "accuracy_of_parsed": "accuracy of parsed answers",
    "accuracy_of_truncated": "accuracy of truncated answers",
    "accuracy_of_the_others": "accuracy of the other answers",
    "by_stop": "truncated by the column stop",
    "by_output_tokens": "truncated by their number of tokens",
    "refused_with_right_label": "refusals and empty answers with a right label",
    "exactly_constant": "with exactly one label",
    "always_wrong_and_suspicious": "always wrong where the other models are right in at least 20 %",
    "benchmarks_without_signal": "benchmarks on which all models nearly always agree",
    "median_kappa": "median kappa of all pairs",
    "highest_kappa": "highest kappa",
    "fractional_labels": "fractional labels",
    "judged_by_several": "labels with several judges",
    "judges_disagree": "labels on which judges disagree",
    "mean_entropy_bits": "mean entropy of a label, in bits",
    "brier_floor": "lowest Brier score that a router can reach",
    "strong_wrong_weak_right": "queries with strong models wrong and weak models right",
    "all_wrong_in_an_easy_benchmark": "queries with all models wrong in an easy benchmark",
    "all_wrong": "queries with all models wrong",
    "threshold": "smallest score of a suspect (nats)",
    "queries_with_a_missing_label": "queries without a label for every model",
    "queries_with_several_scorers": "queries with several scorers",
}


def figures_text(name: str, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(description, value) of the figures of a check that are defined, in the order of FIGURES."""
    shown = []
    for key, description in FIGURES.items():
        value = figures.get(key)
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else percent(value) if "accuracy" in key else number(value)
            shown.append((description, text))
    return shown
