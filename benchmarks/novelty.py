"""Novelty of queries like and unlike the training queries, and its cost per decision.

Fits the default router on the outcomes, then reports the novelty of its test queries, of another benchmark's queries
(`other`), and of generated texts: Thai with and without blanks, German, chat requests, random characters, words and
digits, very short prompts. The generated texts depend on the seed only. No threshold is tuned on any of them.
"""

from __future__ import annotations

import statistics
import string
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field
from scipy.stats import kstest

from prefill_router.cli import main
from prefill_router.controller import encode_prompts, load_encoder
from prefill_router.files import write_json
from prefill_router.locations import Location
from prefill_router.outcomes.table import read_outcomes, unique_prompts
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.router import Router
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

THAI = [
    "การเรียนรู้ของเครื่อง",
    "เป็นสาขาหนึ่ง",
    "ของปัญญาประดิษฐ์",
    "ที่ให้คอมพิวเตอร์",
    "เรียนรู้จากข้อมูล",
    "โดยไม่ต้อง",
    "เขียนโปรแกรม",
    "อย่างชัดเจน",
]
GERMAN = (
    "Schreibe ein Gedicht über den Herbst in Berlin.",
    "Wie kocht man eine gute Kürbissuppe für vier Personen?",
    "Erkläre mir bitte die Mehrwertsteuer in Deutschland.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "Übersetze diesen Satz: Der Hund läuft schnell durch den Wald.",
)
CHAT = (
    "Write a poem about autumn in Boston.",
    "How do I cook a good pumpkin soup for four people?",
    "Please explain sales tax to me.",
    "Write a Python function that merges two dictionaries.",
    "Summarise this email: we meet on Monday at 9 to talk about the budget.",
)
SHORT = ("hi", "hello", "ok", "thanks!", "?", "1", "x" * 1_000, "x" * 900_000, "What is up?", "Tell me a joke")
ROUNDS = 200  # timed decisions per variant


class NoveltyConfig(SignalsConfig):
    """Inputs of the fit, and the outcomes of another benchmark."""

    other: Annotated[Location, Field(description="outcomes of another benchmark, a Parquet file")]
    fit: FitConfig = FitConfig()
    queries: Annotated[int, Field(ge=1, description="prompts per generated kind, and ten times as many of `other`")] = (
        100
    )
    seed: Annotated[int, Field(ge=0, description="seed of the generated texts and of the sample of `other`")] = 0


def generated(n: int, seed: int) -> dict[str, list[str]]:
    """`n` texts per kind; `very short prompts` has its fixed list."""
    rng = np.random.default_rng(seed)

    def characters(alphabet: str, low: int) -> list[str]:
        return ["".join(rng.choice(list(alphabet), rng.integers(low, 2_000))) for _ in range(n)]

    def words(vocabulary: tuple[str, ...] | list[str], low: int, high: int, gap: str = " ") -> list[str]:
        return [gap.join(rng.choice(vocabulary, rng.integers(low, high))) for _ in range(n)]

    letters = list(string.ascii_lowercase)
    invented = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5_000)]
    return {
        "Thai, with blanks": words(THAI, 3, 40),
        "Thai, without blanks": words(THAI, 8, 100, ""),
        "German requests": words(GERMAN, 1, 6),
        "English chat requests": words(CHAT, 1, 6),
        "random characters": characters(string.ascii_letters + string.digits + string.punctuation + " ", 20),
        "random words": words(invented, 5, 200),
        "hexadecimal": characters("0123456789abcdef", 101),
        "DNA": characters("ACGT", 101),
        "very short prompts": list(SHORT),
    }


def run(config: NoveltyConfig) -> str:
    """Measure novelty on queries like and unlike the training queries; write OUTPUT/novelty.json."""
    pool, signals = load_signals(config)
    split = split_signals(signals, config.fit.seed, config.fit.scheme)
    router = fit_router(signals, pool, split, config.fit, {}, progress=True).router
    assert router.novelty is not None
    encoders = {fingerprint: load_encoder(fingerprint, one) for fingerprint, one in router.encoders.items()}

    def novelty(prompts: list[str]) -> np.ndarray:
        rows = {fingerprint: encode_prompts(encoder, prompts) for fingerprint, encoder in encoders.items()}
        return np.array([decision.novelty for decision in router.decide(rows)])

    states = [signals.states(key, split.test) for key in router.layer_keys]
    usual = router.novelty(states, router.projections)
    texts = unique_prompts(read_outcomes(config.other)).column("prompt").to_pylist()
    order = np.random.default_rng(config.seed).permutation(len(texts))[: 10 * config.queries]
    kinds = {"other benchmark": [texts[at] for at in order], **generated(config.queries, config.seed)}
    figures = {"test queries": _figures(usual, usual)}
    figures["test queries"]["ks_p_value"] = float(kstest(usual, "uniform").pvalue)
    for name, prompts in kinds.items():
        figures[name] = _figures(novelty(prompts), usual)
    rows = {name: encode_prompts(encoder, [kinds["other benchmark"][0]]) for name, encoder in encoders.items()}
    cost = _cost(router, rows)
    write_json(
        config.output / "novelty.json", {"novelty": figures, "cost": cost, "queries": len(router.novelty.held_out)}
    )
    print(f"{'':24}{'queries':>8}{'median':>8}{'> 0.99':>8}{'> 0.999':>8}{'AUC':>8}")
    for name, one in figures.items():
        print(
            f"{name:24}{one['queries']:8,.0f}{one['median']:8.3f}{one['above_0.99']:8.3f}{one['above_0.999']:8.3f}"
            f"{one['auc']:8.3f}"
        )
    return (
        f"{cost['milliseconds']:.3f} ms of a decision of {cost['decision_milliseconds']:.3f} ms, "
        f"{cost['bytes']:,} bytes of the checkpoint; figures in {config.output / 'novelty.json'}"
    )


def _figures(novelty: np.ndarray, usual: np.ndarray) -> dict[str, float]:
    """Median, shares above the thresholds, and the AUC of novelty against the test queries."""
    labels = np.r_[np.zeros(len(usual)), np.ones(len(novelty))][:, None]
    return {
        "queries": len(novelty),
        "median": float(np.median(novelty)),
        "above_0.99": float((novelty > 0.99).mean()),
        "above_0.999": float((novelty > 0.999).mean()),
        "auc": float(auc_per_model(labels, np.r_[usual, novelty][:, None])[0]),
    }


def _cost(router: Router, rows: dict[str, pa.Table]) -> dict[str, float]:
    """Median milliseconds of a decision with novelty, and of the novelty in it; its bytes in the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name, one in (("with", router), ("without", replace(router, novelty=None))):
            save_checkpoint(one, Path(folder) / name)
            sizes[name] = (Path(folder) / name / "checkpoint.safetensors").stat().st_size
        loaded = {name: load_checkpoint(Path(folder) / name) for name in sizes}
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(ROUNDS):  # the variants alternate, so that a load peak affects both
        for name, one in loaded.items():
            started = time.perf_counter()
            one.decide(rows)
            seconds[name].append(time.perf_counter() - started)
    median = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {
        "decision_milliseconds": median["with"],
        "milliseconds": median["with"] - median["without"],
        "bytes": sizes["with"] - sizes["without"],
    }


if __name__ == "__main__":
    main(NoveltyConfig, run)
