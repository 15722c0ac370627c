"""Checkpoints of registered versions on this machine: `$XDG_CACHE_HOME/prefill-router/CHECKPOINT_ID`.

An intact copy serves a pinned version without the tracking server. `versions/` records the checkpoint of every version,
by the URI of the registry: version numbers of two registries can be equal. A damaged copy counts as absent.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.files import cache_folder, read_json, sha256_strings, write_json
from prefill_router.registry.store import shown
from prefill_router.routing.checkpoint import load_checkpoint

DOWNLOAD, DAMAGED = ".download-", ".damaged-"  # prefixes of temporary folders
LEFTOVER_S = 24 * 3600  # a temporary folder of this age belongs to an interrupted download


def cached_version(uri: str, number: str) -> Path | None:
    """The intact copy of version `number` of the registry `uri`; None if this machine has none."""
    try:
        checkpoint = read_json(_record(uri, number))["checkpoint_id"]
    except (InputError, KeyError, TypeError):
        return None
    return cached_checkpoint(checkpoint)


def cached_checkpoint(checkpoint: str) -> Path | None:
    """The intact copy of a checkpoint; None if it is missing or damaged."""
    folder = cache_folder() / checkpoint
    return folder if _is_intact(folder, checkpoint) else None


def remember_version(uri: str, number: str, checkpoint: str) -> None:
    """Records that version `number` of the registry `uri` is this checkpoint. Replaces an earlier record.

    Does nothing if the cache cannot be written.
    """
    with suppress(OSError):
        write_json(_record(uri, number), {"registry": shown(uri), "version": number, "checkpoint_id": checkpoint})


def store_checkpoint(checkpoint: str, download: Callable[[Path], Path]) -> Path:
    """Calls `download(scratch folder)`, which returns the downloaded checkpoint, and moves it to the cache.

    Replaces a damaged copy. Concurrent calls are safe. Raises InputError if the download is not this checkpoint, or if
    the cache cannot be written.
    """
    cache = cache_folder()
    folder = cache / checkpoint
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        scratch = Path(tempfile.mkdtemp(prefix=DOWNLOAD, dir=cache))
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from None
    try:
        found = download(scratch)
        loaded = load_checkpoint(found).id
        if loaded != checkpoint:
            raise InputError(f"checkpoint: got {loaded} from the registry, expected {checkpoint}")
        _move(found, folder, checkpoint)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _record(uri: str, number: str) -> Path:
    return cache_folder() / "versions" / sha256_strings([shown(uri).rstrip("/")])[:16] / f"{number}.json"


def _is_intact(folder: Path, checkpoint: str) -> bool:
    try:
        return load_checkpoint(folder).id == checkpoint
    except (InputError, OSError):
        return False


def _move(found: Path, folder: Path, checkpoint: str) -> None:
    """Renames `found` to `folder`, and a damaged copy there to a temporary folder first."""
    for _ in range(3):  # another process may do the same at the same time
        try:
            os.replace(found, folder)
            return
        except OSError:
            if _is_intact(folder, checkpoint):
                return
        damaged = Path(tempfile.mkdtemp(prefix=DAMAGED, dir=folder.parent))
        with suppress(OSError):
            os.replace(folder, damaged / folder.name)
        shutil.rmtree(damaged, ignore_errors=True)
    raise InputError(f"{folder}: a damaged copy cannot be replaced; delete it")


def _remove_leftovers(cache: Path) -> None:
    for prefix in (DOWNLOAD, DAMAGED):
        for folder in cache.glob(f"{prefix}*"):
            if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(folder, ignore_errors=True)
