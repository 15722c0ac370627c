"""What a collection asks: benchmarks and models, what it may cost, and how many questions are asked at a time.

In: the pool and the benchmarks. Out: `Pair` objects, one per (benchmark, model), and an estimate in USD. Knows nothing
of inspect_ai.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from pydantic import Field, model_validator

from prefill_router.collect.ledger import answer_usd
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.locations import LocalPath
from prefill_router.pool import Endpoint, Pool, TargetModel

WHICH = "give `questions`, a file of questions (docs/questions.md), or `task`, a task of inspect_ai as MODULE:FUNCTION"


class Benchmark(FrozenModel):
    """A benchmark: questions in a file, or a task of inspect_ai. As text: the file, or MODULE:FUNCTION of the task."""

    name: Annotated[
        str | None, Field(min_length=1, description="name in the outcomes; none: that of the file or the function")
    ] = None
    questions: Annotated[LocalPath | None, Field(description="file of questions (JSON Lines); none: a task")] = None
    task: Annotated[
        str | None,
        Field(
            pattern=r"^[\w.]+:\w+$",
            description="task of inspect_ai as MODULE:FUNCTION, such as inspect_evals.mmlu_pro:mmlu_pro; none: "
            "questions",
        ),
    ] = None
    args: Annotated[dict[str, Any], Field(description="arguments of the task")] = {}
    limit: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="number of questions, from the first; none: all")
    ] = None
    epochs: Annotated[int, Field(ge=1, description="answers of each model to each question")] = 1

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        text = str(value)
        return {"questions": value} if text.endswith((".jsonl", ".json")) else {"task": text}

    @model_validator(mode="after")
    def _one_source(self) -> Benchmark:
        if (self.questions is None) == (self.task is None):
            raise ValueError(f"questions: got {'none' if self.task is None else 'both'}; {WHICH}")
        if self.args and self.task is None:
            raise ValueError("args: only a task has arguments; leave them out")
        return self

    @property
    def label(self) -> str:
        """The name in the outcomes."""
        if self.name is not None:
            return self.name
        return self.questions.stem if self.questions is not None else (self.task or "").rpartition(":")[2]

    @property
    def folder(self) -> str:
        """The name of the benchmark's folder of logs."""
        return _file_name(self.label)


@dataclass(frozen=True)
class Question:
    """What the plan knows of a question: its id, its length in estimated tokens, and a digest of its content."""

    id: str
    tokens: int
    digest: str = ""


@dataclass(frozen=True)
class Pair:
    """A benchmark and the model that answers it. `connections`: requests at a time."""

    benchmark: Benchmark
    model: TargetModel
    connections: int

    @property
    def place(self) -> Path:
        """The folder of the pair below a collection's folder of logs."""
        return Path(self.benchmark.folder, _file_name(self.model.name))


def endpoint_of(model: TargetModel) -> Endpoint:
    """The server of a model. Raises InputError if the pool has none."""
    if model.endpoint is None:
        raise InputError(
            f"models: {model.name!r} has no endpoint in the pool file; give it one (docs/data-formats.md), or leave "
            "the model out with --models"
        )
    return model.endpoint


def server_of(model: TargetModel) -> str:
    """The server or provider that a model shares with others, for the bound on requests at a time."""
    endpoint = endpoint_of(model)
    return urlsplit(endpoint.base_url).netloc if endpoint.base_url else endpoint.provider or ""


def pairs_of(benchmarks: Sequence[Benchmark], models: Sequence[TargetModel], connections: int, cpus: int) -> list[Pair]:
    """All pairs, ordered by benchmark. Each process needs a CPU, and the processes that run at the same time share the
    `connections` of a server.

    Raises InputError for a name that two benchmarks have, and for a model without an endpoint.
    """
    labels = [benchmark.label for benchmark in benchmarks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"benchmarks: more than one is called {', '.join(twice)}; give one of them another name")
    servers = [server_of(model) for model in models]
    at_once = {server: min(servers.count(server) * len(benchmarks), cpus, connections) for server in servers}
    return [
        Pair(benchmark, model, connections // at_once[server])
        for benchmark in benchmarks
        for model, server in zip(models, servers, strict=True)
    ]


def keys_of(benchmark: Benchmark, questions: Sequence[Question]) -> set[tuple[str, int]]:
    """The (id, epoch) of every answer that a benchmark asks of a model."""
    return {(question.id, epoch) for question in questions for epoch in range(1, benchmark.epochs + 1)}


def estimate_usd(pair: Pair, questions: Sequence[Question], output_tokens: float) -> float:
    """Cost in USD of answers to `questions` with `output_tokens` tokens each."""
    inputs = sum(question.tokens for question in questions)
    outputs = round(output_tokens * len(questions))
    return pair.benchmark.epochs * answer_usd(pair.model, inputs, outputs)


def chosen(pool: Pool, names: Sequence[str]) -> list[TargetModel]:
    """The models of the pool called `names`, all without names. Raises InputError for an unknown name."""
    return [pool.models[index] for index in pool.indices(names)] if names else list(pool.models)


def _file_name(name: str) -> str:
    """A name as the name of a folder."""
    quoted = quote(name, safe=" @+=,")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
