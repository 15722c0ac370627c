"""Asks one model the questions of one benchmark, by inspect_ai.

In: a `Pair` and a `Gate`. Out: logs of inspect_ai in the folder of the pair. A question that has an answer in a log is
not asked again. Every answer is also in a cache from the moment it arrives, so an interrupted process loses only
answers that were on their way. The package inspect_ai is the extra `eval`. Knows neither Ray nor the outcomes table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from inspect_ai import Epochs, Task, task_with
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.event import ModelEvent
from inspect_ai.hooks import Hooks, ModelUsageData, SampleEnd, hooks
from inspect_ai.model import CachePolicy
from inspect_ai.util import EarlyStop

from prefill_router.collect.inspect_models import Settings, effort_of, model_of, server_name
from prefill_router.collect.ledger import Charge, answer_usd, estimated_tokens
from prefill_router.collect.plan import Benchmark, Pair, Question
from prefill_router.collect.tasks import questions_task
from prefill_router.errors import InputError
from prefill_router.files import prompt_digest, read_json, write_json
from prefill_router.importing import inspect_logs
from prefill_router.locks import locked
from prefill_router.pool import TargetModel

SETTINGS = "settings.json"
QUESTIONS = "questions.json"  # digests by id
LOCK_S = 60.0  # wait for another process: processes of a collection that was killed need some seconds to end
UNREADABLE = 3  # answers to a question that the client cannot read, before it counts as failed
ROOM = 256  # tokens left for the answer at least, however long the prompt


@runtime_checkable
class Gate(Protocol):
    """What a collection allows and counts; its calls may go to another process."""

    async def admits(self) -> bool:
        """Whether another question may be asked."""

    async def add(self, charge: Charge) -> None:
        """Records a paid answer."""

    async def answered(self) -> None:
        """Counts a question with an answer."""


def questions_of(benchmark: Benchmark) -> list[Question]:
    """The questions of a benchmark. Raises InputError if it cannot be read."""
    samples = _task(benchmark).dataset
    return [Question(str(sample.id), estimated_tokens(_text(sample)), _digest(sample)) for sample in samples]


def ask(pair: Pair, settings: Settings, folder: Path, gate: Gate) -> None:
    """Asks the questions that have no answer yet. Logs and cache are below `folder`.

    Questions that fail `settings.attempts` times are errors in the log, and the next call asks them again. Raises
    InputError if another process asks the same pair, if the settings differ from those of earlier answers, and for a
    benchmark that cannot be read.
    """
    logs = folder / "logs" / pair.place
    with locked(logs, LOCK_S):
        _same_settings(logs / SETTINGS, _settings(pair, settings))
        task = _task(pair.benchmark)
        check_questions(folder, pair.benchmark, {str(sample.id): _digest(sample) for sample in task.dataset})
        done = answered(logs)
        epochs = range(1, pair.benchmark.epochs + 1)
        most = _max_tokens(pair.model, list(task.dataset), settings.max_tokens)
        samples = [sample for sample in task.dataset if any((str(sample.id), epoch) not in done for epoch in epochs)]
        if not samples:
            return
        os.environ["INSPECT_CACHE_DIR"] = str(folder / "cache")
        asked = [pair.model, *filter(None, [settings.judge])]
        Charges.current = (pair, {str(model_of(model, settings)): model for model in reversed(asked)}, gate)
        Charges.fault = None
        try:
            inspect_eval(
                task_with(
                    task,
                    dataset=MemoryDataset(samples, name=pair.benchmark.label),
                    early_stopping=_WithinBudget(gate, done),
                    epochs=Epochs(pair.benchmark.epochs),
                    name=pair.benchmark.label,
                ),
                model=model_of(pair.model, settings),
                model_roles=None if settings.judge is None else {"grader": model_of(settings.judge, settings)},
                log_dir=str(logs),
                log_format="eval",
                log_realtime=False,  # no second copy of the log in the user's home
                log_model_api=False,
                log_level="error",
                ctl_server=False,
                display="none",
                fail_on_error=False,
                retry_on_error=UNREADABLE,
                max_samples=pair.connections,
                max_connections=pair.connections,
                max_tokens=most,
                max_retries=settings.attempts - 1,
                stream_idle_timeout=settings.idle_s,
                temperature=settings.temperature,
                cache=CachePolicy(expiry=None),
            )
        finally:
            Charges.current = None
        if Charges.fault is not None:
            raise Charges.fault


def check_questions(folder: Path, benchmark: Benchmark, digests: Mapping[str, str]) -> None:
    """Records the questions of a benchmark. Raises InputError for one that differs from an earlier one of its id."""
    path = folder / "logs" / benchmark.folder / QUESTIONS
    known = read_json(path) if path.exists() else {}
    for name, digest in digests.items():
        if known.get(name, digest) != digest:
            raise InputError(
                f"benchmarks: question {name!r} of {benchmark.label} is not the one that was asked before; choose "
                "another output folder, and give a task that shuffles a seed"
            )
    if not digests.keys() <= known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known | dict(digests))


def answered(logs: Path) -> set[tuple[str, int]]:
    """The (id, epoch) of questions with an answer in a folder of logs."""
    return {
        (str(sample.id), sample.epoch)
        for log in inspect_logs.intact_logs(logs)
        for sample in log.samples or []
        if sample.error is None
    }


@hooks(name="prefill_router_charges", description="Reports paid answers to the collection.")
class Charges(Hooks):
    """Reports each paid answer of the pair that this process asks."""

    current: tuple[Pair, dict[str, TargetModel], Gate] | None = None  # models by their names in inspect_ai
    fault: Exception | None = None  # inspect_ai hides the errors of hooks

    def enabled(self) -> bool:
        return Charges.current is not None

    async def on_model_usage(self, data: ModelUsageData) -> None:
        usage = data.usage
        inputs, cached = inspect_logs.input_tokens(usage), usage.input_tokens_cache_read or 0
        await self._add(data.model_name, inputs, usage.output_tokens, cached, usage.total_cost)

    async def on_sample_end(self, data: SampleEnd) -> None:
        for event in data.sample.events:
            if isinstance(event, ModelEvent) and _is_uncounted(event):
                inputs = sum(estimated_tokens(message.text) for message in event.input)
                await self._add(event.model, inputs, estimated_tokens(event.output.completion), estimated=True)
        if data.sample.error is None:
            assert Charges.current is not None
            await Charges.current[2].answered()

    async def _add(
        self,
        asked: str,
        inputs: int,
        outputs: int,
        cached: int = 0,
        usd: float | None = None,
        estimated: bool = False,
    ) -> None:
        assert Charges.current is not None
        pair, models, gate = Charges.current
        if asked in models:
            usd, asked = answer_usd(models[asked], inputs, outputs, cached), models[asked].name
        try:
            await gate.add(Charge(pair.benchmark.label, pair.model.name, asked, usd, inputs, outputs, estimated))
        except Exception as error:  # noqa: BLE001  the evaluation ends, and `ask` raises it
            Charges.fault = error


class _WithinBudget:
    """Leaves out what is answered, and everything once the budget is spent (inspect_ai's EarlyStopping)."""

    def __init__(self, gate: Gate, done: set[tuple[str, int]]) -> None:
        self.gate, self.done = gate, done

    async def start_task(self, task: Any, samples: list[Sample], epochs: int) -> str:
        return "budget"

    async def schedule_sample(self, id: str | int, epoch: int) -> EarlyStop | None:
        if (str(id), epoch) in self.done:
            return EarlyStop(id=id, epoch=epoch, reason="answered before")
        if Charges.fault is None and await self.gate.admits():
            return None
        return EarlyStop(id=id, epoch=epoch, reason="the budget is spent")

    async def complete_sample(self, id: str | int, epoch: int, scores: dict[str, Any]) -> None:
        return None

    async def complete_task(self) -> dict[str, Any]:
        return {}


def _is_uncounted(event: ModelEvent) -> bool:
    """Whether the event is an answer of a server that reported no tokens."""
    answered = event.error is None and bool(event.output.choices)
    return answered and event.cache != "read" and event.output.usage is None


def _task(benchmark: Benchmark) -> Task:
    """The task with an id for each sample, and at most `limit` samples."""
    if benchmark.questions is not None:
        task = questions_task(benchmark.questions)
    else:
        module, _, name = (benchmark.task or "").partition(":")
        try:
            task = getattr(import_module(module), name)(**benchmark.args)
        except Exception as error:  # noqa: BLE001  a task may raise anything
            raise InputError(
                f"benchmarks: the task {benchmark.task} cannot be made: {' '.join(str(error).split())[:300]}"
            ) from None
        if not isinstance(task, Task):
            raise InputError(f"benchmarks: {benchmark.task} made {type(task).__name__}, not a task of inspect_ai")
    for position, sample in enumerate(task.dataset, 1):
        if sample.id is None:
            sample.id = position
    return task_with(task, dataset=task.dataset[: benchmark.limit]) if benchmark.limit else task


def _text(sample: Sample) -> str:
    return sample.input if isinstance(sample.input, str) else "\n".join(message.text for message in sample.input)


def _digest(sample: Sample) -> str:
    """Identifies the text of a question and how it is scored."""
    scored = [sample.target, sample.choices, (sample.metadata or {}).get("question")]
    return prompt_digest(f"{_text(sample)}\n{json.dumps(scored, default=str)}")


def _max_tokens(model: TargetModel, samples: list[Sample], most: int) -> int:
    """Tokens of an answer at most: what the context window leaves beside the longest prompt."""
    if model.context_tokens is None:
        return most
    longest = max(estimated_tokens(_text(sample)) for sample in samples)
    return min(most, max(model.context_tokens - 2 * longest, ROOM))  # the estimate may be half of the true number


def _settings(pair: Pair, settings: Settings) -> dict[str, Any]:
    """What answers depend on: answers under different settings are not mixed."""
    return {
        "model": server_name(pair.model),
        "max_tokens": settings.max_tokens,
        "effort": effort_of(pair.model, settings),
        "temperature": settings.temperature,
        "judge": settings.judge and settings.judge.name,
        "benchmark": pair.benchmark.task or "questions",
        "args": pair.benchmark.args,
    }


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, settings)
        return
    for name, earlier in read_json(path).items():
        if earlier != settings.get(name):
            raise InputError(
                f"{name}: got {settings.get(name)!r}, but the answers in {path.parent} were made with {earlier!r}; "
                "choose another output folder"
            )
