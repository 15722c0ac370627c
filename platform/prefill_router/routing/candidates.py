"""Which blocks a target may read: encoder-target decoupling (EQUATIONS.md) and restrictions by name.

In: the blocks that there are, how each encoder was loaded, the targets. Out: per target the blocks that the layer
search chooses among. Modes: `auto` any encoder, so that a target reads the one whose best probe wins; `single` one
encoder for all targets; `per_model` a map from target to encoder. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig, Pooling
from prefill_router.prefill.encoder import parse_column
from prefill_router.signals.layer_key import LayerKey

Mode = Literal["auto", "single", "per_model"]


def candidate_layers(
    layer_keys: Sequence[LayerKey],
    encoders: Mapping[str, EncoderConfig],
    models: Sequence[str],
    mode: Mode = "auto",
    chosen: str | Mapping[str, str] | None = None,
    pooling: Pooling | None = None,
) -> tuple[tuple[LayerKey, ...], ...]:
    """The blocks that each target may read. `chosen` names the encoder of all targets, or one for each.

    Raises InputError for an unknown encoder or target, a target without an encoder, or none of the pooling.
    """
    if isinstance(chosen, Mapping):
        if unknown := sorted(set(chosen) - set(models)):
            raise InputError(f"encoders: {', '.join(unknown)} is no model of the pool; it has {', '.join(models)}")
        if missing := [model for model in models if model not in chosen]:
            raise InputError(f"encoders: {', '.join(missing)} has no encoder; mode per_model needs one for each target")
        own: list[str | None] = [find_encoder(chosen[model], encoders) for model in models]
    elif mode == "single":
        if chosen is None and len(encoders) > 1:
            raise InputError(f"encoders: mode single needs one of {_known(encoders)}")
        own = [find_encoder(chosen, encoders) if chosen else next(iter(encoders))] * len(models)
    else:
        own = [None] * len(models)
    found = tuple(
        tuple(key for key in layer_keys if encoder in (None, key.encoder) and pooling in (None, key.pooling))
        for encoder in own
    )
    if not all(found):
        raise InputError(
            f"pooling: the activations hold no states pooled by {pooling!r}; prefill with it, or leave pooling out"
        )
    return found


def find_encoder(name: str, encoders: Mapping[str, EncoderConfig]) -> str:
    """The fingerprint of the encoder called `name`, a fingerprint or a model's name.

    Raises InputError for an unknown name, or one that several encoders share.
    """
    if name in encoders:
        return name
    found = [fingerprint for fingerprint, config in encoders.items() if config.model == name]
    if len(found) != 1:
        what = (
            f"is the model of {' and '.join(found)}; give the fingerprint"
            if found
            else f"is not among the activations; they hold {_known(encoders)}"
        )
        raise InputError(f"encoders: {name!r} {what}")
    return found[0]


def _known(encoders: Mapping[str, EncoderConfig]) -> str:
    return ", ".join(f"{fingerprint} ({config.model})" for fingerprint, config in encoders.items())


def fixed_layers(
    names: str | Sequence[str] | None, candidates: Sequence[Sequence[LayerKey]], models: Sequence[str]
) -> tuple[tuple[LayerKey, ...], ...]:
    """The blocks named, one per target; a single name stands for all.

    Raises InputError for a name that is not there or that several encoders share.
    """
    if names is None:
        raise InputError("fixed: strategy `fixed` needs a layer, as in last_L4, or one per target")
    names = (names,) * len(models) if isinstance(names, str) else tuple(names)
    if len(names) != len(models):
        raise InputError(f"fixed: got {len(names)} layers for {len(models)} targets; give one for all or one for each")
    chosen = []
    for name, layer_keys in zip(names, candidates, strict=True):
        parse_column(name)
        found = [key for key in layer_keys if key.column == name]
        if not found:
            raise InputError(
                f"fixed: {name!r} is not in the activations; they hold {', '.join(key.column for key in layer_keys)}"
            )
        if len(found) > 1:
            raise InputError(
                f"fixed: {name!r} is a column of several encoders; choose by mode single or per_model, or "
                "give the activations of one"
            )
        chosen.append((found[0],))
    return tuple(chosen)
