"""The Ray cluster, the model registry and the bundled encoders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from prefill_router import cluster, registry
from prefill_router.doctor.finding import Finding
from prefill_router.errors import InputError, UnavailableError
from prefill_router.files import sha256_file
from prefill_router.prefill.bundled import BUNDLED, bundled_weights, check_weights
from prefill_router.registry.store import probe, registry_uri, shown, sqlite_file

RUNNING = Path("/tmp/ray/ray_current_cluster")  # the address of the cluster that `ray start` started here


def ray_address() -> Iterator[Finding]:
    """RAY_ADDRESS: whether it is the address of a cluster that answers."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("ok", "ray", "RAY_ADDRESS is not set; every job starts a Ray of its own on this machine")
        return
    if address == "auto" and not RUNNING.exists():
        yield Finding("error", "ray", "RAY_ADDRESS is auto, but no cluster runs on this machine", cluster.WAY_OUT)
        return
    try:
        cluster.check_address(address)
    except (InputError, UnavailableError) as error:
        yield Finding("error", "ray", str(error))
        return
    yield Finding("ok", "ray", f"RAY_ADDRESS: {address} answers")


def model_registry() -> Iterator[Finding]:
    """The tracking store and the aliases of the model. A database that does not exist yet is not created."""
    for uri in dict.fromkeys((registry.tracking_uri(), registry_uri())):
        if (file := sqlite_file(uri)) is not None and not file.exists():
            yield Finding("ok", "registry", f"{file}: does not exist yet; the first run that is tracked creates it")
            return
    try:
        probe(registry_uri())
        client = registry.connect()
        known = client.search_registered_models(f"name='{registry.NAME}'")
    except (InputError, UnavailableError) as error:
        yield Finding("error", "registry", str(error))
        return
    aliases = known[0].aliases if known else {}
    named = ", ".join(f"{name} is version {number}" for name, number in sorted(aliases.items()))
    empty = "no version of the model yet" if not known else "no aliases yet; jobs.promote makes a version the champion"
    yield Finding("ok", "registry", f"{shown(registry_uri())}: {named or empty}")


def encoders() -> Iterator[Finding]:
    """The bundled encoders: whether their weights are there and the official ones."""
    for name in BUNDLED:
        try:
            path = bundled_weights(name)
            check_weights(name, sha256_file(path))
        except InputError as error:
            yield Finding("error", f"encoder {name}", str(error).removeprefix("model: "))
        else:
            yield Finding("ok", f"encoder {name}", f"{path.name}: the official weights")
