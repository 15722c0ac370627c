"""A checkpoint with its encoders in one process: prompts in, decisions out.

Every encoder is loaded by `load_encoder`, which refuses a fingerprint other than the checkpoint's. The public API and
the MLflow flavour use `LocalRouter`. Serving replicates encoders and routers separately: encoder replicas use
`load_encoder` and `encode_prompts`, router replicas use `LocalRouter.decide`. Knows nothing of HTTP, Ray and MLflow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.encoder import PrefillEncoder
from prefill_router.routing.eligibility import Requirements, check_capabilities
from prefill_router.routing.router import Decision, NoveltyFallback, Router

logger = logging.getLogger(__name__)


class Decisions(list[Decision]):
    """The decisions of a batch, in the order of its prompts."""

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row per prompt: `model`, `lam`, and the chosen model's `confidence`,
        `uncertainty`, `cost_usd` (USD), `expected_output_tokens` and `score`, and the decision's `novelty` and
        `reason`."""
        import pandas as pd

        of_chosen = ["confidence", "uncertainty", "cost_usd", "expected_output_tokens", "score"]
        rows = [
            {
                "model": decision.model,
                "lam": decision.lam,
                **{name: getattr(decision.chosen, name) for name in of_chosen},
                "novelty": decision.novelty,
                "reason": decision.reason,
            }
            for decision in self
        ]
        columns = ["model", "lam", *of_chosen, "novelty", "reason"]
        return pd.DataFrame(rows, columns=columns)


class LocalRouter:
    """A router with its encoders, which are loaded and checked at the first prompt.

    `configs` replaces the checkpoint's encoder configurations by fingerprint, for example to run an encoder on another
    device or backend. `fallback` sends novel queries to a fixed model; None: the score decides. Use it as a context
    manager, or call `close`, to release the encoders. Raises InputError for a fallback that `check_fallback` refuses.
    """

    def __init__(
        self,
        router: Router,
        configs: Mapping[str, EncoderConfig] | None = None,
        fallback: NoveltyFallback | None = None,
    ) -> None:
        if fallback is not None:
            router.check_fallback(fallback)
        self.router, self._fallback = router, fallback
        self._configs = {**router.encoders, **(configs or {})}
        self._encoders: dict[str, PrefillEncoder] = {}

    def __repr__(self) -> str:
        return f"LocalRouter(checkpoint={self.router.id!r}, models={list(self.models)})"

    def __enter__(self) -> LocalRouter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the target models, in the order of the pool."""
        return self.router.pool.names

    def load_encoders(self) -> None:
        """Loads the encoders that are not loaded. Raises InputError as `load_encoder` does."""
        for fingerprint in self.router.encoders:
            if fingerprint not in self._encoders:
                self._encoders[fingerprint] = load_encoder(fingerprint, self._configs[fingerprint])

    def route(
        self,
        prompt: str,
        lam: float | None = None,
        models: Sequence[str] | None = None,
        max_cost_usd: float | None = None,
        require: Sequence[str] = (),
        max_output_tokens: int | None = None,
    ) -> Decision:
        """The decision for one prompt; see `route_batch`."""
        return self.route_batch([prompt], lam, models, max_cost_usd, require, max_output_tokens)[0]

    def route_batch(
        self,
        prompts: Iterable[str],
        lam: float | None = None,
        models: Sequence[str] | None = None,
        max_cost_usd: float | None = None,
        require: Sequence[str] = (),
        max_output_tokens: int | None = None,
    ) -> Decisions:
        """The decision for every prompt, in order.

        `lam` in [0, 1]: 0 chooses the most confident model, 1 the cheapest; None is the checkpoint's own value.
        `models` restricts the choice to these names, `max_cost_usd` to models whose estimated cost of the query is at
        most this value, `require` to models that declare these capabilities (`tools`, `vision`, `json`). A model is
        left out if prompt and answer exceed its context window; the answer has `max_output_tokens`, or the model's
        median on the training queries. Raises InputError for a value out of bounds, an unknown model or capability, a
        prompt that cannot be encoded, or a query for which no model is left.
        """
        for name, strings in (("prompts", prompts), ("models", models), ("require", require)):
            if isinstance(strings, str):
                raise InputError(f"{name}: got the string {strings[:80]!r}, expected a list of strings")
        texts = list(prompts)
        if not texts:
            return Decisions()
        requirements = Requirements(
            None if models is None else tuple(models), check_capabilities(require), max_cost_usd, max_output_tokens
        )
        return self.decide(self.encode(texts), lam, requirements)

    def encode(self, prompts: Sequence[str]) -> dict[str, pa.Table]:
        """Activations rows of the prompts by encoder fingerprint. Raises InputError as `encode_prompts` does."""
        self.load_encoders()
        return {name: encode_prompts(encoder, prompts) for name, encoder in self._encoders.items()}

    def decide(
        self,
        rows: Mapping[str, pa.Table],
        lam: float | None = None,
        requirements: Requirements | None = None,
    ) -> Decisions:
        """As `route_batch`, from activations rows of the prompts by encoder fingerprint; no encoder is loaded."""
        return Decisions(self.router.decide(rows, lam, requirements, self._fallback))

    def close(self) -> None:
        """Releases the encoders. A later prompt reloads them."""
        for encoder in self._encoders.values():
            encoder.close()
        self._encoders.clear()


def load_encoder(fingerprint: str, config: EncoderConfig) -> PrefillEncoder:
    """Loads an encoder and checks its fingerprint.

    Raises InputError if its weights, tokenizer or settings give another fingerprint, or if it cannot be loaded.
    """
    from prefill_router.prefill import backends  # imports torch

    encoder = backends.load_encoder(config)
    if encoder.info.fingerprint != fingerprint:
        encoder.close()
        raise InputError(
            f"encoder: {config.model!r} has the fingerprint {encoder.info.fingerprint}, the checkpoint was trained on "
            f"{fingerprint}; its weights, tokenizer or settings differ: use the same encoder files, or repeat prefill "
            "and training"
        )
    logger.info("encoder %s, %s: %s", config.model, fingerprint, encoder.loaded)
    return encoder


def encode_prompts(encoder: PrefillEncoder, prompts: Sequence[str]) -> pa.Table:
    """Activations rows of the prompts, in order; `query_id` is the position.

    Raises InputError for a prompt that is not a string, or has half of a surrogate pair.
    """
    ids = [str(position) for position in range(len(prompts))]
    try:
        texts = pa.array(list(prompts), pa.string())
    except (pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise InputError(f"prompt: not Unicode text ({error}); give a string without unpaired surrogates") from None
    return encoder(pa.table({"query_id": pa.array(ids, pa.string()), "prompt": texts}))
