"""LiveCodeBench (Jain et al. 2024) as a task of inspect_ai, over the files of its public release, with pass@1.

In: the folder with test.jsonl to test6.jsonl of the data set code_generation_lite. Release v1 is the first file, v6 are
all six. Out: a task; an answer is right if its program passes every public and private test in the sandbox. The files
are not part of the project, and nothing downloads them.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import TaskState, generate

from prefill_router.collect.extraction import code
from prefill_router.collect.programs import Case, passes
from prefill_router.collect.sandbox import check_host
from prefill_router.errors import InputError
from prefill_router.importing.records import Record, json_lines

RELEASES = 6
SECONDS = 6.0  # per test, as in the benchmark's own harness
STDIN = "Read the input from standard input and write the output to standard output."
STARTER = "Complete this code; its function is called by the tests.\n\n```python\n{starter}\n```"
FORMAT = "Think first. End with one complete Python program in one code block: ```python ... ```"


@task
def livecodebench(
    folder: str,
    release: int = RELEASES,
    since: str | None = None,
    before: str | None = None,
    difficulty: str | None = None,
) -> Task:
    """The problems of a release, from v1 to v6, of contests from the day `since` on and earlier than `before`.

    Days are written YYYY-MM-DD. Raises InputError for an unknown release, a missing file and a line that is no problem.
    """
    if not 1 <= release <= RELEASES:
        raise InputError(f"release: got {release}, allowed is 1 to {RELEASES}")
    check_host()  # before anything is asked
    samples = []
    for record in _problems(Path(folder), release):
        day = record.text("contest_date")[:10]
        if (since is not None and day < _day(since, "since")) or (before is not None and day >= _day(before, "before")):
            continue
        if difficulty is not None and record.text("difficulty") != difficulty:
            continue
        _cases(record)  # a fault shows before anything is asked
        samples.append(
            Sample(
                input=_prompt(record),
                id=record.text("question_id"),
                metadata={"function": _function(record), "day": day},
            )
        )
    if not samples:
        raise InputError(f"{folder}: release {release} has no problem in these days and of this difficulty")
    return Task(
        dataset=MemoryDataset(samples, name="livecodebench"),
        solver=generate(),
        scorer=passes_all_tests(folder, release),
    )


@scorer(metrics=[mean()])
def passes_all_tests(folder: str, release: int) -> Scorer:
    """1 if the last program of the answer passes every test, else 0. The tests stay out of the logs: they are large."""
    tests = {record.text("question_id"): record for record in _problems(Path(folder), release)}

    async def score(state: TaskState, target: Target) -> Score:
        program = code(state.output.completion)
        if program is None:
            return Score(value=0.0, explanation="the answer has no program", metadata={"parsed": False})
        cases = _cases(tests[str(state.sample_id)])
        passed, why = await passes(program, cases, state.metadata["function"], SECONDS)
        return Score(value=float(passed), answer=program, explanation=why, metadata={"parsed": True})

    return score


def _problems(folder: Path, release: int) -> Iterator[Record]:
    for number in range(1, release + 1):
        path = folder / f"test{'' if number == 1 else number}.jsonl"
        if not path.exists():
            raise InputError(f"{path}: no such file; release {release} of code_generation_lite has it")
        yield from json_lines(path)


def _prompt(record: Record) -> str:
    starter = record.text("starter_code")
    return "\n\n".join([record.text("question_content"), STARTER.format(starter=starter) if starter else STDIN, FORMAT])


def _function(record: Record) -> str | None:
    """The function that tests call; None for programs that read standard input."""
    if not record.text("starter_code"):
        return None
    found = json.loads(record.text("metadata")).get("func_name")
    if not isinstance(found, str):
        raise InputError(f"{record.place}: `metadata` has no func_name, but the problem has starter_code")
    return found


def _cases(record: Record) -> list[Case]:
    """The public and the private tests."""
    try:
        public = json.loads(record.text("public_test_cases"))
        private = _private(record.text("private_test_cases"))
        cases = [Case(case["input"], case["output"]) for case in public + private]
        if _function(record) is not None:
            for case in cases:
                json.loads(case.output)
        return cases
    except (ValueError, KeyError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{record.place}: the tests cannot be read ({' '.join(str(error).split())[:200]})") from None


def _private(text: str) -> list[Any]:
    """Private tests: a JSON list, as text or compressed as the public files have it."""
    if text.startswith("["):
        return json.loads(text)
    return json.loads(_Text(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _Text(pickle.Unpickler):
    """Reads a pickled string. Any other object is refused: a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _day(text: str, name: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise InputError(f"{name}: got {text!r}, expected a day as YYYY-MM-DD") from None
