"""The outcomes of a collection, from its logs.

In: the pairs and the folder of a collection. Out: answers, priced with the pool, and what is missing. Knows no server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefill_router.collect.ledger import ESTIMATED, answer_usd, estimated_tokens
from prefill_router.collect.plan import Benchmark, Pair
from prefill_router.importing import inspect_logs
from prefill_router.importing.answers import Answer


@dataclass
class Collected:
    """The answers of a collection to the questions `keys`, (id, epoch) by benchmark; iterate over them once.

    `given`: number of answers. `failed`: questions without an answer, by their last error.
    """

    pairs: Sequence[Pair]
    folder: Path
    keys: Mapping[str, set[tuple[str, int]]]
    given: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def answers(self) -> Iterator[Answer]:
        """One answer per (benchmark, model, question, epoch). Tokens that a server did not report are estimated."""
        for pair in self.pairs:
            errors: dict[tuple[str, int], str] = {}
            given = set[tuple[str, int]]()
            benchmark, model = pair.benchmark.label, pair.model
            for log in inspect_logs.intact_logs(self.folder / "logs" / pair.place):
                for sample in log.samples or []:
                    key = (str(sample.id), sample.epoch)
                    if key in given or key not in self.keys[benchmark]:
                        continue
                    place = f"{log.location}, sample {sample.id}"
                    one = inspect_logs.answer_of(sample, log.eval.model, model.name, benchmark, None, place)
                    if one.error is not None:
                        errors[key] = one.error
                        continue
                    given.add(key)
                    self.given += 1
                    one = one.estimated(estimated_tokens, ESTIMATED)
                    usd = answer_usd(model, one.input_tokens or 0, one.output_tokens or 0)
                    yield replace(one, cost_usd=usd, benchmark=_benchmark(pair.benchmark, sample.metadata or {}))
            # The end of a message of inspect_ai is the server's answer, its beginning the request.
            self.failed.update(
                f"{model.name}: {' '.join(error.split())[-120:]}" for key, error in errors.items() if key not in given
            )


def _benchmark(benchmark: Benchmark, metadata: Mapping[str, Any]) -> str:
    """The benchmark of a question in a file, if it has one of its own; otherwise that of the collection."""
    if benchmark.questions is None or metadata.get("benchmark") == benchmark.questions.stem:
        return benchmark.label
    return str(metadata.get("benchmark") or benchmark.label)
