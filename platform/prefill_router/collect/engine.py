"""Times of an engine: time to first token and inter-token latency of streamed answers, for `self_hosted` in pool.yaml.

In: an OpenAI-compatible server, which may be the gateway, and prompts. Out: the two constants of the cost by GPU time
(docs/equations.md, Eq. 2). Requests run one after another, so a batch on the engine costs less per answer than these
constants say. Knows no benchmark.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from prefill_router.errors import InputError, UnavailableError
from prefill_router.pool import SelfHostedCost, TargetModel

IDLE_S = 300.0  # seconds without a byte after which a server counts as silent


@dataclass(frozen=True)
class Timing:
    """One streamed answer. `first_s`: seconds to the first token; `rest_s`: from the first token to the last."""

    input_tokens: int
    output_tokens: int
    first_s: float
    rest_s: float


def timed(model: TargetModel, prompts: Iterable[str], max_tokens: int) -> list[Timing]:
    """Times an answer of at most `max_tokens` tokens to each prompt. The first request, a warm-up, is not timed.

    Raises InputError for a model without an OpenAI-compatible endpoint or if the server does not report its tokens,
    UnavailableError if it does not answer.
    """
    endpoint = model.endpoint
    if endpoint is None or endpoint.base_url is None or endpoint.provider is not None:
        raise InputError(
            f"models: {model.name!r} needs an endpoint with base_url, an OpenAI-compatible server, to time it"
        )
    headers = {"Authorization": f"Bearer {os.environ.get(endpoint.api_key_env or '', 'none')}"}
    url, name = f"{endpoint.base_url.rstrip('/')}/chat/completions", endpoint.model or model.name
    timings = []
    with httpx.Client(timeout=IDLE_S, headers=headers) as client:
        for number, prompt in enumerate(prompts):
            body = {
                "model": name,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            timing = _answer(client, url, body)
            timings += [timing] if number else []
    if not timings:
        raise InputError(f"measure_engine: got {len(timings)} questions for {model.name!r}, at least 2 are needed")
    return timings


def constants(timings: Sequence[Timing], gpu_usd_per_hour: float) -> SelfHostedCost:
    """The constants with which the times of all answers together are those that were measured."""
    inputs = sum(one.input_tokens for one in timings)
    steps = sum(max(one.output_tokens - 1, 0) for one in timings)
    return SelfHostedCost(
        gpu_usd_per_hour=gpu_usd_per_hour,
        ttft_s_per_1k_tokens=1000 * sum(one.first_s for one in timings) / inputs,
        itl_s=sum(one.rest_s for one in timings) / max(steps, 1),
    )


def _answer(client: httpx.Client, url: str, body: dict[str, Any]) -> Timing:
    started = time.perf_counter()
    first = last = None
    usage: dict[str, Any] | None = None
    try:
        with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                reason = response.read().decode(errors="replace")[:200]
                raise UnavailableError(f"{url}: status {response.status_code}, {' '.join(reason.split())}")
            for line in response.iter_lines():
                if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                    continue
                chunk = json.loads(data)
                usage = chunk.get("usage") or usage
                if any(_has_token(choice) for choice in chunk.get("choices") or []):
                    last = time.perf_counter()
                    first = first or last
    except (httpx.HTTPError, ValueError) as error:
        raise UnavailableError(f"{url}: no complete answer ({type(error).__name__} {error})") from None
    if first is None or last is None:
        raise UnavailableError(f"{url}: the answer has no token")
    if usage is None:
        raise InputError(f"{url}: the server reports no usage of a stream, so its times cannot be related to tokens")
    return Timing(usage["prompt_tokens"], usage["completion_tokens"], first - started, last - first)


def _has_token(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls"))
