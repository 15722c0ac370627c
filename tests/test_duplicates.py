"""Equal prompts: they are in one group and in one part; near-duplicates in another part are counted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from builders import TwoEncoders, make_outcomes, make_table
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_router.errors import InputError
from prefill_router.outcomes.duplicates import count_equal, join_groups, near_duplicates, normalised
from prefill_router.outcomes.splits import make_folds, split_queries
from prefill_router.outcomes.table import Outcomes, pivot, validate_outcomes
from prefill_router.workflows.inputs import split_signals


def with_prompts(prompts: list[str], group: bool) -> Outcomes:
    table, _ = make_table(n=len(prompts))
    index = table.column_names.index("prompt")
    repeated = table.set_column(index, "prompt", pa.array([text for text in prompts for _ in range(3)]))
    return pivot(validate_outcomes(repeated if group else repeated.drop_columns("group")), ("small", "medium", "large"))


@pytest.mark.parametrize("group", [False, True])
def test_equal_prompts_of_different_queries_are_in_one_part_and_fold(group: bool):
    outcomes = with_prompts([f"question {query % 8}" for query in range(240)], group)
    parts = [set(outcomes.prompts[part]) for part in vars(split_queries(outcomes, 0, "75/10/15")).values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 8
    folds = make_folds(outcomes, np.arange(240), 0)
    assert all(len(set(folds[outcomes.prompts == prompt])) == 1 for prompt in set(outcomes.prompts))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5)), min_size=1, max_size=12))
def test_joined_groups_are_the_connected_components(pairs: list[tuple[str, int]]):
    groups = np.asarray([group for group, _ in pairs], dtype=object)
    prompts = np.asarray([prompt for _, prompt in pairs])
    joined = join_groups(groups, prompts)
    reached = (groups[:, None] == groups) | (prompts[:, None] == prompts)
    for _ in pairs:
        reached = reached @ reached
    np.testing.assert_array_equal(joined[:, None] == joined, reached)
    assert all(name == min(groups[row]) for name, row in zip(joined, reached, strict=True))


def test_digests_are_taken_with_the_queries():
    outcomes, _ = make_outcomes(n=20)
    rows = np.array([5, 3, 11])
    expected = outcomes.take(rows).prompt_digests
    assert outcomes.prompt_digests  # cached from here on
    assert outcomes.take(rows).prompt_digests == expected


def test_groups_of_a_table_without_equal_prompts_are_unchanged():
    outcomes, _ = make_outcomes(n=60, group_size=3)
    assert outcomes.groups.tolist() == [f"g{query // 3}" for query in range(60)]
    assert with_prompts(list(outcomes.prompts), group=False).groups.tolist() == outcomes.query_ids.tolist()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What is  2 + 2?\n", "what is 2 + 2", True),
        ("What is 2 + 2?", "What is 2 - 2?", False),
        ("Straße, wo?", "STRASSE wo", True),  # not ASCII: by a regular expression
        ("สวัสดี ครับ", "สวัสดีครับ", True),
        ("สวัสดี", "สวสด", False),  # vowel signs are kept
        ("Wo?\u00a0Hier…", "wo hier", True),
    ],
)
def test_prompts_are_compared_without_case_punctuation_and_white_space(one: str, other: str, equal: bool):
    assert (normalised(one) == normalised(other)) == equal


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_normalised_as_other_text(text: str):
    assert normalised(text) + "é" == normalised(text + "é")


def test_near_duplicates_in_another_part_and_equal_prompts_are_counted():
    prompts = ["Who?", "who", "WHO!", "Where?", "where", "?", "!", "Who?"]
    parts = [np.array([0, 3, 4, 5]), np.array([1, 2, 6, 7]), np.array([], dtype=int)]
    assert near_duplicates(prompts, parts) == 4  # who; "where" is in one part, and nothing is left of "?"
    assert count_equal(prompts) == 2


def test_a_split_prints_near_duplicates_across_parts(capsys: pytest.CaptureFixture[str]):
    signals = TwoEncoders(n=60).signals
    split_signals(signals, 0, "85/15")
    assert "near-duplicate" not in capsys.readouterr().out
    signals.outcomes.prompts[:] = ["Where?" if row % 2 else "where" for row in range(60)]
    split_signals(signals, 0, "85/15")
    assert "60 queries have a near-duplicate in another part" in capsys.readouterr().out


def test_groups_that_equal_prompts_unite_are_named_if_they_are_too_few():
    outcomes = with_prompts(["the same question"] * 60, group=False)
    says = (
        r"60 queries form 1 group, too few for .*: queries of one `group` and queries with equal prompts are one group"
    )
    with pytest.raises(InputError, match=says):
        split_queries(outcomes, 0)
    with pytest.raises(InputError, match=says):
        make_folds(outcomes, np.arange(60), 0)
