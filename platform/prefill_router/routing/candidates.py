"""Candidate layers of each target: encoder-target decoupling (docs/equations.md) and restrictions by name.

In: layer keys, encoder configurations, targets. Out: the layer keys of each target among which layer selection chooses.
Modes: `auto` allows every encoder, so that the encoder with the best probe is chosen; `all` allows every encoder, and
selection chooses layers of each; `single` allows one encoder for all targets; `per_model` maps each target to an
encoder. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from prefill_router.errors import InputError
from prefill_router.prefill.config import EncoderConfig, Pooling
from prefill_router.prefill.encoder import parse_column
from prefill_router.signals.layer_key import LayerKey

Mode = Literal["auto", "all", "single", "per_model"]


def candidate_layers(
    layer_keys: Sequence[LayerKey],
    encoders: Mapping[str, EncoderConfig],
    models: Sequence[str],
    mode: Mode = "auto",
    chosen: str | Mapping[str, str] | None = None,
    pooling: Pooling | None = None,
) -> tuple[tuple[LayerKey, ...], ...]:
    """The candidate layers of each target, in the order of `models`.

    `encoders` maps fingerprints to configurations. `chosen` names one encoder for all targets (mode single) or maps
    each target to an encoder (mode per_model). Raises InputError for an unknown encoder or target, a target without an
    encoder, or a pooling that the activations (in mode all: those of an encoder) do not have.
    """
    if isinstance(chosen, Mapping):
        if unknown := sorted(set(chosen) - set(models)):
            raise InputError(f"encoders: got unknown models {', '.join(unknown)}; the pool has {', '.join(models)}")
        if missing := [model for model in models if model not in chosen]:
            raise InputError(f"encoders: no encoder for {', '.join(missing)}; mode per_model needs one for each target")
        own: list[str | None] = [find_encoder(chosen[model], encoders) for model in models]
    elif mode == "single":
        if chosen is None and len(encoders) > 1:
            raise InputError(f"encoders: got none in mode single; name one of {_known(encoders)}")
        own = [find_encoder(chosen, encoders) if chosen else next(iter(encoders))] * len(models)
    else:
        own = [None] * len(models)
    found = tuple(
        tuple(key for key in layer_keys if encoder in (None, key.encoder) and pooling in (None, key.pooling))
        for encoder in own
    )
    if not all(found):
        raise InputError(
            f"pooling: got {pooling!r}, but the activations have no states with it; run prefill with this pooling, or "
            "leave pooling out"
        )
    if mode == "all" and (unread := set(encoders) - {key.encoder for key in found[0]}):
        raise InputError(
            f"pooling: got {pooling!r} in mode all, but {_known(encoders, unread)} has no states with it; run prefill "
            "with this pooling, or use mode auto"
        )
    return found


def find_encoder(name: str, encoders: Mapping[str, EncoderConfig]) -> str:
    """The fingerprint of the encoder `name`: its fingerprint or its model name.

    Raises InputError for an unknown name, or a model name that several encoders share.
    """
    if name in encoders:
        return name
    found = [fingerprint for fingerprint, config in encoders.items() if config.model == name]
    if len(found) != 1:
        reason = (
            f"is the model of {' and '.join(found)}; give a fingerprint"
            if found
            else f"is not an encoder of the activations; they have {_known(encoders)}"
        )
        raise InputError(f"encoders: {name!r} {reason}")
    return found[0]


def encoder_names(encoders: Mapping[str, EncoderConfig]) -> dict[str, str]:
    """The name of each encoder, by fingerprint: its model name, or the fingerprint if several share the model."""
    models = [config.model for config in encoders.values()]
    return {
        fingerprint: config.model if models.count(config.model) == 1 else fingerprint
        for fingerprint, config in encoders.items()
    }


def _known(encoders: Mapping[str, EncoderConfig], only: Collection[str] | None = None) -> str:
    return ", ".join(
        f"{fingerprint} ({config.model})"
        for fingerprint, config in encoders.items()
        if only is None or fingerprint in only
    )


def fixed_layers(
    names: str | Sequence[str] | None,
    candidates: Sequence[Sequence[LayerKey]],
    models: Sequence[str],
    each_encoder: bool = False,
) -> tuple[tuple[LayerKey, ...], ...]:
    """The layer key of each target by column name, such as last_L4; one name applies to all targets.

    With `each_encoder` a target gets the layer key with this name of every encoder. Raises InputError for a missing
    name, or a name that the activations do not have; without `each_encoder` also for a column of several encoders, and
    with it for a column that an encoder does not have.
    """
    if names is None:
        raise InputError("fixed: got none; strategy fixed needs a layer, such as last_L4, or one per target")
    names = (names,) * len(models) if isinstance(names, str) else tuple(names)
    if len(names) != len(models):
        raise InputError(f"fixed: got {len(names)} layers for {len(models)} targets; give one for all or one for each")
    chosen = []
    for name, layer_keys in zip(names, candidates, strict=True):
        parse_column(name)
        found = [key for key in layer_keys if key.column == name]
        if not found:
            raise InputError(
                f"fixed: {name!r} is not in the activations; they have {', '.join(key.column for key in layer_keys)}"
            )
        if len(found) > 1 and not each_encoder:
            raise InputError(
                f"fixed: {name!r} is a column of several encoders; choose the encoder by mode single or per_model, use "
                "mode all, or give the activations of one encoder"
            )
        if each_encoder and (without := sorted({key.encoder for key in layer_keys} - {key.encoder for key in found})):
            raise InputError(
                f"fixed: {name!r} in mode all is not a column of the encoder {', '.join(without)}; name a layer of "
                "every encoder, or use strategy cv or fisher"
            )
        chosen.append(tuple(found))
    return tuple(chosen)
