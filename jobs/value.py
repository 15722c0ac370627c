"""Value job: a server's decision log in, the value of other policies out: score, cost and utility with intervals.

Writes OUTPUT/value.json and OUTPUT/value.html (docs/off-policy.md, docs/data-formats.md).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.decisions.log import read_decisions
from prefill_router.decisions.logged_policy import LoggedPolicy, logged_policy
from prefill_router.decisions.replay import read_again
from prefill_router.decisions.value import log_figures, mixed_policy, outcomes_of, router_policy, values
from prefill_router.errors import InputError
from prefill_router.locations import LocalPath, Location
from prefill_router.progress import tqdm
from prefill_router.registry.versions import at_hand
from prefill_router.reports.value_page import as_text, summary, write_value
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import NoveltyFallback, Router
from prefill_router.version import code_version


class Policy(FrozenModel):
    """A target policy: the checkpoint at a lambda, or models drawn by fixed shares."""

    model_config = ConfigDict(validate_by_name=True)

    name: Annotated[str | None, Field(min_length=1, description="name in the tables; null: from the settings")] = None
    lam: Annotated[
        float | None, Field(alias="lambda", ge=0, le=1, description="lambda; null: the lambda of each decision")
    ] = None
    margin: Annotated[bool, Field(description="whether the checkpoint's margin counts")] = True
    novelty_above: Annotated[
        float | None, Field(ge=0, lt=1, description="novelty from which fallback_model answers; null: no fallback")
    ] = None
    fallback_model: Annotated[str | None, Field(description="model that answers novel queries")] = None
    mix: Annotated[
        dict[str, Annotated[float, Field(gt=0)]] | None,
        Field(min_length=1, description="share of each model, in place of the checkpoint; one model: always this one"),
    ] = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = self.model_fields_set - {"name", "mix"}
        if self.mix is not None and given:
            raise ValueError(f"mix: given with {', '.join(sorted(given))}, settings of the checkpoint; leave one out")
        if (self.novelty_above is None) != (self.fallback_model is None):
            raise ValueError("novelty_above, fallback_model: one is given without the other; give both or neither")
        return self

    @property
    def title(self) -> str:
        """The name, or one from the settings."""
        if self.name is not None:
            return self.name
        if self.mix is not None:
            total = sum(self.mix.values())
            shares = [f"{share / total:.0%} {model}" for model, share in self.mix.items()]
            return f"always {next(iter(self.mix))}" if len(self.mix) == 1 else ", ".join(shares)
        title = "logged lambdas" if self.lam is None else f"lambda {self.lam:g}"
        title += "" if self.margin else ", no margin"
        if self.fallback_model is not None:
            title += f", {self.fallback_model} from novelty {self.novelty_above:g}"
        return title


class ValueConfig(FrozenModel):
    """The log, the checkpoint, the policies to evaluate, and the estimators' settings."""

    log: Annotated[LocalPath, Field(description="folder of the decision log, gateway.log.folder of the server")]
    checkpoint: Annotated[str, Field(min_length=1, description="checkpoint folder or registry URI that is evaluated")]
    output: Annotated[Location, Field(description="output folder")] = Path("runs/value")
    made_by: Annotated[
        str | None,
        Field(
            description="id of the checkpoint whose candidates are used; null: that of checkpoint if the log has it, "
            "otherwise the one with the most decisions"
        ),
    ] = None
    lambdas: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(description="lambdas of policies of the checkpoint, a list"),
    ] = ()
    policies: Annotated[
        tuple[Policy, ...],
        Field(
            description="further policies: mappings with lambda, margin, novelty_above, fallback_model, or with mix; "
            "without any policy: the checkpoint at the logged lambdas"
        ),
    ] = ()
    utility_lambda: Annotated[
        float | None, Field(ge=0, le=1, description="lambda of the utility; null: that of the checkpoint")
    ] = None
    correct_from: Annotated[
        float | None, Field(gt=0, le=1, description="feedback score from which an answer is correct; null: mean scores")
    ] = None
    rates: Annotated[
        Literal["model", "all"],
        Field(description="feedback is observed at one rate for each model, or at one rate for all"),
    ] = "model"
    outcome_model: Annotated[
        Literal["recalibrated", "confidence"],
        Field(description="predictions of DM and DR: confidences, recalibrated on the feedback or as they are"),
    ] = "recalibrated"
    max_weight: Annotated[
        float | None, Field(ge=1, description="bound on the ratio of target to logging probability; null: none")
    ] = None


def plan(config: ValueConfig) -> list[str]:
    """What a dry run says: decisions, and prompts to read. Raises InputError as `run` does. Asks no registry."""
    given, folder, log = _policies(config), at_hand(config.checkpoint), read_decisions(config.log)
    of = f"{len(given)} policies on {len(log):,} decisions of the log"
    if folder is None:
        return [f"costs nothing but the time of this machine: evaluates {of}; the registry is not asked now"]
    router = load_checkpoint(folder)
    policy = logged_policy(log, router, config.made_by)
    prompts = 0 if policy.read.checkpoint == router.id else len(policy.score)
    return [f"costs nothing but the time of this machine: evaluates {of}, and reads {prompts:,} prompts"]


def run(config: ValueConfig) -> str:
    """Estimate the value of other policies from a decision log with propensities and feedback."""
    given = _policies(config)
    router = load_checkpoint(registry.resolve(config.checkpoint))
    policy = logged_policy(read_decisions(config.log), router, config.made_by)
    if policy.read.checkpoint != router.id:
        policy = policy.read_by(read_again(policy.read, router, partial(tqdm, desc="prompts", unit=" batches")))
    targets = {name: _target(one, policy, router) for name, one in given.items()}
    lam = router.chosen_lambda if config.utility_lambda is None else config.utility_lambda
    outcomes = outcomes_of(
        policy, router.costs, config.correct_from, config.rates == "model", config.outcome_model == "recalibrated"
    )
    found = {
        **log_figures(policy, outcomes),
        "evaluated": router.id,
        "utility_lambda": lam,
        "policies": values(outcomes, targets, lam, config.max_weight),
        "provenance": {
            **{name: None if value is None else str(value) for name, value in config},
            "code_version": code_version(),
        },
    }
    page = write_value(config.output, found)
    print(as_text(found))
    return f"{summary(found)}; page: {page}"


def _policies(config: ValueConfig) -> dict[str, Policy]:
    """The policies by name; the checkpoint at the logged lambdas if none is given."""
    given = [*(Policy(lam=lam) for lam in config.lambdas), *config.policies] or [Policy()]
    named = {one.title: one for one in given}
    if len(named) < len(given):
        raise InputError(f"policies: {len(given)} have {len(named)} names; give each its own name")
    return named


def _target(one: Policy, policy: LoggedPolicy, router: Router) -> np.ndarray:
    if one.mix is not None:
        return mixed_policy(policy, one.mix)
    fallback = None
    if one.novelty_above is not None and one.fallback_model is not None:
        fallback = NoveltyFallback(one.novelty_above, one.fallback_model)
    return router_policy(policy, router, one.lam, one.margin, fallback)


if __name__ == "__main__":
    main(ValueConfig, run, plan=plan)
