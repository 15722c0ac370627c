"""The pool: target models with their prices, limits and endpoints (pool.yaml).

In: a YAML file. Out: an immutable `Pool`. Its order is the order of every model axis. Prices are in USD per million
tokens, times in seconds. Knows nothing of outcomes or routing.
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
from prefill_router.locations import location

Price = Annotated[float, Field(ge=0, allow_inf_nan=False, description="USD per million tokens")]
Capability = Literal["tools", "vision", "json"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, description="seconds")]


class SelfHostedCost(FrozenModel):
    """Cost of a self-hosted model by GPU time (docs/equations.md, Eq. 2)."""

    gpu_usd_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False, description="price of the GPUs, USD per hour")]
    ttft_s_per_1k_tokens: Annotated[Seconds, Field(description="time to first token, seconds per 1,000 input tokens")]
    itl_s: Annotated[Seconds, Field(description="inter-token latency, seconds per output token")]


class Endpoint(FrozenModel):
    """The OpenAI-compatible server of a target model."""

    base_url: Annotated[str, Field(description="base URL of the API, such as https://api.example.com/v1")]
    model: Annotated[str | None, Field(description="model name on the server; none: the name in the pool")] = None
    api_key_env: Annotated[
        str | None, Field(description="name of the environment variable with the API key; none: no key")
    ] = None


class TargetModel(FrozenModel):
    """One target model. With `self_hosted` its cost is that of GPU time, and the token prices are optional.

    Files may also name the field `self_hosted` by its old name `engine`.
    """

    name: Annotated[str, Field(min_length=1, description="name of the model, as in the outcomes")]
    input_usd_per_mtok: Annotated[Price | None, Field(description="price of input, USD per million tokens")] = None
    output_usd_per_mtok: Annotated[Price | None, Field(description="price of output, USD per million tokens")] = None
    context_tokens: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Field(description="context window: maximum tokens of prompt and answer together; none: no limit"),
    ] = None
    capabilities: Annotated[
        tuple[Capability, ...],
        Field(
            description="features that the model supports: tools (tool calls), vision (images), json (JSON schema); "
            "requests that use a feature go to models that declare it"
        ),
    ] = ()
    endpoint: Annotated[Endpoint | None, Field(description="server of the model; none: not declared")] = None
    self_hosted: Annotated[
        SelfHostedCost | None, Field(description="cost by GPU time instead of token prices; none: token prices")
    ] = None

    _old_name = renamed_fields(engine="self_hosted")

    @model_validator(mode="after")
    def _priced(self) -> TargetModel:
        if self.self_hosted is None and (self.input_usd_per_mtok is None or self.output_usd_per_mtok is None):
            raise ValueError(
                f"input_usd_per_mtok, output_usd_per_mtok: model {self.name!r} needs input_usd_per_mtok and "
                "output_usd_per_mtok, or self_hosted"
            )
        return self


class Pool(FrozenModel):
    """The target models in the order of every model axis."""

    models: Annotated[tuple[TargetModel, ...], Field(min_length=1, description="the target models; names are unique")]

    @model_validator(mode="after")
    def _unique(self) -> Pool:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: each name is allowed once, got more than one entry for {', '.join(twice)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models in pool order."""
        return tuple(model.name for model in self.models)

    def indices(self, names: Sequence[str]) -> list[int]:
        """Positions of `names` on the model axis. Raises InputError for an unknown name."""
        known = {name: index for index, name in enumerate(self.names)}
        for name in names:
            if name not in known:
                raise InputError(f"models: {name!r} is not in the pool; known: {', '.join(known)}")
        return [known[name] for name in names]


def load_pool(path: Path | str) -> Pool:
    """Reads pool.yaml. Raises InputError with file, field and value."""
    return read_yaml(location(path), Pool)


def save_pool(pool: Pool, path: Path) -> None:
    """Writes pool.yaml atomically, without unset fields."""
    text = yaml.safe_dump(pool.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
