"""The decision log: what was decided, what became of it, and feedback, as JSON lines.

In: records of one gateway replica. Out: files `decisions-*.jsonl` in one folder, which grow at the end only, and are
replaced by new ones from a size on. A thread writes them: a request never waits for the disk. If records arrive faster
than they are written, they are dropped and counted. `prefill_router.decisions` reads them.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, ImportString, TypeAdapter, ValidationError, model_validator

from prefill_router.config import FrozenModel
from prefill_router.decisions.log import PREFIX, merge, read_log
from prefill_router.locations import LocalPath

RECENT = 10_000  # decisions that a replica keeps in memory
RECENT_FEEDBACK = 100  # records of feedback that a replica keeps in memory of one decision
BATCH = 1_000  # records per write
Kind = Literal["decision", "answer", "feedback", "observed"]
logger = logging.getLogger("ray.serve")


def _redaction(path: str) -> Callable[[str], str | None]:
    """The function `MODULE:FUNCTION`. Raises ValueError if it cannot be imported."""
    try:
        found = TypeAdapter(ImportString[Any]).validate_python(path)
    except Exception as error:  # noqa: BLE001 - a module of the user
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"got {path!r}: {reason}; give MODULE:FUNCTION") from None
    if not callable(found):
        raise ValueError(f"got {path!r}, which is of type {type(found).__name__}; give a function")
    return cast(Callable[[str], str | None], found)


def _importable(path: str) -> str:
    _redaction(path)
    return path


class DecisionLogConfig(FrozenModel):
    """Where decisions are logged, and how much is kept."""

    folder: Annotated[
        LocalPath | None,
        Field(json_schema_extra={"written": True}, description="folder of the log; none: no log on disk"),
    ] = None
    prompts: Annotated[bool, Field(description="whether the routed text is logged")] = False
    redact: Annotated[
        Annotated[str, AfterValidator(_importable)] | None,
        Field(
            description="MODULE:FUNCTION that gets each prompt and returns the text to log, or none; none: "
            "prompts are logged as they are"
        ),
    ] = None
    file_bytes: Annotated[int, Field(ge=1, description="size from which a new file begins, in bytes")] = 64 * 2**20
    files: Annotated[int, Field(ge=2, description="number of files that a replica keeps; older ones are deleted")] = 100
    waiting: Annotated[int, Field(ge=1, description="maximum number of records that wait for the disk")] = 10_000

    @model_validator(mode="after")
    def _redacts_prompts(self) -> Self:
        if self.redact is not None and not self.prompts:
            raise ValueError("redact: got a function, but no prompts are logged; set prompts to true, or leave it out")
        return self


class DecisionLog:
    """The log of one replica. Methods return at once; `close` waits until everything is written."""

    def __init__(self, config: DecisionLogConfig) -> None:
        self._config = config
        self._redact = None if config.redact is None else _redaction(config.redact)
        self.lost = 0  # records that were not written
        self._silent_until = 0.0  # no error is logged before this monotonic time
        self._recent: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(config.waiting)
        self._name = f"{PREFIX}{uuid.uuid4().hex[:8]}"
        self._thread: threading.Thread | None = None
        if config.folder is not None:
            config.folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._write, name="decision-log", daemon=True)
            self._thread.start()

    def note(self, decision_id: str, kind: Kind, values: Mapping[str, Any]) -> None:
        """Logs a record of a decision."""
        record = {"decision_id": decision_id, "kind": kind, "time": time.time(), **values}
        if kind == "decision":
            self._recent[decision_id] = {"decision_id": decision_id}
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        own = self._recent.get(decision_id)
        if own is not None and len(own.get("feedback", ())) < RECENT_FEEDBACK:
            merge(own, {name: value for name, value in record.items() if name != "prompt"})
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lose(1, "too many records wait for the disk")

    def recent(self, decision_id: str) -> dict[str, Any] | None:
        """What this replica knows about one of its last decisions, without the prompt; None if it does not know it."""
        return self._recent.get(decision_id)

    def latest(self, count: int, key: str | None = None) -> list[dict[str, Any]]:
        """What this replica knows about its last `count` decisions, the newest first, without the prompts.

        `key`: name of the API key whose decisions are returned; None: all decisions.
        """
        newest = reversed(self._recent.values())
        return list(islice((one for one in newest if key is None or one["decision"].get("key") == key), count))

    def find(self, decision_id: str) -> dict[str, Any] | None:
        """What the files of all replicas say about a decision, without the prompt; None if nothing.

        Slow: it reads every file.
        """
        found: dict[str, Any] = {}
        for record in read_log(self._config.folder, decision_id) if self._config.folder is not None else ():
            if record["decision_id"] == decision_id:
                merge(found, {name: value for name, value in record.items() if name != "prompt"})
        return {"decision_id": decision_id, **found} if found else None

    def close(self) -> None:
        """Writes the waiting records and ends the thread."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _lose(self, count: int, reason: str) -> None:
        """Counts lost records and logs an error."""
        self.lost += count
        self._complain("decision log: %d records lost so far: %s", self.lost, reason)

    def _complain(self, message: str, *values: object) -> None:
        """Logs an error, at most once a minute."""
        if time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + 60
            logger.error(message, *values)

    def _write(self) -> None:
        number, ended = 0, False
        while not ended:
            records = [self._waiting.get()]
            while len(records) < BATCH and not self._waiting.empty():
                records.append(self._waiting.get())
            ended = None in records
            given = [record for record in records if record is not None]
            try:
                text = "".join(f"{json.dumps(self._redacted(record), default=str)}\n" for record in given)
                number = self._append(text, number) if given else number
            except (OSError, ValueError, RecursionError) as error:
                self._lose(len(given), str(error))
                number += 1  # the last line of the present file may be cut

    def _redacted(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with its redacted prompt; without a prompt if the function fails or returns no text."""
        if self._redact is None or record.get("prompt") is None:
            return record
        try:
            text = self._redact(record["prompt"])
            if text is not None and not isinstance(text, str):
                raise TypeError
        except Exception as error:  # noqa: BLE001 - a function of the user; its message may have the prompt
            text = None
            self._complain("decision log: a prompt was not logged: %s: %s", self._config.redact, type(error).__name__)
        return record | {"prompt": text}

    def _append(self, text: str, number: int) -> int:
        """Appends to file `number` of this replica, or to the next one if it is full; returns the number."""
        assert self._config.folder is not None
        path = self._path(number)
        if path.exists() and path.stat().st_size >= self._config.file_bytes:
            number += 1
            path = self._path(number)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._path(number - self._config.files).unlink(missing_ok=True)
        return number

    def _path(self, number: int) -> Path:
        assert self._config.folder is not None
        return self._config.folder / f"{self._name}-{number:06d}.jsonl"
