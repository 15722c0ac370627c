"""Prefill Router: choose, for every query, the model that will answer it, from an encoder's prefill states.

    import prefill_router as pr

    router = pr.load("models:/prefill-router@champion")  # or a checkpoint folder
    router.route("Why is the sky blue?", lam=0.3).model

Public names are imported on first use: importing this package loads neither torch, Ray nor MLflow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded before the function `prefill` is defined: a later import of the package of that name does not replace it.
import prefill_router.prefill  # noqa: F401
from prefill_router.version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    from prefill_router.controller import Decisions, LocalRouter
    from prefill_router.errors import InputError
    from prefill_router.outcomes.sample import load_sample
    from prefill_router.outcomes.table import Outcomes
    from prefill_router.pool import Pool, load_pool
    from prefill_router.prefill.config import EncoderConfig
    from prefill_router.prefill.dataset import Activations, read_activations
    from prefill_router.routing.config import FitConfig
    from prefill_router.routing.eligibility import Excluded
    from prefill_router.routing.fit import FittedRouter
    from prefill_router.routing.router import Candidate, Decision, NoveltyFallback
    from prefill_router.routing.trunk import TrunkConfig
    from prefill_router.signals.join import Signals, join
    from prefill_router.workflows.evaluate import Evaluation, EvaluationOptions, evaluate
    from prefill_router.workflows.train import fit

_MODULES = {
    "Activations": "prefill.dataset",
    "Candidate": "routing.router",
    "Decision": "routing.router",
    "Decisions": "controller",
    "EncoderConfig": "prefill.config",
    "Evaluation": "workflows.evaluate",
    "EvaluationOptions": "workflows.evaluate",
    "Excluded": "routing.eligibility",
    "FitConfig": "routing.fit",
    "FittedRouter": "routing.fit",
    "InputError": "errors",
    "LocalRouter": "controller",
    "NoveltyFallback": "routing.router",
    "Outcomes": "outcomes.table",
    "Pool": "pool",
    "Signals": "signals.join",
    "TrunkConfig": "routing.trunk",
    "evaluate": "workflows.evaluate",
    "fit": "workflows.train",
    "join": "signals.join",
    "load_pool": "pool",
    "load_sample": "outcomes.sample",
    "read_activations": "prefill.dataset",
}

__all__ = [
    "Activations",
    "Candidate",
    "Decision",
    "Decisions",
    "EncoderConfig",
    "Evaluation",
    "EvaluationOptions",
    "Excluded",
    "FitConfig",
    "FittedRouter",
    "InputError",
    "LocalRouter",
    "NoveltyFallback",
    "Outcomes",
    "Pool",
    "Signals",
    "TrunkConfig",
    "evaluate",
    "fit",
    "join",
    "load",
    "load_pool",
    "load_sample",
    "prefill",
    "read_activations",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    where: str | Path, encoders: dict[str, EncoderConfig] | None = None, fallback: NoveltyFallback | None = None
) -> LocalRouter:
    """Loads a router. Its encoders are loaded at the first prompt, and their fingerprints are checked.

    `where` is a checkpoint folder, `models:/prefill-router@ALIAS` or `models:/prefill-router/VERSION`. `encoders`
    replaces configurations of the checkpoint's encoders by fingerprint. `fallback` sends novel queries to a fixed
    model. Raises InputError for a missing, damaged or unknown checkpoint, or a fallback that does not fit it.
    """
    from prefill_router.controller import LocalRouter
    from prefill_router.registry import resolve
    from prefill_router.routing.checkpoint import load_checkpoint

    return LocalRouter(load_checkpoint(resolve(str(where))), encoders, fallback)


def prefill(
    outcomes: Outcomes, encoder: str | EncoderConfig = "smollm2", *, to: str | Path, progress: bool = False
) -> Activations:
    """Reads the prompts of the outcomes with an encoder in this process and writes the activations dataset `to`.

    `encoder` is a configuration, or the name, path or hub id of a model. Prompts that `to` already holds are not read
    again. Raises InputError if the encoder cannot be loaded or `to` holds anything else.
    """
    import pyarrow as pa

    from prefill_router.locations import location
    from prefill_router.prefill.config import EncoderConfig
    from prefill_router.prefill.local import prefill_prompts

    config = EncoderConfig(model=encoder) if isinstance(encoder, str) else encoder
    prompts = pa.table(
        {"query_id": pa.array(outcomes.query_ids, pa.string()), "prompt": pa.array(outcomes.prompts, pa.string())}
    )
    return prefill_prompts(prompts, config, location(to), "prefill" if progress else None)
