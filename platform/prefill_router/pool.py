"""The pool: target models, their prices, limits and endpoints (pool.yaml).

In: a YAML file. Out: an immutable `Pool`; its order is the model axis everywhere. Prices are USD per million
tokens, times are seconds. Knows nothing of outcomes or routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from prefill_router.config import FrozenModel, renamed_fields
from prefill_router.errors import InputError
from prefill_router.files import read_yaml, write_atomically

Price = Annotated[float, Field(ge=0, allow_inf_nan=False, description="USD per million tokens")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, description="seconds")]


class SelfHostedCost(FrozenModel):
    """Cost of a self-hosted model, paid by GPU time (docs/equations.md, Eq. 2)."""

    gpu_usd_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False, description="USD per hour")]
    ttft_s_per_1k_tokens: Annotated[Seconds, Field(description="time to first token, s per 1,000 input tokens")]
    itl_s: Annotated[Seconds, Field(description="inter-token latency, seconds per output token")]


class Endpoint(FrozenModel):
    """Where the model answers: an OpenAI-compatible server. The key is read from the named variable."""

    base_url: str
    model: str | None = None
    api_key_env: str | None = None


class TargetModel(FrozenModel):
    """One target model. With `self_hosted`, its cost follows GPU time and the token prices are optional.

    Files may spell `self_hosted` as `engine`, its name before format 2.
    """

    name: Annotated[str, Field(min_length=1)]
    input_usd_per_mtok: Price | None = None
    output_usd_per_mtok: Price | None = None
    context_tokens: Annotated[int, Field(gt=0)] | None = None
    capabilities: tuple[Literal["tools", "vision", "json"], ...] = ()
    endpoint: Endpoint | None = None
    self_hosted: SelfHostedCost | None = None

    _old_name = renamed_fields(engine="self_hosted")

    @model_validator(mode="after")
    def _priced(self) -> TargetModel:
        if self.self_hosted is None and (self.input_usd_per_mtok is None or self.output_usd_per_mtok is None):
            raise ValueError(f"model {self.name!r} needs input_usd_per_mtok and output_usd_per_mtok, or self_hosted")
        return self


class Pool(FrozenModel):
    """The target models in their fixed order."""

    models: Annotated[tuple[TargetModel, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique(self) -> Pool:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each model may stand once, these stand twice: {', '.join(twice)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    def indices(self, names: Sequence[str]) -> list[int]:
        """Positions of `names` on the model axis. Raises InputError naming an unknown model and the known ones."""
        known = {name: index for index, name in enumerate(self.names)}
        for name in names:
            if name not in known:
                raise InputError(f"models: {name!r} is not in the pool; known: {', '.join(known)}")
        return [known[name] for name in names]


def load_pool(path: Path | str) -> Pool:
    """Reads pool.yaml. Raises InputError naming file, field and value."""
    return read_yaml(Path(path), Pool)


def save_pool(pool: Pool, path: Path) -> None:
    """Writes pool.yaml atomically; unset fields are left out."""
    text = yaml.safe_dump(pool.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
