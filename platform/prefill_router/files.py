"""Atomic writes, digests, JSON manifests and YAML configurations.

Knows nothing of the content of the files. Digests are sha256 in hex.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ValidationError

from prefill_router.errors import InputError, UnavailableError, one_line
from prefill_router.locations import ObjectPath, readable

DAMAGED = ".damaged-"  # prefix of temporary folders of damaged copies
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, file size limit
Config = TypeVar("Config", bound=BaseModel)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/prefill-router`, by default in `~/.cache`: files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefill-router"


def replace_folder(made: Path, folder: Path, is_intact: Callable[[], bool]) -> None:
    """Renames `made` to `folder`, and a damaged copy there to a temporary folder first.

    `is_intact` says whether `folder` is usable: another process may make it at the same time. Raises InputError if the
    damaged copy cannot be replaced.
    """
    for _ in range(3):
        try:
            os.replace(made, folder)
            return
        except OSError:
            if is_intact():
                return
        damaged = Path(tempfile.mkdtemp(prefix=DAMAGED, dir=folder.parent))
        with suppress(OSError):
            os.replace(folder, damaged / folder.name)
        shutil.rmtree(damaged, ignore_errors=True)
    raise InputError(f"{folder}: a damaged copy cannot be replaced; delete it")


def sha256_file(path: Path) -> str:
    """Digest of the bytes of a file, in constant memory."""
    source = readable(path)
    with source.open("rb") if isinstance(source, Path) else source as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_strings(strings: Iterable[str]) -> str:
    """Digest of a sequence of strings. Each string is prefixed with its length, so that boundaries count."""
    digest = hashlib.sha256()
    for string in strings:
        data = string.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def prompt_digest(prompt: str) -> str:
    """16 hex digits that identify the prompt of activations."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` and renames the result to `path`, so that readers see the old or the new file.

    An object is written to a temporary local file and uploaded. Raises UnavailableError if the disk is full.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch, path.name))
            path.upload(Path(scratch, path.name))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{temporary_suffix(os.getpid())}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:
        if is_full(error):
            raise disk_full(path) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_suffix(process: int) -> str:
    """The suffix of temporary files and folders of a process of this host. Other hosts may share the storage."""
    return f".{socket.gethostname()}.{process}.tmp"


def remove_temporary(paths: Iterable[Path]) -> None:
    """Deletes those of `paths` that are temporary files or folders of a process of this host that has ended.

    Containers that share a volume need different host names: otherwise one may delete the files of another that runs.
    """
    for path in list(paths):  # all are listed before the first is deleted
        process = path.name.split(".")[-2]
        if not process.isdecimal() or not path.name.endswith(temporary_suffix(int(process))):
            continue  # of another host, where the process may be alive
        if _is_alive(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user
        return True
    return True


def is_full(error: BaseException) -> bool:
    """Whether a disk had no space left, also if a library or another process reports it as text."""
    return getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error)


def disk_full(path: Path, needed: int | None = None) -> UnavailableError:
    """The error for a disk without space for `path`. `needed`: estimated bytes that are still to be written."""
    about = "" if needed is None else f", about {needed / 2**20:,.1f} MiB are needed"
    return UnavailableError(
        f"{path}: the disk is full: {free_bytes(path) / 2**20:,.1f} MiB are free{about}; free space and run the same "
        "command again"
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a local path, which may be missing."""
    return shutil.disk_usage(next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())).free


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table atomically, with zstd compression."""
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises InputError if it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_yaml(path: Path, kind: type[Config], context: Any = None) -> Config:
    """Reads a YAML mapping as the pydantic model `kind`, whose validators receive `context`.

    Raises InputError if the file is missing, unreadable or not YAML, or a field is unknown, missing or invalid.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: expected a mapping with the fields {sorted(kind.model_fields)}, got {type(value).__name__}"
        )
    try:
        return kind.model_validate(value, context=context)
    except ValidationError as error:
        raise InputError(f"{path}: {one_line(error)}") from None
