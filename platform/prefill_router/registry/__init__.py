"""Experiment tracking and the model registry. No other package of the library imports MLflow."""

from prefill_router.registry.aliases import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    SHADOW,
    TRIAL,
    aliases,
    promote,
    remove_alias,
    set_alias,
    undo,
)
from prefill_router.registry.flavour import (
    _load_pyfunc as _load_pyfunc,
)  # the loader module of versions registered earlier
from prefill_router.registry.store import NAME, connect, sqlite_uri, tracking_uri
from prefill_router.registry.tracking import Run, child, track, track_many
from prefill_router.registry.verdicts import checkpoint_of, fetch_evaluation, record_verdict, version_tags
from prefill_router.registry.versions import HEADLINE, Version, pin_version, register, resolve

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "HEADLINE",
    "NAME",
    "PREVIOUS",
    "SHADOW",
    "TRIAL",
    "Run",
    "Version",
    "aliases",
    "checkpoint_of",
    "child",
    "connect",
    "fetch_evaluation",
    "pin_version",
    "promote",
    "record_verdict",
    "register",
    "remove_alias",
    "resolve",
    "set_alias",
    "sqlite_uri",
    "track",
    "track_many",
    "tracking_uri",
    "undo",
    "version_tags",
]
