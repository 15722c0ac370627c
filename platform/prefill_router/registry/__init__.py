"""Tracking and the model registry: the one package of the library that imports MLflow."""

from prefill_router.registry.flavour import _load_pyfunc as _load_pyfunc  # models registered before name this module
from prefill_router.registry.tracking import NAME, Run, child, track, track_many, tracking_uri
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
    "pin_version",
    "promote",
    "register",
    "resolve",
    "track",
    "track_many",
    "tracking_uri",
    "undo",
]
