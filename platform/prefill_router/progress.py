"""Progress of long work: `tqdm`, whose bar is a line of text every ten seconds if standard error is not a terminal.

In: as `tqdm.tqdm`. Out: on a terminal, the bar; otherwise the first line after three seconds, then one every ten
seconds, also while nothing advances, so that the log of a submitted job moves:

    prefill: 1,024 of 10,000 prompts, 34.1 prompts/s, 4 min left, 3,210 tokens/s

In the format json (`prefill_router.logs`) a line has the fields `done`, `total`, `rate`, `unit`, `eta_s`
and `elapsed_s`.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import Any

from tqdm import tqdm as _Bar

from prefill_router.logs import is_structured, say

FIRST_S, EVERY_S = 3.0, 10.0  # seconds until the first line, and between two lines


class tqdm(_Bar):
    """A progress bar, or lines. A bar with `leave=False` that ends before its first line prints none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.as_lines = "file" not in options and (is_structured() or not sys.stderr.isatty())
        if self.as_lines:
            options["file"] = _Nowhere()
        super().__init__(*args, **options)
        self.as_lines = self.as_lines and not self.disable
        self.said = 0  # lines
        if self.as_lines or (not self.disable and not self.unit):
            self.due = time.monotonic() + FIRST_S
            self.first = self.n
            _watch(self)

    def close(self) -> None:
        """Ends the bar. Its last state is a line, unless `leave` is false and it printed none before."""
        _watched.discard(self)
        if self.as_lines and not self.disable and (self.leave or (self.said and self.unit)):
            self.say_line()
        super().close()

    def say_line(self) -> None:
        """Prints the present state as a line."""
        state = self.format_dict
        seconds, unit = state["elapsed"], str(state["unit"]).strip()
        rate = (self.n - self.first) / seconds if seconds > 0 and self.n > self.first else None
        eta = None if rate is None or self.total is None else max(0.0, (self.total - self.n) / rate)
        parts = [f"{self.n:,}{'' if self.total is None else f' of {self.total:,}'} {unit}"] if unit else []
        parts.append(f"{duration(seconds)} since the start" if rate is None else f"{_number(rate)} {unit}/s")
        if eta:
            parts.append(f"{duration(eta)} left")
        if self.postfix:
            parts.append(str(self.postfix))
        self.said += 1
        self.due = time.monotonic() + EVERY_S
        label = self.desc.removesuffix(": ")  # which `set_description` adds
        say(
            f"{label}: {', '.join(parts)}" if label else ", ".join(parts),
            file=sys.stderr,
            done=self.n,
            total=self.total,
            rate=rate,
            unit=unit,
            eta_s=eta,
            elapsed_s=round(seconds, 1),
        )


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says `what` and the time since its start while a step runs that cannot count what it has done."""
    with tqdm(desc=what, unit="", bar_format="{desc}: {elapsed}", leave=False):
        yield


class _Nowhere:
    """A stream for the bar itself, whose lines are printed in its place."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


_watched: weakref.WeakSet[tqdm] = weakref.WeakSet()
_starting = Lock()
_thread: Thread | None = None


def _watch(bar: tqdm) -> None:
    """Prints a line of the bar whenever one is due, from one thread for all bars of the process."""
    global _thread
    with _starting:
        _watched.add(bar)
        if _thread is None or not _thread.is_alive():  # a forked process has none
            _thread = Thread(target=_say_due, daemon=True, name="progress")
            _thread.start()


def _say_due() -> None:
    pause = Event()
    while not pause.wait(0.5):
        for bar in _bars():
            if not bar.disable and not bar.as_lines:
                bar.refresh()
            elif not bar.disable and time.monotonic() >= bar.due:
                bar.say_line()


def _bars() -> list[tqdm]:
    """The watched bars. Other threads may add or close one while they are listed."""
    while True:
        try:
            return list(_watched)
        except RuntimeError:  # the set changed its size
            continue


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `4 min` or `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
