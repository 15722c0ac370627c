"""Logs of inspect_ai, `.eval` and `.json`: scores, tokens, reasoning tokens, cost and latency of every sample.

The package inspect_ai, the extra `eval`, reads the files. The prompt is the text of the messages before the first
answer, without system messages, as serving reads a conversation. A model with a reasoning effort is named MODEL@EFFORT.
Input tokens include those of the prompt cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefill_router.errors import InputError
from prefill_router.importing.answers import Answer
from prefill_router.importing.records import beginning

NAME = "inspect_ai"
INSTALL = "pip install 'prefill-router[eval]'"
LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # right, partly right, wrong, no answer


def matches(path: Path) -> bool:
    """Whether the file is a log of inspect_ai."""
    if path.suffix == ".eval":
        return True
    start = beginning(path)
    return path.suffix == ".json" and '"eval"' in start and '"task_id"' in start


def read(path: Path, metric: str | None = None) -> Iterator[Answer]:
    """The answers of a log. `metric`: name of a scorer, or SCORER.KEY for a score of several values; None: the first.

    Samples that were not finished are errors. Raises InputError if inspect_ai is missing, for a log that it cannot read
    or without samples, for an unknown scorer, and for a score that is no number.
    """
    log = _log(path)
    if not log.samples:
        raise InputError(f"{path}: the log has no samples (status {log.status}); import a log that has some")
    effort = log.plan.config.reasoning_effort or log.eval.model_generate_config.reasoning_effort
    model = log.eval.model if effort is None else f"{log.eval.model}@{effort}"
    benchmark = log.eval.task.rsplit("/", 1)[-1]
    for sample in log.samples:
        place = f"{path}, sample {sample.id}, epoch {sample.epoch}"
        yield answer_of(sample, log.eval.model, model, benchmark, metric, place)


def intact_logs(folder: Path) -> Iterator[Any]:
    """The logs in a folder, from the earliest, without those that a killed process left unreadable."""
    for path in sorted(folder.glob("*.eval")):
        with suppress(InputError):
            yield _log(path)


def answer_of(sample: Any, asked: str, model: str, benchmark: str, metric: str | None, place: str) -> Answer:
    """The answer in a sample of a log. `asked`: the model's name in the log; `model`, `benchmark`: in the outcomes.

    Raises InputError as `read`, with `place`.
    """
    score, scorer = (None, "") if sample.error else _score(sample.scores or {}, metric, place)
    # `model_usage` has the calls of a judge that is the same model, and lacks answers from the cache of inspect_ai.
    single = sum(message.role == "assistant" for message in sample.messages) <= 1
    usages = [sample.output.usage, sample.model_usage.get(asked)]
    usage = next(filter(None, usages if single else reversed(usages)), None)
    whole = sample.working_time if sample.working_time is not None else sample.total_time
    latency = sample.output.time if single and sample.output.time is not None else whole
    given = next(iter((sample.scores or {}).values()), None)
    parsed = None if given is None else (given.metadata or {}).get("parsed")
    return Answer(
        f"{benchmark}/{sample.id}",
        benchmark,
        _prompt(sample),
        model,
        score,
        f"{NAME} {scorer}".strip(),
        input_tokens=None if usage is None else input_tokens(usage),
        output_tokens=None if usage is None else usage.output_tokens,
        reasoning_tokens=None if usage is None else usage.reasoning_tokens,
        cost_usd=None if usage is None else usage.total_cost,
        latency_s=latency,
        group=(sample.metadata or {}).get("group"),
        answer=sample.output.completion,
        stop=str(sample.output.stop_reason) if sample.output.choices else None,
        parsed=parsed,
        error=sample.error.message if sample.error else None,
    )


def input_tokens(usage: Any) -> int:
    """Tokens of the prompt, with those of the prompt cache."""
    return int(usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0))


def _log(path: Path) -> Any:
    """The log without its events. Raises InputError if inspect_ai is missing or cannot read it."""
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise InputError(f"{path}: a log of inspect_ai needs the package inspect_ai; {INSTALL}") from None
    try:
        return read_eval_log(str(path), exclude_fields={"events", "store", "attachments"})
    except Exception as error:  # noqa: BLE001  inspect_ai raises errors of its dependencies
        raise InputError(f"{path}: inspect_ai cannot read the log ({' '.join(str(error).split())[:200]})") from None


def _score(scores: dict[str, Any], metric: str | None, place: str) -> tuple[float | None, str]:
    """The score as a number, None if the sample is not scored, and the name of the scorer."""
    if not scores:
        return None, ""
    name, _, key = (metric or next(iter(scores))).partition(".")
    if name not in scores:
        raise InputError(f"{place}: no scorer {name!r}; the sample has {', '.join(scores)}; choose one as metric")
    value = scores[name].value
    if isinstance(value, dict):
        if key not in value:
            keys = ", ".join(f"{name}.{one}" for one in value)
            raise InputError(f"{place}: the score of {name} has several values; choose one as metric: {keys}")
        value = value[key]
    if isinstance(value, str) and value in LETTERS:
        return LETTERS[value], name
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{place}: the score {value!r} of {name} is no number and none of C, I, P and N") from None
    return (None if math.isnan(number) else number), name


def _prompt(sample: Any) -> str:
    """The text that the model received before its first answer; the input of the sample if there are no messages."""
    sent = []
    for message in sample.messages:
        if message.role == "assistant" and message.source != "input":
            break
        if message.role != "system":
            sent.append(message.text)
    if not sent:
        sent = [sample.input] if isinstance(sample.input, str) else [one.text for one in sample.input]
    return "\n".join(sent)
