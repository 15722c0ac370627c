"""Models of the pool as models of inspect_ai.

In: a `TargetModel` with an endpoint. Out: a model that inspect_ai asks. Servers that speak OpenAI's API are asked for a
stream, so that a server that falls silent is noticed.
"""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from inspect_ai.model import GenerateConfig, Model, get_model

from prefill_router.collect.plan import endpoint_of
from prefill_router.errors import InputError
from prefill_router.pool import TargetModel

SERVICE = "pool"  # name of OpenAI-compatible servers in inspect_ai
PROVIDERS = {"gemini": "google", "xai": "grok"}  # names in any-llm-sdk that inspect_ai calls otherwise


@dataclass(frozen=True)
class Settings:
    """How models are asked. `max_tokens` per answer; `attempts` per question; `idle_s` without a token ends one."""

    max_tokens: int = 128_000
    effort: str | None = "high"
    temperature: float | None = None
    attempts: int = 8
    idle_s: int = 600
    judge: TargetModel | None = None


def model_of(model: TargetModel, settings: Settings) -> Model:
    """A model of the pool as one of inspect_ai. Raises InputError for an unset API key and an unknown provider."""
    endpoint = endpoint_of(model)
    key = None
    if (variable := endpoint.api_key_env) is not None and (key := os.environ.get(variable)) is None:
        raise InputError(
            f"api_key_env: the environment variable {variable} of model {model.name!r} is not set; export it"
        )
    arguments = dict[str, Any]()
    if endpoint.provider is None:
        provider = f"openai-api/{SERVICE}"
        arguments = {"stream": True, "max_retries": 0}  # inspect_ai retries
        key = key or "none"  # the client insists on a key, a server without keys ignores it
    else:
        provider = PROVIDERS.get(endpoint.provider, endpoint.provider)
    config = GenerateConfig(reasoning_effort=effort_of(model, settings))
    name = f"{provider}/{server_name(model)}"
    try:
        with redirect_stdout(StringIO()):  # the first call prints a banner
            return get_model(name, config=config, base_url=endpoint.base_url, api_key=key, memoize=False, **arguments)
    except Exception as error:  # noqa: BLE001  inspect_ai raises errors of its own, and of the packages of providers
        raise InputError(f"models: {model.name!r} cannot be asked: {' '.join(str(error).split())[:300]}") from None


def server_name(model: TargetModel) -> str:
    """The name of the model on its server."""
    return endpoint_of(model).model or model.name


def effort_of(model: TargetModel, settings: Settings) -> Any:
    """The reasoning effort that the model is asked for; None: the server's default."""
    return endpoint_of(model).reasoning_effort or settings.effort
