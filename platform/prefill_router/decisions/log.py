"""The records of a decision log, and decisions with their answers and feedback.

In: a folder of files `decisions-*.jsonl` (docs/data-formats.md). Out: its records, or one `Logged` per decision. A line
that was cut by a crash is skipped. Knows nothing of the server that writes the log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefill_router.errors import InputError

PREFIX = "decisions-"
LISTS = ("feedback", "observed")  # kinds of records that a decision may have several of


def merge(decision: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Adds a record to what is known about its decision.

    `decision` and `answer` occur once; `feedback`, and `observed`, the decisions of other arms, are lists.
    """
    values = {name: value for name, value in record.items() if name not in ("decision_id", "kind")}
    if record["kind"] in LISTS:
        decision.setdefault(record["kind"], []).append(values)
    else:
        decision[record["kind"]] = values
    own = decision.get("decision", {})
    if own.get("propensity", 1.0) is None:
        decision["decision"] = own | {"propensity": _propensity(own, decision.get("observed", ()))}


def _propensity(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> float | None:
    """The probability that the model of a decision was chosen: the shares of all arms that choose it.

    None until the decisions of all arms with a share are known.
    """
    shared = [other for other in others if other.get("share")]
    if own["share"] is None:  # the arm that was drawn did not decide
        return None
    known = own["share"] + sum(other["share"] for other in shared if other.get("model") is not None)
    if known < 1 - 1e-9:
        return None
    return round(own["share"] + sum(other["share"] for other in shared if other["model"] == own["model"]), 9)


def read_log(folder: Path, containing: str = "", since: float = 0.0) -> Iterator[dict[str, Any]]:
    """The records of all files in a folder, file by file; only those whose line contains `containing`.

    Lines that are not complete, files that did not change since `since` (Unix, s), and files that are deleted
    meanwhile, are skipped.
    """
    for path in sorted(folder.glob(f"{PREFIX}*.jsonl")):
        with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
            if os.fstat(file.fileno()).st_mtime < since:
                continue
            for line in file:
                if containing not in line:
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and {"decision_id", "kind"} <= record.keys():
                    yield record


def rated_model(decision_id: str, one: Mapping[str, Any]) -> str | None:
    """The model that feedback on a decision is about: the one that answered; None if nobody did or it is not known.

    Of a decision of /v1/route, whose client asks a model itself, it is the chosen model. Such a decision has no answer,
    and its id as its conversation.
    """
    if "answer" not in one and one["decision"].get("conversation") == decision_id:
        chosen: str | None = one["decision"].get("model")
        return chosen
    served: str | None = one.get("answer", {}).get("served")
    return served


def read_decisions(folder: Path) -> dict[str, dict[str, Any]]:
    """The decisions of a log by id, in the order of their times: `decision`, and `answer`, `feedback` and `observed`.

    Raises InputError if the folder holds no decision.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in read_log(folder):
        merge(found.setdefault(record["decision_id"], {}), record)
    for one in found.values():  # replicas write to files of their own
        one.get("feedback", []).sort(key=lambda record: record.get("time", 0.0))
    decisions = {name: one for name, one in found.items() if "decision" in one}
    if not decisions:
        raise InputError(f"log: {folder} holds no decision; give the folder of the server's option gateway.log.folder")
    return dict(sorted(decisions.items(), key=lambda item: item[1]["decision"].get("time", 0.0)))
