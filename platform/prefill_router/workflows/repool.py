"""Changes of a checkpoint's pool without training: other prices, or a model less. Writes OUTPUT/checkpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from prefill_router import registry
from prefill_router.config import FrozenModel
from prefill_router.locations import Location
from prefill_router.pool import load_pool
from prefill_router.registry.versions import at_hand
from prefill_router.routing.checkpoint import check_place, load_checkpoint, save_checkpoint
from prefill_router.routing.repool import remove_models, reprice


class RepoolConfig(FrozenModel):
    """The checkpoint and the change of its pool."""

    checkpoint: Annotated[str, Field(min_length=1, description="checkpoint folder or registry URI to start from")]
    output: Annotated[Location, Field(description="output folder; the checkpoint goes to OUTPUT/checkpoint")]
    reprice: Annotated[
        Location | None,
        Field(description="pool with new prices, a YAML file; models that it does not name keep theirs; null: none"),
    ] = None
    remove: Annotated[tuple[str, ...], Field(description="names of models to remove, a list")] = ()

    @model_validator(mode="after")
    def _changes(self) -> RepoolConfig:
        if self.reprice is None and not self.remove:
            raise ValueError("reprice, remove: got neither; give new prices, names of models to remove, or both")
        return self


def plan(config: RepoolConfig) -> list[str]:
    """What a dry run says. Raises InputError as `run` does for the checkpoint and its place. Asks no registry."""
    folder, place = at_hand(config.checkpoint), config.output / "checkpoint"
    check_place(place)
    pool = None if config.reprice is None else load_pool(config.reprice)
    source = f"{config.checkpoint}, for which the registry is not asked now"
    if folder is not None:
        router = load_checkpoint(folder)
        if config.remove:
            router = remove_models(router, config.remove)
        if pool is not None:
            router = reprice(router, pool)
        source = f"the one in {folder}, with {len(router.pool.models)} models"
    return [f"writes checkpoint: {place}, from {source}", "costs nothing but the time of this machine"]


def run(config: RepoolConfig) -> str:
    """Change the prices of a checkpoint's models, or remove models, without training again."""
    folder = config.output / "checkpoint"
    check_place(folder)
    router = load_checkpoint(registry.resolve(config.checkpoint))
    before, done = router, []
    if config.remove:
        router = remove_models(router, config.remove)
        done.append(f"{', '.join(config.remove)} removed")
    if config.reprice is not None:
        router = reprice(router, load_pool(config.reprice))
        was = {model.name: model for model in before.pool.models}
        changed = [model.name for model in router.pool.models if model != was[model.name]]
        done.append(f"{', '.join(changed) or 'no model'} repriced")
    router = save_checkpoint(router, folder)
    return f"checkpoint {router.id} in {folder}, from {before.id}: {'; '.join(done)}; {len(router.pool.models)} models"
