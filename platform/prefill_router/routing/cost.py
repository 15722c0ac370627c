"""Estimated cost of a query on each target model, in USD (paper Eq. 2), and its normalisation (Eq. 4).

In: the prices of the pool and the token counts of the training split. Out: `CostModel`. The output length of a model is
its median on the training split unless the caller gives expected output tokens; answers to test queries are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool

# Maximum of a prompt's UTF-8 bytes per token. The models of MMLU-Pro, ZeroEval and KOR-Bench recorded at most 6.5 bytes
# per token on 460,000 prompts. A count below this bound is wrong: an encoder may read a long text as one unknown token.
MAX_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class CostModel:
    """Cost of a query on each model: `fixed` (USD) + `per_input_token` (USD per token) x input tokens.

    With expected output tokens of the query, these times `per_output_token` (USD per token) replace `fixed`, the cost
    of `median_output` tokens. `token_ratio` is the mean ratio of a model's input tokens to the encoder's token
    count; it estimates input tokens that are not recorded, as in serving. `c_min` and `c_max` (USD) are the extremes
    over training queries and models.
    """

    per_input_token: Float[np.ndarray, " models"]
    fixed: Float[np.ndarray, " models"]
    median_output: Float[np.ndarray, " models"]
    token_ratio: Float[np.ndarray, " models"]
    c_min: float
    c_max: float
    per_output_token: Float[np.ndarray, " models"]

    def input_tokens(
        self,
        n_tokens: Int[np.ndarray, " queries"],
        recorded: Float[np.ndarray, "queries models"] | None = None,
        n_bytes: Int[np.ndarray, " queries"] | None = None,
    ) -> Float[np.ndarray, "queries models"]:
        """Estimated input tokens: the encoder's counts `n_tokens` times `token_ratio`, or `recorded` unless NaN.

        An estimate is at least `n_bytes` (UTF-8 bytes of the prompts) / MAX_BYTES_PER_TOKEN; None: no such bound.
        """
        n_in = n_tokens[:, None].astype(np.float64) * self.token_ratio
        if n_bytes is not None:
            n_in = np.maximum(n_in, n_bytes[:, None] / MAX_BYTES_PER_TOKEN)
        if recorded is not None:
            n_in = np.where(np.isnan(recorded), n_in, recorded.astype(np.float64))
        return n_in

    def of_tokens(
        self,
        input_tokens: Float[np.ndarray, "queries models"],
        output_tokens: Float[np.ndarray, "queries models"] | None = None,
    ) -> Float[np.ndarray, "queries models"]:
        """Eq. 2, in USD, from input tokens and output tokens; None: the models' medians."""
        output = self.fixed if output_tokens is None else output_tokens * self.per_output_token
        return output + input_tokens * self.per_input_token

    def estimate(
        self,
        n_tokens: Int[np.ndarray, " queries"],
        recorded: Float[np.ndarray, "queries models"] | None = None,
        n_bytes: Int[np.ndarray, " queries"] | None = None,
        output_tokens: Float[np.ndarray, "queries models"] | None = None,
    ) -> Float[np.ndarray, "queries models"]:
        """Eq. 2, in USD. Arguments as in `input_tokens` and `of_tokens`."""
        return self.of_tokens(self.input_tokens(n_tokens, recorded, n_bytes), output_tokens)

    def normalise(
        self, cost: Float[np.ndarray, "queries models"], extrapolate: bool = False
    ) -> Float[np.ndarray, "queries models"]:
        """Eq. 4: maps [c_min, c_max] to [0, 1] and clips; 0 for all if c_min equals c_max.

        `extrapolate` does not clip above 1: decisions use it, so that lambda weighs the cost of a query that is more
        expensive than every training query (docs/equations.md, Cost beyond the training range).
        """
        if self.c_max <= self.c_min:
            return np.zeros_like(cost)
        return np.clip((cost - self.c_min) / (self.c_max - self.c_min), 0.0, None if extrapolate else 1.0)


def output_prices(pool: Pool) -> Float[np.ndarray, " models"]:
    """USD per output token of each model; for a self-hosted model the price of its time per token."""
    return np.array(
        [
            (model.output_usd_per_mtok or 0.0) / 1e6
            if model.self_hosted is None
            else model.self_hosted.gpu_usd_per_hour / 3600 * model.self_hosted.itl_s
            for model in pool.models
        ]
    )


def unit_costs(
    pool: Pool, median_output: Float[np.ndarray, " models"]
) -> tuple[Float[np.ndarray, " models"], Float[np.ndarray, " models"]]:
    """USD per input token, and USD for `median_output` tokens, of each model."""
    per_input, fixed = np.empty(len(pool.models)), np.empty(len(pool.models))
    for index, model in enumerate(pool.models):
        if model.self_hosted is not None:
            usd_per_s = model.self_hosted.gpu_usd_per_hour / 3600
            per_input[index] = usd_per_s * model.self_hosted.ttft_s_per_1k_tokens / 1000
            fixed[index] = usd_per_s * median_output[index] * model.self_hosted.itl_s
        else:
            per_input[index] = (model.input_usd_per_mtok or 0.0) / 1e6
            fixed[index] = median_output[index] * (model.output_usd_per_mtok or 0.0) / 1e6
    return per_input, fixed


def fit_costs(
    pool: Pool, outcomes: Outcomes, train: Int[np.ndarray, " train"], n_tokens: Int[np.ndarray, " queries"]
) -> CostModel:
    """Fits the cost model on the training queries. `n_tokens` are the encoder's token counts of all queries.

    Raises InputError for a model without a recorded output length on the training queries.
    """
    output = outcomes.output_tokens[train]
    unknown = [name for name, known in zip(pool.names, ~np.isnan(output).all(axis=0), strict=True) if not known]
    if unknown:
        raise InputError(
            f"outcomes: column 'output_tokens' is empty for {', '.join(unknown)} on the training split; "
            "costs need their median: record output lengths or leave the models out of the pool"
        )
    median = np.nanmedian(output, axis=0).astype(np.float64)
    recorded = outcomes.input_tokens[train].astype(np.float64)
    ratios = recorded / np.maximum(n_tokens[train][:, None], 1)
    known = ~np.isnan(ratios)
    ratio = np.where(known, ratios, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    ratio = np.where(known.any(axis=0), ratio, 1.0)
    per_input, fixed = unit_costs(pool, median)
    unscaled = CostModel(per_input, fixed, median, ratio, 0.0, 0.0, output_prices(pool))
    cost = unscaled.estimate(n_tokens[train], outcomes.input_tokens[train], outcomes.prompt_bytes[train])
    return replace(unscaled, c_min=float(cost.min()), c_max=float(cost.max()))
