"""Experiment tracking and the model registry. No other package of the library imports MLflow."""

from prefill_router.registry.flavour import (
    _load_pyfunc as _load_pyfunc,
)  # the loader module of versions registered earlier
from prefill_router.registry.store import NAME, connect, sqlite_uri, tracking_uri
from prefill_router.registry.tracking import Run, child, track, track_many
from prefill_router.registry.versions import (
    CHAMPION,
    HEADLINE,
    PREVIOUS,
    Version,
    pin_version,
    promote,
    register,
    resolve,
    undo,
)

__all__ = [
    "CHAMPION",
    "HEADLINE",
    "NAME",
    "PREVIOUS",
    "Run",
    "Version",
    "child",
    "connect",
    "pin_version",
    "promote",
    "register",
    "resolve",
    "sqlite_uri",
    "track",
    "track_many",
    "tracking_uri",
    "undo",
]
