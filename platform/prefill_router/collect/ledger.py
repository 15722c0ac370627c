"""The spending of a collection: one line of JSON per paid answer, and the budget.

In: charges in USD. Out: a file that a killed process leaves readable, and whether another question may be asked. Knows
neither models nor benchmarks.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.pool import TargetModel

CHARACTERS_PER_TOKEN = 4  # of estimates for servers that report no usage
ESTIMATED = f"{CHARACTERS_PER_TOKEN} characters per token"


@dataclass(frozen=True)
class Charge:
    """One paid answer: of `asked`, a model that `model` was compared with or a judge, in USD and tokens.

    `usd` is None if the model has no known price. `estimated`: the server reported no tokens.
    """

    benchmark: str
    model: str
    asked: str
    usd: float | None
    input_tokens: int
    output_tokens: int
    estimated: bool = False


class Ledger:
    """The charges of a collection in `path`, and its budget in USD; None: no limit.

    Every charge is appended with one write, so a killed process loses at most the charges that it had not yet received.
    One process writes to a file.
    """

    def __init__(self, path: Path, budget_usd: float | None = None) -> None:
        self.path, self.budget_usd = path, budget_usd
        self.usd, self.answers, self.unpriced = 0.0, 0, set[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        intact = 0
        if path.exists():
            content = path.read_bytes()
            for line in content.splitlines(keepends=True):
                if not line.endswith(b"\n"):  # cut off by the end of the process
                    break
                self._count(_charge(line, path))
                intact += len(line)
            if intact < len(content):
                os.truncate(path, intact)
        self._file = path.open("ab", buffering=0)

    def admits(self) -> bool:
        """Whether another question may be asked: the charges are below the budget."""
        return self.budget_usd is None or self.usd < self.budget_usd

    def add(self, charge: Charge) -> None:
        """Records a charge."""
        self._file.write(json.dumps(asdict(charge), ensure_ascii=False).encode() + b"\n")
        self._count(charge)

    def _count(self, charge: Charge) -> None:
        self.answers += 1
        if charge.usd is None:
            self.unpriced.add(charge.asked)
        else:
            self.usd += charge.usd


def answer_usd(model: TargetModel, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
    """Cost of an answer in USD (docs/equations.md, Eq. 2). A prompt cache had `cached_tokens` of the input."""
    if (engine := model.self_hosted) is not None:
        seconds = engine.ttft_s_per_1k_tokens * input_tokens / 1000 + engine.itl_s * output_tokens
        return engine.gpu_usd_per_hour / 3600 * seconds
    price = model.input_usd_per_mtok or 0.0
    cached = price if model.cached_input_usd_per_mtok is None else model.cached_input_usd_per_mtok
    written = output_tokens * (model.output_usd_per_mtok or 0.0)
    return ((input_tokens - cached_tokens) * price + cached_tokens * cached + written) / 1e6


def estimated_tokens(text: str) -> int:
    """Number of tokens of a text, estimated from its length."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _charge(line: bytes, path: Path) -> Charge:
    try:
        return Charge(**json.loads(line))
    except (ValueError, TypeError):
        raise InputError(
            f"{path}: not a line of charges: {line[:60]!r}; move the file away to count from zero"
        ) from None
