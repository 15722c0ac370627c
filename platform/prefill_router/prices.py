"""Prices of models in the data of the package genai-prices (the extra `prices`).

In: the name of a model, and its provider or the address of its server. Out: `ListPrice`, in USD per million tokens. The
data are those of the installed package, at today's date; nothing is downloaded. A name has to be an id or an alias in
the data: names that only resemble one have no price. Knows nothing of pools.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prefill_router.errors import InputError

if TYPE_CHECKING:
    from genai_prices.types import MatchLogic, ModelInfo, Provider
else:  # the package is optional, and is imported when a price is looked up
    MatchLogic = ModelInfo = Provider = Any

INSTALL = "pip install 'prefill-router[prices]'"
TOKENS = ("input_mtok", "output_mtok", "cache_read_mtok")
# Charges that depend neither on the input tokens nor on the output tokens alone.
OTHER_CHARGES = ("requests_kcount", "output_reasoning_mtok", "output_citation_mtok")
MAX_NAMED = 8  # names of models in an error


@dataclass(frozen=True)
class ListPrice:
    """Prices in USD per million tokens, and the entry of genai-prices with them, PROVIDER/MODEL.

    `cached_input` is None if the provider has no price of its own for cached input.
    """

    entry: str
    input: float
    output: float
    cached_input: float | None


def data_version() -> str:
    """The package with its version, such as `genai-prices 0.2.3`."""
    return f"genai-prices {version('genai-prices')}"


def list_price(
    name: str, *, priced_as: str | None = None, base_url: str | None = None, context_tokens: int | None = None
) -> ListPrice:
    """The price of the model `name`, at the provider of the address `base_url`; None: at any provider.

    `priced_as`, PROVIDER/MODEL, replaces both. `context_tokens` is the maximum of input and output tokens together.

    Raises InputError if genai-prices is not installed, lacks provider, server or model, or has different prices of
    several providers, and for a price that is not one per token: it rises with the length of the prompt within
    `context_tokens`, changes during the day, or is accompanied by other charges.
    """
    providers = _providers()
    if priced_as is not None:
        provider_id, _, name = priced_as.partition("/")
        sellers = [provider for provider in providers if provider.id == provider_id]
        if not sellers or not name:
            known = ", ".join(provider.id for provider in providers)
            raise InputError(f"priced_as: got {priced_as!r}, allowed is PROVIDER/MODEL with a provider of: {known}")
    elif base_url is not None:
        sellers = [provider for provider in providers if re.match(provider.api_pattern, base_url)]
        if not sellers:
            raise InputError(f"{data_version()} has no provider with the address {base_url}; set priced_as")
    else:
        sellers = providers
    exact, similar = _entries(name, sellers)
    if not exact:
        where = "" if sellers is providers else f" of {' or '.join(provider.id for provider in sellers)}"
        hint = f"; similar: {_listed(similar)}; if it is one of them, set priced_as to it" if similar else ""
        raise InputError(
            f"{data_version()} has no model {name!r}{where}{hint}; newer data: pip install --upgrade genai-prices"
        )
    now = datetime.now(UTC)
    prices = {entry: model.get_prices(now) for entry, model in exact.items()}
    per_token = {entry: tuple(getattr(price, key) for key in TOKENS) for entry, price in prices.items()}
    first, *others = per_token.values()
    if any(other != first for other in others):
        quotes = [f"{entry} ({_described(price)})" for entry, price in per_token.items()]
        raise InputError(f"the providers of {name!r} have different prices: {'; '.join(quotes)}; set priced_as to one")
    for entry, model in exact.items():
        if reason := _not_per_token(model, prices[entry], now, context_tokens):
            raise InputError(f"{entry} of {data_version()} {reason}")
    read, written, cached = (None if price is None else float(_base(price)) for price in first)
    if read is None or written is None:
        raise InputError(f"{' and '.join(exact)} of {data_version()} has no price of input and output tokens")
    return ListPrice(" and ".join(exact), read, written, cached)


def _providers() -> list[Provider]:
    try:
        from genai_prices.data import providers
    except ImportError:
        raise InputError(f"genai-prices, which has the prices of many models, is not installed: {INSTALL}") from None
    return providers


def _entries(name: str, sellers: list[Provider]) -> tuple[dict[str, ModelInfo], list[str]]:
    """The models called `name`, or PROVIDER/`name`, by their entries; and the entries that only resemble the name."""
    exact: dict[str, ModelInfo] = {}
    similar: list[str] = []
    for provider in sellers:
        for called in dict.fromkeys((name, name.removeprefix(f"{provider.id}/"))):
            model = provider.find_model(called)
            if model is None:
                continue
            if called.lower() in {model.id.lower()} | _aliases(model.match):
                exact[f"{provider.id}/{model.id}"] = model
            elif provider.find_model(model.id) is model:
                similar.append(f"{provider.id}/{model.id}")
    return exact, similar


def _aliases(match: MatchLogic) -> set[str]:
    """The names that a rule of genai-prices has in full, in lower case; other names match by a part or a pattern."""
    from genai_prices.types import ClauseEquals, ClauseOr

    if isinstance(match, ClauseEquals):
        return {match.equals.lower()}
    return set[str]().union(*map(_aliases, match.or_)) if isinstance(match, ClauseOr) else set()


def _not_per_token(model: ModelInfo, price: Any, now: datetime, context_tokens: int | None) -> str | None:
    """Why a price is not one per token; None if it is."""
    from genai_prices.types import TieredPrices, TimeOfDateConstraint

    charges = [key for key in OTHER_CHARGES if vars(price).get(key) is not None]
    if charges:
        return f"charges more than input and output tokens ({', '.join(charges)})"
    for conditional in reversed(model.prices if isinstance(model.prices, list) else []):  # the last one that holds
        if isinstance(conditional.constraint, TimeOfDateConstraint):
            return "changes its price during the day"
        if conditional.constraint is None or conditional.constraint.active(now):
            break
    tiered = [one for one in (getattr(price, key) for key in TOKENS) if isinstance(one, TieredPrices)]
    limit = min((tier.start for one in tiered for tier in one.tiers), default=None)
    if limit is not None and (context_tokens is None or context_tokens > limit):
        return f"has another price above {limit} input tokens; set context_tokens to {limit} or less"
    return None


def _base(price: Any) -> Any:
    """The price; of a tiered one that of short prompts."""
    return getattr(price, "base", price)


def _described(price: tuple[Any, ...]) -> str:
    named = zip(("input", "output", "cached input"), price, strict=True)
    return ", ".join(f"{name} {_base(one)}" for name, one in named if one is not None)


def _listed(entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_NAMED} more" if len(entries) > MAX_NAMED else ""
    return ", ".join(entries[:MAX_NAMED]) + more
