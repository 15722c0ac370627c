"""Decisions on a question in a conversation: whether they follow the question.

In: outcomes, a checkpoint and test queries of its split. Each prompt is decided alone; after a system prompt of 2,000
words (the beginning of docs/serving.md) and after a turn with the previous prompt of the sample, as serving reads the
conversation (`serve.requests.as_prompt`); and as one text with the complete system prompt. Out: the share of queries
with the decision of the bare question, the mean difference of the confidences, and the AUC over models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from tqdm import tqdm

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.controller import LocalRouter
from prefill_router.files import write_json
from prefill_router.locations import LocalPath, Location
from prefill_router.outcomes.splits import Scheme, split_queries
from prefill_router.outcomes.table import load_outcomes
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.eligibility import Requirements
from prefill_router.routing.router import Decision
from prefill_router.signals.roc_auc import auc_per_model
from serve.requests import Message, RouteRequest

SYSTEM = Path(__file__).parents[1] / "docs" / "serving.md"
BARE = "bare question"
TEXTS = (BARE, "system prompt, as served", "another question, as served", "system prompt, complete")


class ConversationConfig(FrozenModel):
    """Inputs, the test queries, and the length of the system prompt."""

    outcomes: Annotated[Location, Field(description="outcomes table, a Parquet file")]
    checkpoint: Annotated[LocalPath, Field(description="checkpoint folder, trained on the split of `seed`")]
    output: Annotated[LocalPath, Field(description="folder for conversation.json")] = Path(
        "runs/benchmarks/conversation"
    )
    queries: Annotated[int, Field(ge=10, description="number of test queries, a random sample")] = 200
    words: Annotated[int, Field(ge=1, description="words of the system prompt")] = 2000
    complete: Annotated[bool, Field(description="also decide with the complete system prompt; slow without a GPU")] = (
        True
    )
    seed: Annotated[int, Field(ge=0, description="seed of the split and of the sample")] = 0
    scheme: Annotated[Scheme, Field(description="split scheme of the checkpoint")] = "85/15"


def run(config: ConversationConfig) -> str:
    """Measure how a system prompt and an earlier turn change decisions."""
    router = load_checkpoint(config.checkpoint)
    outcomes = load_outcomes(config.outcomes, router.pool)
    test = split_queries(outcomes, config.seed, config.scheme).test
    rows = np.sort(np.random.default_rng(config.seed).permutation(test)[: config.queries])
    system = " ".join(SYSTEM.read_text(encoding="utf-8").split()[: config.words])
    asked: dict[str, list[tuple[str, Requirements]]] = {name: [] for name in TEXTS[: 3 + config.complete]}
    prompts = outcomes.prompts[rows]
    for prompt, previous in zip(prompts, np.roll(prompts, 1), strict=True):
        question = Message(role="user", content=prompt)
        before = [Message(role="user", content=previous), Message(role="assistant", content="The answer is A.")]
        instructed = RouteRequest(messages=[Message(role="system", content=system), question])
        continued = RouteRequest(messages=[*before, question])
        asked[BARE].append((prompt, Requirements()))
        asked[TEXTS[1]].append((instructed.text, instructed.requirements))
        asked[TEXTS[2]].append((continued.text, continued.requirements))
        if config.complete:
            asked[TEXTS[3]].append((f"{system}\n{prompt}", Requirements()))
    p: dict[str, np.ndarray] = {}
    chosen: dict[str, np.ndarray] = {}
    with LocalRouter(router) as local:
        for name, queries in asked.items():
            decisions: list[Decision] = []
            for text, requirements in tqdm(queries, desc=name, unit=" queries"):
                decisions += local.decide(local.encode([text]), None, requirements)
            by_model = [{one.model: one.confidence for one in decision.candidates} for decision in decisions]
            p[name] = np.array([[own.get(model, np.nan) for model in router.pool.names] for own in by_model])
            chosen[name] = np.array([decision.model for decision in decisions])
    figures = {
        name: {
            "same_decision": float((chosen[name] == chosen[BARE]).mean()),
            "confidence_difference": float(np.nanmean(np.abs(p[name] - p[BARE]))),
            "auc": float(np.nanmean(auc_per_model(outcomes.correct[rows], p[name]))),
        }
        for name in asked
    }
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "conversation.json", figures | {"config": config.model_dump(mode="json")})
    print("| text | same decision | mean difference of confidences | AUC |\n|---|---|---|---|")
    for name, one in figures.items():
        print(f"| {name} | {one['same_decision']:.3f} | {one['confidence_difference']:.3f} | {one['auc']:.4f} |")
    shares = " and ".join(f"{figures[name]['same_decision']:.0%} after {name.split(',')[0]}" for name in TEXTS[1:3])
    return f"decisions of the bare question: {shares}; figures: {config.output / 'conversation.json'}"


if __name__ == "__main__":
    main(ConversationConfig, run)
