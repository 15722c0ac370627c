"""Perturbations: what they change, what they leave, and what the draws depend on."""

from __future__ import annotations

import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefill_router.errors import InputError
from prefill_router.experiments.perturb import PERTURBATIONS, TEMPLATES, perturb

QUESTION = (
    "Which of these 3 metals melts first when $T(x) = 1200$ kelvin is reached? The alloy NaCl has pH 7.5.\n\n"
    "A. Copper wire\nB. Iron nails, 12 mm\nC. Lead pipe\nD. Gold ring\n\nAnswer as [[A/B/C/D]]."
)
PIECES = st.sampled_from(
    [
        "What",
        "is",
        "the",
        "Energy",
        "of",
        "12",
        "3.5",
        "x=4",
        "A.",
        "B)",
        "(C)",
        "$E = mc^2$",
        "H2O",
        "because",
        "(Perhaps)",
        "\n",
        "\nA. 40 metres\nB. 50 metres\nC. about ten",
        "光合作用",
        "Ünïcode",
        "`Some code`",
        "well-known",
        '"A Name"',
        "Привет",
        "[[A/B]]",
        "NaCl",
        "\t",
        "  ",
    ]
)


def draw(seed=0):
    return np.random.default_rng(seed)


def apply(name, prompt, seed=0):
    return PERTURBATIONS[name](prompt, draw(seed))


def numbers_and_letters(text):
    """Numbers, formulas and option letters, in their order."""
    return re.findall(r"\S*[\d=$]\S*|\([A-Z]\)|\b[A-Z][.)](?!\w)|\b(?:NaCl|H2O)\b", text)


@given(words=st.lists(PIECES, max_size=40), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_numbers_formulas_and_option_letters_stay_in_place(words, seed):
    prompt = " ".join(words)
    for name in ("case", "whitespace", "typos", "template"):
        changed = apply(name, prompt, seed)
        if changed is not None:
            assert numbers_and_letters(changed) == numbers_and_letters(prompt)
    shuffled = apply("options", prompt, seed)
    if shuffled is not None:
        assert Counter(numbers_and_letters(shuffled)) == Counter(numbers_and_letters(prompt))
        assert re.findall(r"^[A-Z]\.", shuffled, re.M) == re.findall(r"^[A-Z]\.", prompt, re.M)


@given(prompt=st.text(max_size=300), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_any_text_is_perturbed_deterministically_or_not_at_all(prompt, seed):
    for name in PERTURBATIONS:
        changed = apply(name, prompt, seed)
        assert changed is None or isinstance(changed, str)
        assert changed == apply(name, prompt, seed)


@given(prompt=st.text(alphabet="aB .\n1$`", max_size=80), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_whitespace_changes_blanks_alone(prompt, seed):
    changed = apply("whitespace", prompt, seed)
    assert prompt.split() == (changed or "").split()
    assert (changed is None) == (not prompt.strip())


def test_case_lowers_capitalised_words_and_no_symbol():
    assert (
        apply("case", "The Moon orbits Earth. I saw NASA, NaCl and US at pH 7; In (Which) P(A).")
        == "the moon orbits earth. I saw NASA, NaCl and US at pH 7; In (which) P(A)."
    )
    assert apply("case", "nothing to do") is None


@pytest.mark.parametrize("name", ["case", "whitespace", "typos"])
@pytest.mark.parametrize(
    "kept",
    [
        "```python\nfor Index in range(10):\n    Total = Index + 1\n```",
        "`Print This`",
        "[PYTHON]\nReturn Here There\n[/PYTHON]",
        "$\\text{Total Energy Lost}$",
        "$$\nTotal Energy\n$$",
        "\\(Total Energy\\)",
        "[[Your Answer Here]]",
        '"Secret Message Text"',
        "    Indented Like Code",
    ],
)
def test_code_latex_answer_formats_and_quotations_stay(name, kept):
    prompt = f"The first question stands here:\n{kept}\nWhatever follows should change, surely."
    for seed in range(20):
        changed = apply(name, prompt, seed)
        assert kept in changed
        assert changed != prompt


def test_amounts_of_money_are_not_taken_for_latex():
    assert apply("case", "It costs $5. Then Peter pays $6.") == "It costs $5. then peter pays $6."


def test_typos_hit_one_word_in_twenty_and_at_least_one_inside_the_word():
    prompt = " ".join(["measure", "cat", "velocity", "of", "carefully"] * 40)
    for seed in range(20):
        after = apply("typos", prompt, seed).split()
        changed = [(old, new) for old, new in zip(prompt.split(), after, strict=True) if old != new]
        assert len(changed) == round(0.05 * 120)
        for old, new in changed:
            assert len(old) >= 4
            assert (old[0], old[-1]) == (new[0], new[-1])
            assert abs(len(old) - len(new)) <= 1
            assert set(new) <= set(old)
    assert apply("typos", "cat velocity of") != "cat velocity of"


def test_numbers_in_words_get_no_typos_and_come_of_none():
    for seed in range(50):
        assert apply("typos", "three thousand eleven ninety", seed) is None
        assert apply("typos", "then", seed) != "ten"


def test_a_word_of_equal_letters_still_gets_a_typo():
    assert all(apply("typos", "aaaa", seed) in ("aaa", "aaaaa") for seed in range(20))


LAYOUTS = {
    "A. lines": "Q?\n\nA. red\nB. green\nC. blue\n\nAnswer with a letter.",
    "(A) lines": "Q?\n(A) red\n(B) green\n(C) blue",
    "A) lines": "Q?\n  A) red  \n  B) green\n  C) blue\n",
    "CRLF lines": "Q?\r\nA. red\r\nB. green\r\nC. blue\r\n",
    "one line": "Q?\nOptions: A. red ##B.green##C. blue\nAnswer as [[A]].",
}


@pytest.mark.parametrize("prompt", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_options_moves_the_contents_and_nothing_else(prompt):
    colours = re.compile("red|green|blue")
    orders = set()
    for seed in range(60):
        changed = apply("options", prompt, seed)
        assert colours.sub("_", changed) == colours.sub("_", prompt)
        orders.add(tuple(colours.findall(changed)))
    assert len(orders) == 5  # every order but the one it had
    assert all(sorted(order) == ["blue", "green", "red"] for order in orders)


def test_options_takes_the_last_list_of_several():
    prompt = "A. thaliana is a plant.\n(A) all birds fly;\n(B) penguins are birds.\n\nA. yes\nB. no\n"
    assert apply("options", prompt) == prompt.replace("A. yes\nB. no", "A. no\nB. yes")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "No options here.",
        "A. one alone",
        "B. starts\nC. late",
        "Initials: A. Smith met B. Jones.",
        "A. red\nB. green\nC. all of the above",
        "A. red\nB. green\nC. both A and B",
        "A. (B) red\nB. green",
        "A. same\nB. same",
        "A. x = 1\n   y = 2\nB. x = 3",
    ],
)
def test_options_leaves_prompts_alone_where_order_matters_or_there_are_none(prompt):
    assert apply("options", prompt) is None


def test_every_template_holds_the_prompt_whole_even_with_braces():
    prompt = "Evaluate {x} and {{y}}."
    seen = {apply("template", prompt, seed) for seed in range(60)}
    assert seen == {template.replace("{prompt}", prompt) for template in TEMPLATES}


@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_a_blank_prompt_gives_no_rows(prompt):
    assert perturb(["q"], [prompt], 0).num_rows == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "光合作用发生在哪里",
        "प्रकाश संश्लेषण कहाँ होता है?",
        "أين يحدث التمثيل الضوئي؟",
        "광합성은 어디서 일어나나요?",
        "光abcdef",
    ],
)
def test_scripts_without_case_get_blanks_and_templates_but_no_other_letters(prompt):
    table = perturb(["q"], [prompt], 0)
    assert table.column("perturbation").to_pylist() == ["whitespace", "template"]
    assert all(prompt in changed for changed in table.column("prompt").to_pylist())


def test_cyrillic_words_get_typos_and_small_letters():
    assert apply("case", "Где находится Москва?") == "где находится москва?"
    assert apply("typos", "находится") != "находится"


@pytest.mark.parametrize(
    "prompt",
    [
        "word " * 20_000,
        "[ab]" * 25_000,
        "[" * 100_000,
        "$" * 100_000,
        "`" * 99_999,
        "(" * 100_000,
        "a" * 100_000,
        "\\(" * 50_000,
        "\nA. x" * 20_000,
        '"' * 100_000,
        "##" * 50_000,
    ],
)
def test_a_hundred_thousand_characters_take_seconds(prompt):
    started = time.process_time()
    perturb(["q"], [prompt], 0)
    assert time.process_time() - started < 15


def test_rows_name_query_source_and_perturbation():
    table = perturb(["q7", "q8"], [QUESTION, "11 + 12"], 3)
    assert table.column_names == ["query_id", "source", "perturbation", "prompt"]
    assert table.column("query_id").to_pylist() == [
        "q7#case",
        "q7#whitespace",
        "q7#typos",
        "q7#options",
        "q7#template",
        "q8#whitespace",
        "q8#template",
    ]
    assert table.column("source").to_pylist() == ["q7"] * 5 + ["q8"] * 2
    assert QUESTION not in table.column("prompt").to_pylist()


def test_a_perturbation_that_changes_nothing_gives_no_row(monkeypatch):
    monkeypatch.setitem(PERTURBATIONS, "case", lambda prompt, rng: prompt)
    assert perturb(["q"], [QUESTION], 0, ("case",)).num_rows == 0


def test_rows_depend_on_seed_and_query_not_on_order_or_on_what_else_is_asked():
    ids, prompts = [f"q{i}" for i in range(12)], [f"{QUESTION} Number {i}." for i in range(12)]
    table = perturb(ids, prompts, 5)
    rows = {row["query_id"]: row["prompt"] for row in table.to_pylist()}
    backwards = perturb(ids[::-1], prompts[::-1], 5, ("template", "options", "typos"))
    assert {row["query_id"]: row["prompt"] for row in backwards.to_pylist()}.items() <= rows.items()
    assert perturb(ids, prompts, 5).equals(table)
    assert not perturb(ids, prompts, 6).equals(table)
    same_text = perturb(ids, [QUESTION] * 12, 5, ("options",)).column("prompt").to_pylist()
    assert len(set(same_text)) > 1


@pytest.mark.parametrize(
    ("names", "message"), [(("typo",), "got 'typo', allowed are case"), (("typos", "typos"), "give each name once")]
)
def test_an_unknown_or_repeated_perturbation_is_refused(names, message):
    with pytest.raises(InputError, match=message):
        perturb(["q"], ["text"], 0, names)


@given(words=st.lists(PIECES, min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_no_row_repeats_its_source(words):
    prompt = " ".join(words)
    assume(prompt.strip())
    assert prompt not in perturb(["q"], [prompt], 0).column("prompt").to_pylist()
