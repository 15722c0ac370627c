"""Benchmarks of one's own as tasks of inspect_ai.

In: a file of questions. Out: a task that sends each question with one instruction on how to end the answer, and scores
the answer by the question's kind. The score has the final answer, and whether one was found (`parsed`). Programs run in
the sandbox; a judge is the model role `grader`, by default the model itself.
"""

from __future__ import annotations

import math
from pathlib import Path

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, mean, model_graded_qa, scorer
from inspect_ai.solver import TaskState, generate

from prefill_router.collect.extraction import Grade, code, grade
from prefill_router.collect.programs import Case, passes, passes_check
from prefill_router.collect.questions import Question, prompt, read_questions
from prefill_router.collect.sandbox import check_host


def questions_task(path: Path) -> Task:
    """The task of a file of questions. Raises InputError as `read_questions`."""
    questions = read_questions(path)
    if any(question.kind == "code" for question in questions):
        check_host()  # before anything is asked
    samples = [
        Sample(
            input=prompt(question),
            target=str(question.answer or ""),
            id=question.id,
            metadata={
                "question": question.model_dump(mode="json"),
                "benchmark": question.benchmark,
                "group": question.group,
            },
        )
        for question in questions
    ]
    return Task(dataset=MemoryDataset(samples, name=path.stem), solver=generate(), scorer=graded())


@scorer(metrics=[mean()])
def graded() -> Scorer:
    """Scores an answer by the kind of its question, from 0 to 1."""
    judge = model_graded_qa(partial_credit=True)

    async def score(state: TaskState, target: Target) -> Score:
        question = Question.model_validate(state.metadata["question"])
        if question.kind == "judge":
            judged = await judge(state, target)
            assert judged is not None
            return judged
        if question.kind == "code":
            return await _of_program(question, code(state.output.completion))
        result = grade(question, state.output.completion)
        return Score(
            value=_value(result),
            answer=result.extracted,
            explanation=result.why,
            metadata={"parsed": result.parsed},
        )

    return score


def _value(result: Grade) -> float:
    """0 without a final answer, NaN, which is no label, if the comparison came to no end."""
    if result.score is None:
        return math.nan if result.parsed else 0.0
    return result.score


async def _of_program(question: Question, program: str | None) -> Score:
    if program is None:
        return Score(value=0.0, explanation="the answer has no program", metadata={"parsed": False})
    tests = question.tests or ()
    cases = [Case(test.input, test.output) for test in tests if not isinstance(test, str)]
    statements = [test for test in tests if isinstance(test, str)]
    passed, why = await (passes(program, cases) if cases else passes_check(program, "\n".join(statements)))
    return Score(value=float(passed), answer=program, explanation=why, metadata={"parsed": True})
