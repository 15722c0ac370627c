"""The built-in sample: SIMULATED outcomes of six invented models on original questions.

In: a seed. Out: an outcomes table and its pool (docs/data-formats.md), or a folder with both. No real model was asked.
The questions come from sample_questions.py. `group` is the question's template, so that a split holds out all questions
of a template.

The difficulty of a question for model m is a weighted sum of the facets of its text (depth, load, scale, twist). The
weights differ by model and give difficulty unit variance if the facets are independent:

    P(correct[q, m]) = sigmoid(SLOPE * (skill[m, family(q)] - difficulty[q, m]))

A label is one draw with this probability. Within a family the probability depends only on the text of the question. The
models complement each other: the most expensive model is the best overall, and three cheaper models are better in their
own fields. Answers to difficult questions are longer and therefore cost more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from prefill_router.errors import InputError
from prefill_router.files import write_atomically
from prefill_router.outcomes.sample_questions import Question, ask, load_families
from prefill_router.outcomes.table import Outcomes, pivot, validate_outcomes
from prefill_router.pool import Pool, TargetModel, save_pool

SLOPE = 3.0
NULL_SHARE = ABSENT_SHARE = 0.005  # of the (query, model) pairs: label null, row left out
NOTE = (
    "SIMULATED DATA. The questions were made up by the program, the models do not exist, and every label, length, "
    "cost and latency is drawn from a random number generator (prefill_router.outcomes.sample). Good for trying "
    "the tools out and for tests; says nothing about any real model."
)

#                     USD per Mtok      tokens per  output  seconds to  seconds    sensitivity to
#                     input   output    word        tokens  first token per token  depth load scale twist
MODELS = {
    "sim-frontier": (10.000, 40.000, 1.31, 320, 1.10, 0.0160, (1.0, 1.0, 0.3, 1.0)),
    "sim-scholar": (2.500, 10.000, 1.35, 300, 0.80, 0.0120, (1.2, 0.9, 0.5, 0.6)),
    "sim-coder": (1.200, 4.800, 1.28, 260, 0.60, 0.0090, (0.6, 1.1, 0.3, 1.2)),
    "sim-abacus": (0.600, 2.400, 1.42, 240, 0.50, 0.0070, (1.0, 0.8, 0.1, 1.3)),
    "sim-swift": (0.250, 1.000, 1.38, 240, 0.25, 0.0040, (1.2, 1.0, 0.5, 0.9)),
    "sim-pocket": (0.100, 0.400, 1.46, 250, 0.15, 0.0030, (1.1, 1.2, 0.6, 1.0)),
}
SKILLS = {  # in the order of MODELS; 0 answers half of a family's questions, 1 about five in six
    "arithmetic": (0.55, 0.00, 0.20, 0.75, -0.30, -0.70),
    "word_problems": (0.70, 0.45, -0.10, 0.30, -0.10, -0.60),
    "calendar": (0.60, 0.00, 0.10, 0.70, -0.20, -0.80),
    "strings": (0.50, -0.10, 0.70, -0.30, -0.30, -0.70),
    "code_tracing": (0.60, -0.30, 0.80, -0.10, -0.40, -0.90),
    "logic": (0.60, 0.60, 0.00, -0.40, -0.30, -0.80),
    "units": (0.65, 0.20, 0.00, 0.75, 0.10, -0.50),
    "reading": (0.65, 0.80, -0.20, -0.60, 0.20, -0.30),
    "sorting": (0.55, -0.20, 0.70, 0.20, -0.20, -0.60),
    "scheduling": (0.60, 0.50, 0.20, -0.20, -0.10, -0.70),
}


def make_sample(seed: int = 0, n_queries: int = 3600) -> tuple[pa.Table, Pool]:
    """The simulated outcomes and their pool; the same seed gives the same table.

    Families and templates have equal numbers of questions, to within one. Raises InputError if `n_queries` is less
    than 1.
    """
    if n_queries < 1:
        raise InputError(f"n_queries: got {n_queries}, allowed is 1 or more; give the number of questions to make")
    rng = np.random.default_rng(seed)
    questions = _questions(n_queries, rng)
    p_correct = 1 / (1 + np.exp(-SLOPE * margins(questions)))
    correct = rng.random(p_correct.shape) < p_correct

    words = np.array([len(question.prompt.split()) + question.prompt.count(",") for question in questions])
    price_in, price_out, ratio, typical, first_s, token_s = np.array([row[:6] for row in MODELS.values()]).T
    input_tokens = np.maximum(1, np.rint(words[:, None] * ratio)).astype(np.int32)
    hardness = np.array([question.facets for question in questions]).mean(axis=1)[:, None]
    output_tokens = np.rint(typical * np.exp(0.6 * hardness) * rng.lognormal(0, 0.25, correct.shape)).astype(np.int32)
    cost_usd = (input_tokens * price_in + output_tokens * price_out) / 1e6
    latency_s = first_s * rng.lognormal(0, 0.2, correct.shape) + token_s * output_tokens
    fate = rng.random(correct.shape)

    pair = np.flatnonzero(fate.ravel() >= ABSENT_SHARE)
    query, model = np.unravel_index(pair, correct.shape)
    label = pa.array(correct.ravel()[pair].astype(np.int8), mask=fate.ravel()[pair] < ABSENT_SHARE + NULL_SHARE)

    def of_query(values: list[str]) -> pa.Array:
        return pa.array(values, pa.string()).take(pa.array(query))

    table = pa.table(
        {
            "query_id": of_query([f"sample-{number:05d}" for number in range(n_queries)]),
            "benchmark": of_query([question.family for question in questions]),
            "prompt": of_query([question.prompt for question in questions]),
            "model": pa.array(list(MODELS), pa.string()).take(pa.array(model)),
            "correct": label,
            "input_tokens": pa.array(input_tokens.ravel()[pair]),
            "output_tokens": pa.array(output_tokens.ravel()[pair]),
            "cost_usd": pa.array(cost_usd.ravel()[pair]),
            "latency_s": pa.array(latency_s.ravel()[pair].astype(np.float32)),
            "group": of_query([question.template for question in questions]),
        },
        metadata={"note": NOTE, "seed": str(seed)},
    )
    models = [
        TargetModel(name=name, input_usd_per_mtok=row[0], output_usd_per_mtok=row[1], context_tokens=32768)
        for name, row in MODELS.items()
    ]
    return table, Pool(models=tuple(models))


def load_sample(n_queries: int = 3600, seed: int = 0) -> tuple[Outcomes, Pool]:
    """Outcomes and pool of the built-in sample: original questions, six SIMULATED target models.

    Raises InputError if `n_queries` is less than 1.
    """
    table, pool = make_sample(seed, n_queries)
    return pivot(validate_outcomes(table), pool.names), pool


def write_sample(folder: Path, seed: int = 0, n_queries: int = 3600) -> None:
    """Writes outcomes.parquet, pool.yaml and README.txt to `folder`, each atomically. Raises as `make_sample` does."""
    table, pool = make_sample(seed, n_queries)
    write_atomically(folder / "outcomes.parquet", lambda path: pq.write_table(table, path, compression="zstd"))
    save_pool(pool, folder / "pool.yaml")
    readme = (
        f"{NOTE}\n\nSeed {seed}, {n_queries} questions, {len(load_families())} task families, {len(MODELS)} models.\n"
    )
    write_atomically(folder / "README.txt", lambda path: path.write_text(readme, encoding="utf-8"))


def margins(questions: list[Question]) -> Float[np.ndarray, "queries models"]:
    """Skill minus difficulty of every question and model, in standard deviations of difficulty."""
    facets = np.array([question.facets for question in questions])
    sensitivity = np.array([row[6] for row in MODELS.values()])
    sensitivity /= np.linalg.norm(sensitivity, axis=1, keepdims=True)
    return np.array([SKILLS[question.family] for question in questions]) - facets @ sensitivity.T


def _questions(n_queries: int, rng: np.random.Generator) -> list[Question]:
    """Distinct questions in random order, so that ids and row positions carry no information."""
    families = load_families()
    templates = [
        (family, template)
        for template in range(max(family.n_templates for family in families))
        for family in families
        if template < family.n_templates
    ]
    questions: dict[str, Question] = {}
    while len(questions) < n_queries:
        question = ask(*templates[len(questions) % len(templates)], rng)
        questions.setdefault(question.prompt, question)
    made = list(questions.values())
    return [made[index] for index in rng.permutation(n_queries)]
