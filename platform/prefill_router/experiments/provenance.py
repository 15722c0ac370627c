"""Provenance of an artefact: the code and the inputs that it was made from."""

from __future__ import annotations

from typing import Any

from prefill_router.outcomes.splits import Split
from prefill_router.signals.join import Signals
from prefill_router.version import code_version


def provenance(signals: Signals, split: Split | None = None) -> dict[str, Any]:
    """Code version, digests of the inputs, and identities of the encoders.

    With `split` also the digest of its test part and the number of queries in each part. All values are JSON.
    """
    record: dict[str, Any] = {
        "code_version": code_version(),
        "outcomes_digest": signals.outcomes.digest(),
        "activations_digest": signals.digest,
        "encoders": {
            fingerprint: dataset.encoder.model_dump(mode="json") for fingerprint, dataset in signals.activations.items()
        },
    }
    if split is not None:
        record["test_digest"] = signals.outcomes.take(split.test).digest()
        record["queries"] = {
            "train": len(split.train),
            "calibration": len(split.calibration),
            "test": len(split.test),
            "left_out": len(signals.left_out),
        }
    return record
