"""onboard.html: the page on a model that was added to a router.

In: the record of the onboarding, held-out predictions and the curve. Out: one self-contained HTML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from prefill_router.experiments.onboarding import Curve, HeldOut
from prefill_router.locations import location
from prefill_router.reports.html import write_page
from prefill_router.reports.plots_curves import reliability
from prefill_router.reports.plots_onboarding import brier_curve

TEMPLATE = "onboard.html.j2"
HALF, NARROW = (620, 360), (350, 300)  # pixels
FARTHER = (2, 5, 10)  # times the number of labels, in the table of the curve
PROVENANCE = ("from", "checkpoint", "outcomes_digest", "activations_digest", "code_version", "seed", "bags")


def write_onboarding_page(
    folder: Path,
    record: Mapping[str, Any],
    found: HeldOut,
    correct: Float[np.ndarray, " queries"],
    curve: Curve | None,
) -> Path:
    """Writes FOLDER/onboard.html atomically and returns its path. `record` is the content of onboard.json."""
    labels = len(correct)
    evidence = record["log_evidence"]
    return write_page(
        location(folder) / "onboard.html",
        TEMPLATE,
        record=record,
        figures=record["held_out"],
        rate=float(correct.mean()),
        heads=[(name, value, value - max(evidence.values())) for name, value in evidence.items()],
        reliability=Markup(reliability(found.p, correct, "head")),
        plots=None if curve is None else [Markup(brier_curve(curve, labels, size)) for size in (HALF, NARROW)],
        points=[] if curve is None else curve.points,
        farther=[]
        if curve is None
        else [(times * labels, float(curve.brier(np.array([float(times * labels)]))[0])) for times in FARTHER],
        curve=curve,
        provenance={name: record[name] for name in PROVENANCE},
    )
