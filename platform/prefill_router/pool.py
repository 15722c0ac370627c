"""The pool: target models with their prices, limits and endpoints (pool.yaml).

In: a YAML file. Out: an immutable `Pool`. Its order is the order of every model axis. Prices are in USD per million
tokens, times in seconds. Prices that the file does not give are those of genai-prices. Knows nothing of outcomes or
routing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from prefill_router.config import FrozenModel, renamed_fields
from prefill_router.errors import InputError
from prefill_router.files import read_yaml, write_atomically
from prefill_router.locations import location
from prefill_router.prices import data_version, list_price

logger = logging.getLogger(__name__)
PRICES = ("input_usd_per_mtok", "output_usd_per_mtok")
_NEEDS = f"needs {PRICES[0]} and {PRICES[1]}, or self_hosted"
_FROM_FILE = {"prices_follow": True}  # validation context of a pool whose missing prices are filled next

Price = Annotated[float, Field(ge=0, allow_inf_nan=False, description="USD per million tokens")]
Capability = Literal["tools", "vision", "json"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, description="seconds")]


class SelfHostedCost(FrozenModel):
    """Cost of a self-hosted model by GPU time (docs/equations.md, Eq. 2)."""

    gpu_usd_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False, description="price of the GPUs, USD per hour")]
    ttft_s_per_1k_tokens: Annotated[Seconds, Field(description="time to first token, seconds per 1,000 input tokens")]
    itl_s: Annotated[Seconds, Field(description="inter-token latency, seconds per output token")]


class Endpoint(FrozenModel):
    """The server of a target model: an OpenAI-compatible one, or that of a provider with an API of its own."""

    base_url: Annotated[
        str | None,
        Field(
            description="base URL of the API, such as https://api.example.com/v1; none: the address of `provider`",
        ),
    ] = None
    provider: Annotated[
        str | None,
        Field(description="provider of the API, by its name in any-llm-sdk, such as anthropic; none: OpenAI's API"),
    ] = None
    model: Annotated[str | None, Field(description="model name on the server; none: the name in the pool")] = None
    reasoning_effort: Annotated[
        Effort | None,
        Field(
            description="reasoning effort that requests ask for, unless they give one themselves; none: the server's "
            "default. Models with several efforts are several models of the pool, such as gpt-5@low and gpt-5@high"
        ),
    ] = None
    api_key_env: Annotated[
        str | None,
        Field(
            description="name of the environment variable with the API key; none: no key, or that of `provider`'s own "
            "variable"
        ),
    ] = None

    @model_validator(mode="after")
    def _addressed(self) -> Endpoint:
        if self.base_url is None and self.provider is None:
            raise ValueError("base_url: got none; give the base URL of an OpenAI-compatible API, or a provider")
        return self


class TargetModel(FrozenModel):
    """One target model. With `self_hosted` its cost is that of GPU time, and the token prices are optional.

    In a file the token prices are optional also if genai-prices has them (`load_pool`).

    Files may also name the field `self_hosted` by its old name `engine`.
    """

    name: Annotated[str, Field(min_length=1, description="name of the model, as in the outcomes")]
    input_usd_per_mtok: Annotated[Price | None, Field(description="price of input, USD per million tokens")] = None
    output_usd_per_mtok: Annotated[Price | None, Field(description="price of output, USD per million tokens")] = None
    cached_input_usd_per_mtok: Annotated[
        Price | None,
        Field(description="price of input that the server reads from its prompt cache; none: the price of input"),
    ] = None
    priced_as: Annotated[
        str | None,
        Field(
            description="PROVIDER/MODEL in genai-prices, for prices that are not given; none: the model name on the "
            "server at the provider of the endpoint or of its address, or without an endpoint the name in the pool"
        ),
    ] = None
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
    fallback_only: Annotated[
        bool,
        Field(description="never chosen by score: the model answers if it is asked by name, or if no other model can"),
    ] = False

    _old_name = renamed_fields(engine="self_hosted")

    @model_validator(mode="after")
    def _priced(self, info: Any) -> TargetModel:  # pydantic's ValidationInfo, which beartype cannot check
        if self.missing_prices and not (info.context or {}).get("prices_follow", False):
            raise ValueError(f"{', '.join(PRICES)}: model {self.name!r} {_NEEDS}")
        return self

    @property
    def missing_prices(self) -> tuple[str, ...]:
        """The fields of token prices that the cost of the model needs and that are None."""
        return () if self.self_hosted is not None else tuple(name for name in PRICES if getattr(self, name) is None)


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
    """Reads pool.yaml, and fills the token prices that it does not give with those of genai-prices.

    A warning names the prices that were filled. Raises InputError with file, field and value, and for a model without
    a price in either.
    """
    pool = read_yaml(location(path), Pool, _FROM_FILE)
    models, sources, faults = list[TargetModel](), list[str](), list[str]()
    for index, model in enumerate(pool.models):
        prices: dict[str, float] = {}
        if model.missing_prices:
            try:
                entry, prices = _list_prices(model)
            except InputError as error:
                faults.append(f"models.{index}: model {model.name!r} {_NEEDS}; {error}")
            else:
                named = ", ".join(f"{name} {price:g}" for name, price in prices.items())
                sources.append(f"{model.name} as {entry} ({named})")
        models.append(model.model_copy(update=prices))
    if faults:
        raise InputError(f"{path}: {'; '.join(faults)}")
    if not sources:
        return pool
    # A warning, because jobs do not show lower levels.
    logger.warning("%s: prices of %s: %s", path, data_version(), "; ".join(sources))
    return Pool(models=tuple(models))


def _list_prices(model: TargetModel) -> tuple[str, dict[str, float]]:
    """The entry of genai-prices, and the fields that are missing with its prices.

    The price of cached input is filled only together with that of input, and not if the file has it, even as null.
    """
    name, base_url, priced_as = model.name, None, model.priced_as
    if model.endpoint is not None:
        name, base_url = model.endpoint.model or name, model.endpoint.base_url
        if priced_as is None and model.endpoint.provider is not None:
            priced_as = f"{model.endpoint.provider}/{name}"
    found = list_price(name, priced_as=priced_as, base_url=base_url, context_tokens=model.context_tokens)
    prices = dict(zip(PRICES, (found.input, found.output), strict=True))
    filled = {field: prices[field] for field in model.missing_prices}
    cached = "cached_input_usd_per_mtok"
    if PRICES[0] in filled and found.cached_input is not None and cached not in model.model_fields_set:
        filled[cached] = found.cached_input
    return found.entry, filled


def save_pool(pool: Pool, path: Path) -> None:
    """Writes pool.yaml atomically, without unset fields."""
    text = yaml.safe_dump(pool.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
