"""Replay job: a server's decision log in, its decisions at other lambdas, without margin or by another checkpoint out.

Writes OUTPUT/replay.json and OUTPUT/replay.parquet (docs/data-formats.md).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.decisions.log import read_decisions
from prefill_router.decisions.replay import choices_table, figures, logged_decisions, replay, reproduced
from prefill_router.errors import InputError
from prefill_router.files import write_json, write_parquet
from prefill_router.locations import LocalPath, Location
from prefill_router.registry.versions import at_hand
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.router import NoveltyFallback

SHOWN = 20  # ids of decisions that are not reproduced


class ReplayConfig(FrozenModel):
    """The log, the checkpoint that decides again, and its settings."""

    log: Annotated[LocalPath, Field(description="folder of the decision log, gateway.log.folder of the server")]
    checkpoint: Annotated[str, Field(min_length=1, description="checkpoint folder or registry URI that decides again")]
    output: Annotated[Location, Field(description="output folder")]
    made_by: Annotated[
        str | None, Field(description="id of the checkpoint whose decisions are replayed; None: that of checkpoint")
    ] = None
    lambdas: Annotated[tuple[float, ...], Field(min_length=1, description="lambdas to decide at, a list")] = (
        0.0,
        0.05,
        0.1,
        0.2,
        0.4,
        1.0,
    )
    margin: Annotated[bool, Field(description="whether the checkpoint's margin counts")] = True
    novelty_above: Annotated[
        float | None, Field(ge=0, lt=1, description="novelty from which fallback_model answers; None: no fallback")
    ] = None
    fallback_model: Annotated[str | None, Field(description="model that answers novel queries")] = None


def plan(config: ReplayConfig) -> list[str]:
    """What a dry run says: the decisions to repeat. Raises InputError as `run` does. Asks no registry."""
    _fallback(config)
    folder, log = at_hand(config.checkpoint), read_decisions(config.log)
    of = f"{len(log):,} decisions of the log"
    if folder is None:
        of += f", by {config.checkpoint}, for which the registry is not asked now"
    else:
        router = load_checkpoint(folder)
        logged = logged_decisions(log, router.pool.names, config.made_by or router.id)
        of = f"{len(logged.ids):,} of {of}, by checkpoint {router.id}"
    return [f"costs nothing but the time of this machine: decides {of} at {len(config.lambdas)} lambdas"]


def run(config: ReplayConfig) -> str:
    """Decide the logged queries again, and compare with the decisions that were made."""
    fallback = _fallback(config)
    router = load_checkpoint(registry.resolve(config.checkpoint))
    logged = logged_decisions(read_decisions(config.log), router.pool.names, config.made_by or router.id)
    replayed = replay(logged, router, config.lambdas, config.margin, fallback)
    found = figures(logged, router, replayed)
    checked = ""
    if logged.checkpoint == router.id and config.margin:
        same = reproduced(logged, router, fallback)
        found["reproduced"] = int(same.sum())
        found["not_reproduced"] = [name for name, equal in zip(logged.ids, same, strict=True) if not equal][:SHOWN]
        checked = f"; {same.sum():,} reproduced bit for bit"
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "replay.json", found)
    write_parquet(config.output / "replay.parquet", choices_table(logged, router, replayed))
    print(_text(found))
    return f"{len(logged.ids):,} decisions of {logged.checkpoint}{checked}; written to {config.output}"


def _fallback(config: ReplayConfig) -> NoveltyFallback | None:
    if (config.novelty_above is None) != (config.fallback_model is None):
        raise InputError("novelty_above, fallback_model: one is given without the other; give both or neither")
    if config.novelty_above is None or config.fallback_model is None:
        return None
    return NoveltyFallback(config.novelty_above, config.fallback_model)


def _text(found: dict[str, Any]) -> str:
    rows = [("made", found["made"])] + [(f"lambda {one['lambda']:g}", one) for one in found["replayed"]]
    lines = [f"{'':<12}{'confidence':>12}{'cost, USD':>14}{'changed':>10}  models"]
    for name, one in rows:
        shares = sorted(one["models"].items(), key=lambda item: -item[1])
        models = ", ".join(f"{model} {count / found['decisions']:.0%}" for model, count in shares)
        lines.append(
            f"{name:<12}{one['mean_confidence']:>12.3f}{one['cost_usd']:>14.6f}{one['changed']:>10,}  {models}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(ReplayConfig, run, plan=plan)
