"""Checkpoints of registered versions on this machine: `$XDG_CACHE_HOME/prefill-router/CHECKPOINT_ID`.

An intact copy serves a pinned version without the tracking server. `versions/` records the checkpoint of every version,
by the URI of the registry: version numbers of two registries can be equal. A damaged copy counts as absent.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefill_router.errors import InputError
from prefill_router.files import DAMAGED, cache_folder, read_json, replace_folder, sha256_strings, write_json
from prefill_router.registry.store import shown
from prefill_router.routing.checkpoint import load_checkpoint

DOWNLOAD = ".download-"  # prefix of temporary folders
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
        replace_folder(found, folder, lambda: _is_intact(folder, checkpoint))
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


def _remove_leftovers(cache: Path) -> None:
    for prefix in (DOWNLOAD, DAMAGED):
        for folder in cache.glob(f"{prefix}*"):
            if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(folder, ignore_errors=True)
