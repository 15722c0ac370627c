"""Traffic with a known shift, for `jobs.drift` on the decision log of a running server.

Sends `usual` queries of an outcomes table to POST /v1/route and rates each decision by the recorded label of the chosen
model. Then it sends `shifted` queries of another table, without feedback. Both are drawn at random, without queries
that have the id or the prompt of a training query.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import numpy as np
from pydantic import Field

from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, UnavailableError
from prefill_router.locations import LocalPath
from prefill_router.outcomes.table import load_outcomes
from prefill_router.pool import load_pool
from prefill_router.prefill.prompts import read_prompts
from prefill_router.progress import tqdm


class DriftServerConfig(FrozenModel):
    """The server, and the queries."""

    url: Annotated[str, Field(description="address of a server of `python -m serve` with a decision log")]
    trained: Annotated[LocalPath, Field(description="outcomes that the checkpoint was trained on, a Parquet file")]
    outcomes: Annotated[LocalPath, Field(description="outcomes with the usual queries, a Parquet file")]
    pool: Annotated[LocalPath, Field(description="the checkpoint's pool, a YAML file")]
    other: Annotated[LocalPath, Field(description="outcomes or prompts with the shifted queries, a Parquet file")]
    usual: Annotated[int, Field(ge=0, description="usual queries to send")] = 2_000
    shifted: Annotated[int, Field(ge=0, description="shifted queries to send afterwards")] = 500
    connections: Annotated[int, Field(ge=1, description="concurrent requests")] = 8
    seed: Annotated[int, Field(ge=0, description="seed of the draws")] = 0


def run(config: DriftServerConfig) -> str:
    """Send usual queries with feedback, then shifted queries, to a running server."""
    rng = np.random.default_rng(config.seed)
    pool = load_pool(config.pool)
    outcomes, trained = load_outcomes(config.outcomes, pool), load_outcomes(config.trained, pool)
    ids, prompts = set(trained.query_ids), set(trained.prompts)
    queries = zip(outcomes.query_ids, outcomes.prompts, strict=True)
    unseen = [row for row, (query_id, prompt) in enumerate(queries) if query_id not in ids and prompt not in prompts]
    others = sorted(set(read_prompts(config.other).column("prompt").to_pylist()) - prompts)
    for field, wanted, present in (("usual", config.usual, len(unseen)), ("shifted", config.shifted, len(others))):
        if wanted > present:
            raise InputError(f"{field}: got {wanted}, but there are {present} queries; choose at most {present}")
    rated = {name: column for column, name in enumerate(outcomes.models)}
    timeout, limits = httpx.Timeout(120), httpx.Limits(max_connections=config.connections)
    with (
        httpx.Client(base_url=config.url, timeout=timeout, limits=limits) as client,
        ThreadPoolExecutor(config.connections) as threads,
    ):

        def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            try:
                reply = client.post(path, json=body).raise_for_status()
            except httpx.HTTPError as error:
                raise UnavailableError(f"url: {config.url}: {error}; start the server, or give its address") from None
            found: dict[str, Any] = reply.json()
            return found

        def decide(prompt: str) -> dict[str, Any]:
            return post("/v1/route", {"prompt": prompt})

        def decide_and_rate(row: int) -> bool:
            found = decide(outcomes.prompts[row])
            score = outcomes.correct[row, rated[found["model"]]]
            if np.isnan(score):
                return False
            post("/v1/feedback", {"decision_id": found["decision_id"], "score": float(score)})
            return True

        started = time.monotonic()
        usual = rng.permutation(unseen)[: config.usual]
        feedbacks = sum(tqdm(threads.map(decide_and_rate, usual), total=len(usual), desc="usual"))
        changed = time.time()
        shifted = [others[row] for row in rng.permutation(len(others))[: config.shifted]]
        list(tqdm(threads.map(decide, shifted), total=len(shifted), desc="shifted"))
        rate = (len(usual) + len(shifted)) / (time.monotonic() - started)
    return (
        f"{len(usual):,} usual queries with {feedbacks:,} feedbacks, then {len(shifted):,} shifted queries from Unix "
        f"time {changed:.0f} on; {rate:.1f} queries/s"
    )


if __name__ == "__main__":
    main(DriftServerConfig, run)
