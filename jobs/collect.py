"""Collection job: asks every model of a pool every question of benchmarks, and writes an outcomes table.

Each (benchmark, model) is a Ray task with an evaluation of inspect_ai; all report their charges to one actor, which
keeps the budget. The same command resumes an interrupted collection: no answer is asked for twice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
import yaml
from pydantic import Field

from jobs.placement import on_this_node
from prefill_router.cli import main
from prefill_router.cluster import answer, connect, where
from prefill_router.collect.engine import constants, timed
from prefill_router.collect.ledger import Charge, Ledger
from prefill_router.collect.plan import Benchmark, Pair, Question, chosen, estimate_usd, keys_of, pairs_of
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.files import write_atomically, write_parquet
from prefill_router.importing.answers import Imported, outcomes_of
from prefill_router.locations import LocalPath
from prefill_router.locks import locked
from prefill_router.pool import Effort, TargetModel, load_pool
from prefill_router.progress import tqdm

INSTALL = "pip install 'prefill-router[eval]'"
LEDGER = "ledger.jsonl"
ERRORS = 5  # reasons that the summary names
ENGINE_TOKENS = 128  # of an answer that is timed, at most


class CollectConfig(FrozenModel):
    """The models, the benchmarks, and what asking them may cost."""

    pool: Annotated[LocalPath, Field(description="pool.yaml; its models need an endpoint")]
    benchmarks: Annotated[
        tuple[Benchmark, ...],
        Field(
            min_length=1,
            description="files of questions (JSON Lines), tasks of inspect_ai as MODULE:FUNCTION, or mappings with "
            "name, questions or task, args, limit and epochs",
        ),
    ]
    output: Annotated[LocalPath, Field(description="folder of the collection; it gets outcomes.parquet")]
    models: Annotated[tuple[str, ...], Field(description="models of the pool to ask; none: all")] = ()
    judge: Annotated[
        str | None,
        Field(description="model of the pool that judges answers; none: the judge of the benchmark"),
    ] = None
    budget_usd: Annotated[
        float | None, Field(ge=0, description="no question is asked once the answers cost this much; none: no limit")
    ] = None
    connections: Annotated[int, Field(ge=1, description="requests at a time to one server or provider")] = 16
    max_tokens: Annotated[int, Field(ge=1, description="tokens of an answer at most, with reasoning")] = 128_000
    reasoning_effort: Annotated[
        Effort | None,
        Field(description="reasoning effort of models whose endpoint has none in the pool; none: the server's default"),
    ] = "high"
    temperature: Annotated[float | None, Field(ge=0, le=2, description="none: the server's default")] = None
    attempts: Annotated[
        int,
        Field(ge=1, description="requests for an answer while a server refuses or drops them; waits double from 3 s"),
    ] = 8
    idle_s: Annotated[int, Field(ge=1, description="seconds between two pieces of a stream that end an attempt")] = 600
    output_tokens: Annotated[float, Field(gt=0, description="tokens of an answer, for the estimate of the cost")] = (
        2000.0
    )
    measure_engine: Annotated[
        int | None,
        Field(
            ge=2,
            description="afterwards, time the streamed answers of self-hosted models to this many questions, one after "
            "another, and write engines.yaml with their `self_hosted` for pool.yaml; none: not",
        ),
    ] = None
    plan_only: Annotated[bool, Field(description="print the plan with its estimate, and ask nothing")] = False


def plan(config: CollectConfig) -> list[str]:
    """What a dry run says, beside the plan with the estimated cost, which `run` prints. Asks no model."""
    run(config.model_copy(update={"plan_only": True}))
    return [f"runs on {where()}; USD are spent only by the run, and not beyond the budget"]


def run(config: CollectConfig) -> str:
    """Ask every model every question, and write the outcomes."""
    try:
        from prefill_router.collect import asking
        from prefill_router.collect.inspect_models import Settings, model_of
    except ImportError as error:
        raise InputError(f"collect: needs the package {error.name}; {INSTALL}") from None
    pool = load_pool(config.pool)
    models = chosen(pool, config.models)
    judge = None if config.judge is None else pool.models[pool.indices([config.judge])[0]]
    settings = Settings(
        config.max_tokens, config.reasoning_effort, config.temperature, config.attempts, config.idle_s, judge
    )
    questions = {benchmark.label: asking.questions_of(benchmark) for benchmark in config.benchmarks}
    if config.measure_engine is not None and all(model.self_hosted is None for model in models):
        raise InputError("measure_engine: no chosen model has `self_hosted` in the pool; add it, or leave it out")
    pairs = pairs_of(config.benchmarks, models, config.connections, 1)
    for model in [*models, *filter(None, [judge])]:
        model_of(model, settings)  # a missing key shows before anything is asked
    _print_plan(pairs, questions, config)
    if config.plan_only:
        return "nothing was asked"
    with locked(config.output):
        return _collect(config, pairs, questions, models, settings)


def _collect(
    config: CollectConfig,
    pairs: list[Pair],
    questions: dict[str, list[Question]],
    models: list[TargetModel],
    settings: Any,
) -> str:
    """Asks what has no answer and writes the outcomes of all answers."""
    from prefill_router.collect import asking, results

    keys = {}
    for benchmark in config.benchmarks:
        own = questions[benchmark.label]
        asking.check_questions(config.output, benchmark, {question.id: question.digest for question in own})
        keys[benchmark.label] = keys_of(benchmark, own)
    answered = sum(
        len(asking.answered(config.output / "logs" / pair.place) & keys[pair.benchmark.label]) for pair in pairs
    )
    total = sum(len(keys[pair.benchmark.label]) for pair in pairs)
    fault, spent = None, False
    if answered < total:
        if answered:
            print(f"collect: {answered:,} of {total:,} answers are there", flush=True)
        fault, spent = _ask_all(config, models, settings, answered, total)
    collected = results.Collected(pairs, config.output, keys)
    imported = _outcomes(collected, config.output / "outcomes.parquet", fault)
    if config.measure_engine is not None:
        _measure(models, imported.table, config)
    missing = total - collected.given
    rest = f"; {missing:,} answers are missing, the same command asks for them again" if missing else ""
    budget = f"; the budget of {config.budget_usd:g} USD is spent" if spent and missing else ""
    usd = Ledger(config.output / LEDGER).usd
    return f"{imported.summary}; {usd:,.2f} USD{budget}{rest}; {config.output / 'outcomes.parquet'}"


class Counting(Ledger):
    """The ledger with the number of questions that were answered since it started."""

    def __init__(self, path: Path, budget_usd: float | None) -> None:
        super().__init__(path, budget_usd)
        self.done = 0

    def answered(self) -> None:
        self.done += 1

    def progress(self) -> tuple[float, int, bool, list[str]]:
        """Spent USD, questions answered, whether the budget is spent, and models without a price."""
        return self.usd, self.done, not self.admits(), sorted(self.unpriced)


class _RemoteGate:
    """`asking.Gate` by the actor of the ledger."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def admits(self) -> bool:
        return bool(await self.actor.admits.remote())

    async def add(self, charge: Charge) -> None:
        await self.actor.add.remote(charge)

    async def answered(self) -> None:
        await self.actor.answered.remote()


def _ask_all(
    config: CollectConfig, models: list[TargetModel], settings: Any, answered: int, total: int
) -> tuple[Exception | None, bool]:
    """Asks what has no answer, on the cluster. The first error of a task, and whether the budget is spent."""
    cluster = connect()
    pairs = pairs_of(config.benchmarks, models, config.connections, max(cluster.cpus, 1))
    # This node has the file of the ledger. A new process reads the charges from it.
    counting = ray.remote(**on_this_node(), max_restarts=-1, max_task_retries=-1)(Counting)
    gate = counting.remote(config.output / LEDGER, config.budget_usd)
    one = ray.remote(num_cpus=1)(_ask)
    return _watch([one.remote(pair, settings, config.output, gate) for pair in pairs], gate, answered, total)


def _outcomes(collected: Any, path: Path, fault: Exception | None) -> Imported:
    """Writes the outcomes of all answers, also if a task failed with `fault`, which is raised then.

    Raises InputError with the reasons if there is no answer.
    """
    imported = None
    try:
        imported = outcomes_of(collected.answers(), texts=True)
        write_parquet(path, imported.table)
    except InputError:
        if collected.given:
            raise
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in collected.failed.most_common(ERRORS))
    if fault is not None:
        raise fault
    if imported is None:
        raise InputError(f"benchmarks: no question has an answer: {reasons or 'the budget allows none'}")
    if reasons:
        print(f"collect: questions without an answer: {reasons}", file=sys.stderr, flush=True)
    return imported


def _ask(pair: Pair, settings: Any, folder: Path, actor: Any) -> None:
    from prefill_router.collect.asking import ask

    ask(pair, settings, folder, _RemoteGate(actor))


def _watch(tasks: list[Any], gate: Any, answered: int, total: int) -> tuple[Exception | None, bool]:
    """Shows progress and spending until all tasks have ended. The first error of a task, and whether the budget is
    spent."""
    interval = 1.0 if sys.stderr.isatty() else 10.0
    pending, failed = list(tasks), []
    with tqdm(total=total, initial=answered, desc="collect", unit=" answers", mininterval=interval) as bar:
        while pending:
            ended, pending = ray.wait(pending, num_returns=len(pending), timeout=interval)
            usd, done, _, _ = answer(gate.progress.remote())
            bar.set_postfix_str(f"{usd:,.2f} USD", refresh=False)
            bar.update(answered + done - bar.n)
            for task in ended:
                try:
                    answer(task)
                except Exception as error:  # noqa: BLE001  the other tasks go on, `run` raises the first error
                    failed.append(error)
    _, _, stopped, unpriced = answer(gate.progress.remote())
    if unpriced:
        print(f"collect: the cost of {', '.join(unpriced)} is unknown and not in the sum", file=sys.stderr)
    return (failed[0] if failed else None), bool(stopped)


def _measure(models: list[TargetModel], outcomes: pa.Table, config: CollectConfig) -> None:
    """Times self-hosted models, prints the constants of their cost and writes engines.yaml."""
    hosted = [model for model in models if model.self_hosted is not None]
    assert config.measure_engine is not None
    prompts = list(dict.fromkeys(outcomes["prompt"].to_pylist()))[: config.measure_engine]
    found = {}
    for model in hosted:
        assert model.self_hosted is not None
        timings = timed(model, tqdm(prompts, desc=f"time {model.name}", unit=" questions"), ENGINE_TOKENS)
        engine = constants(timings, model.self_hosted.gpu_usd_per_hour)
        found[model.name] = engine.model_dump(mode="json")
        print(
            f"collect: {model.name}: {engine.ttft_s_per_1k_tokens:.3f} s per 1,000 input tokens to the first token, "
            f"{1000 * engine.itl_s:.1f} ms per output token, {len(timings)} answers one after another"
        )
    path = config.output / "engines.yaml"
    write_atomically(path, lambda temporary: temporary.write_text(yaml.safe_dump(found, sort_keys=False)))
    print(f"collect: {path}: copy its values into `self_hosted` of the pool", flush=True)


def _print_plan(pairs: list[Pair], questions: dict[str, list[Question]], config: CollectConfig) -> None:
    """Prints what is asked, with the estimated cost of each model."""
    models: dict[str, TargetModel] = {pair.model.name: pair.model for pair in pairs}
    counts = ", ".join(
        f"{benchmark.label} {len(questions[benchmark.label]):,}"
        + (f" x {benchmark.epochs}" if benchmark.epochs > 1 else "")
        for benchmark in config.benchmarks
    )
    print(f"collect: questions: {counts}")
    total = 0.0
    for name in models:
        usd = sum(
            estimate_usd(pair, questions[pair.benchmark.label], config.output_tokens)
            for pair in pairs
            if pair.model.name == name
        )
        total += usd
        print(f"collect: {name}: about {usd:,.2f} USD")
    limit = "no budget" if config.budget_usd is None else f"budget {config.budget_usd:,.2f} USD"
    print(f"collect: about {total:,.2f} USD at {config.output_tokens:,.0f} tokens per answer; {limit}", flush=True)


if __name__ == "__main__":
    main(CollectConfig, run, plan=plan, then="python -m jobs.labels --outcomes {output}/outcomes.parquet")
