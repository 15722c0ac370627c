"""Programs that models write, against tests, in the sandbox.

In: a Python program and tests. Out: whether it passes all of them, and the first fault. A test is an input with the
expected output, or a check: a program that raises an exception on a fault. Expected outputs stay outside of the
sandbox. Knows no benchmark.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from prefill_router.collect.sandbox import Finished, Limits, python, run

SHOWN = 200  # characters of an output in a reason
# Starter code of contests uses these names without importing them.
LOAD = """
import json, sys, types
sys.setrecursionlimit(50_000)
solution = types.ModuleType("solution")
sys.modules["solution"] = solution
exec('''
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
''', vars(solution))
with open("solution.py", encoding="utf-8") as file:
    exec(compile(file.read(), "solution.py", "exec"), vars(solution))
"""
CALL = """
given = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]
owner = solution.Solution() if hasattr(solution, "Solution") else solution
result = getattr(owner, {function!r})(*given)
print("\\n" + {mark!r} + json.dumps(result, default=list))
"""
CHECK = """
with open("check.py", encoding="utf-8") as file:
    exec(compile(file.read(), "check.py", "exec"), vars(solution))
print("\\n" + {mark!r})
"""


@dataclass(frozen=True)
class Case:
    """A test: standard input and the expected output, or of a function its arguments, one JSON value per line, and its
    result as JSON."""

    input: str
    output: str


async def passes(
    program: str, cases: Sequence[Case], function: str | None = None, seconds: float = 10.0
) -> tuple[bool, str]:
    """Whether a program passes every case, and the first fault. `seconds` bound each case.

    With a `function`, the program defines it, or a class Solution with it. Raises InputError without a sandbox.
    """
    if not cases:
        return False, "there are no tests"
    for number, case in enumerate(cases, 1):
        if function is None:
            done = await _run("main.py", {"main.py": program}, case.input, seconds)
            fault = _fault(done) or _difference(done.stdout.decode(errors="replace"), case.output)
        else:
            mark = secrets.token_hex(8)
            files = {"solution.py": program, "main.py": LOAD + CALL.format(function=function, mark=mark)}
            done = await _run("main.py", files, case.input, seconds)
            fault = _fault(done) or _different_result(_marked(done, mark), case.output)
        if fault:
            return False, f"test {number} of {len(cases)}: {fault}"
    return True, f"{len(cases)} tests passed"


async def passes_check(program: str, check: str, seconds: float = 10.0) -> tuple[bool, str]:
    """Whether `check`, Python code that sees the program's names, ends without an exception, and the fault.

    A program that ends the process early does not pass. Raises InputError without a sandbox.
    """
    mark = secrets.token_hex(8)
    files = {"solution.py": program, "check.py": check, "main.py": LOAD + CHECK.format(mark=mark)}
    done = await _run("main.py", files, "", seconds)
    fault = _fault(done) or ("" if _marked(done, mark) is not None else "the check did not reach its end")
    return not fault, fault or "the check passed"


async def _run(main: str, files: dict[str, str], stdin: str, seconds: float) -> Finished:
    async with _processes():
        return await asyncio.to_thread(run, [*python(), main], files, stdin.encode(), Limits(seconds=seconds))


def _fault(done: Finished) -> str:
    if done.stopped is not None:
        return f"stopped by the limit of {done.stopped}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"exit code {done.returncode}{f', {lines[-1][:SHOWN]}' if lines else ''}"


def _marked(done: Finished, mark: str) -> str | None:
    """What follows the mark on the last line of the output."""
    lines = done.stdout.decode(errors="replace").rstrip("\n").splitlines()
    return lines[-1].removeprefix(mark) if lines and lines[-1].startswith(mark) else None


def _difference(output: str, expected: str) -> str:
    """The first difference; white space at the ends of lines and empty lines at the end do not count."""
    ours, theirs = _lines(output), _lines(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} lines of output, expected {len(theirs)}"
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        if not _same(one.split(), other.split()):
            return f"line {number} is {one[:SHOWN]!r}, expected {other[:SHOWN]!r}"
    return ""


def _different_result(result: str | None, expected: str) -> str:
    if result is None:
        return "the function returned nothing that is JSON"
    given, wanted = json.loads(result), json.loads(expected)
    return "" if given == wanted else f"the result is {result[:SHOWN]}, expected {expected.strip()[:SHOWN]}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(ours: list[str], theirs: list[str]) -> bool:
    return len(ours) == len(theirs) and all(
        one == other or _number(one) == _number(other) is not None for one, other in zip(ours, theirs, strict=True)
    )


def _number(text: str) -> Any:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


_slots: weakref.WeakKeyDictionary[Any, asyncio.Semaphore] = weakref.WeakKeyDictionary()


def _processes() -> asyncio.Semaphore:
    """One program at a time for each CPU: more would use up each other's time limit."""
    loop = asyncio.get_running_loop()
    return _slots.setdefault(loop, asyncio.Semaphore(os.cpu_count() or 1))
