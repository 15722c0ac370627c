"""Locations of files and folders: local paths, and URIs of object stores (S3, Google Cloud Storage, Azure).

`location` turns text into a `pathlib.Path`; a URI becomes an `ObjectPath`, whose methods call the object store through
`pyarrow.fs`. Credentials, region and endpoint come from the environment (docs/clusters.md). `Location` is the type of
a field for either, `LocalPath` the type of a field that must be local. Knows nothing of file formats.

An object store has no folders: a folder exists if an object lies below it, and creating it does nothing. An object is
visible when its upload is complete.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from prefill_router.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem
else:  # pyarrow is not imported with this module; tests check annotations when functions are called
    FileInfo = FileSystem = NativeFile = Any

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
ALLOWED = "a local path, s3://BUCKET/KEY, gs://BUCKET/KEY or abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/KEY"
URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)


class ObjectPath(PosixPath):
    """An object, or the objects below a prefix. Created by `location`; `str` gives the URI.

    Operations that need a local file (`open`, `os.fspath`, renaming) raise TypeError; `local_copy` makes one. Methods
    raise UnavailableError if the object store does not answer or denies access.
    """

    def __str__(self) -> str:
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self}: an object store has no local files; use prefill_router.locations.local_copy")

    @property
    def bucket(self) -> str:
        """The bucket; for Azure CONTAINER@ACCOUNT."""
        return self.parts[1]

    @property
    def filesystem(self) -> FileSystem:
        """The pyarrow file system of the bucket."""
        with _answering(self):
            return _filesystem(self.parts[0], self.bucket)[0]

    @property
    def key(self) -> str:
        """The path in `filesystem`: the bucket or container, and the names below it."""
        with _answering(self):
            return "/".join([_filesystem(self.parts[0], self.bucket)[1], *self.parts[2:]])

    def resolve(self, strict: bool = False) -> ObjectPath:
        """The path itself: a URI is absolute."""
        return self

    absolute = expanduser = resolve

    def is_absolute(self) -> bool:
        return True

    def exists(self) -> bool:
        return self._info().type.name != "NotFound"

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        """Whether an object lies below this prefix."""
        return self._info().type.name == "Directory"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Mode, size in bytes and time of modification. Raises FileNotFoundError if nothing exists here."""
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(f"{self}: no such object")
        mode, seconds = stat.S_IFREG if info.is_file else stat.S_IFDIR, (info.mtime_ns or 0) // 10**9
        return os.stat_result((mode, 0, 0, 1, 0, 0, info.size or 0, seconds, seconds, seconds))

    def iterdir(self) -> Generator[ObjectPath, None, None]:
        """The objects and prefixes directly below, sorted; none if nothing exists here."""
        from pyarrow.fs import FileSelector

        with _answering(self):
            found = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True))
        yield from sorted(self / info.base_name for info in found)

    def glob(self, pattern: str) -> Generator[ObjectPath, None, None]:
        """The paths directly below whose names match. Raises ValueError for a pattern over several levels."""
        if "/" in pattern or "**" in pattern:
            raise ValueError(f"pattern: got {pattern!r}, allowed is a pattern of a name")
        yield from (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Creates nothing. Raises InputError if the bucket does not exist."""
        with _answering(self):
            filesystem, root = _filesystem(self.parts[0], self.bucket)
            if filesystem.get_file_info(root).type.name == "NotFound":
                raise InputError(f"{self}: {self.bucket} does not exist or cannot be seen; create it, or give another")

    def read_bytes(self) -> bytes:
        with _answering(self), self.filesystem.open_input_stream(self.key, compression=None) as stream:
            return stream.read()

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Uploads `data` as one object."""
        with _answering(self), self.filesystem.open_output_stream(self.key, compression=None) as stream:
            return stream.write(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def unlink(self, missing_ok: bool = False) -> None:
        if self.is_file():
            with _answering(self):
                self.filesystem.delete_file(self.key)
        elif not missing_ok:
            raise FileNotFoundError(f"{self}: no such object")

    def remove_below(self) -> None:
        """Deletes every object below this prefix."""
        if self.is_dir():
            with _answering(self):
                self.filesystem.delete_dir(self.key)

    def upload(self, source: Path) -> None:
        """Uploads a local file to this object. The object appears, or is replaced, when the upload is complete."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with _answering(self):
            copy_files(str(source), self.key, LocalFileSystem(), self.filesystem)

    def download(self, target: Path) -> None:
        """Copies the object to the local file `target`, or the objects below this prefix into the folder `target`."""
        from pyarrow.fs import LocalFileSystem, copy_files

        if self.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        with _answering(self):
            copy_files(self.key, str(target), self.filesystem, LocalFileSystem())

    def _info(self) -> FileInfo:
        with _answering(self):
            return self.filesystem.get_file_info(self.key)


def location(value: Path | str) -> Path:
    """The local path or the `ObjectPath` of a URI. Raises InputError for a scheme that is not supported."""
    if isinstance(value, ObjectPath):
        return value
    match = URI.fullmatch(str(value))  # `Path("s3://x")` has lost a slash
    scheme = match[1].lower() if match else ""
    if match is None or (scheme not in SCHEMES and (isinstance(value, Path) or len(match[2]) == 1)):
        return Path(value)
    if scheme not in SCHEMES:
        raise InputError(f"{value}: the scheme {match[1]}:// is not supported; allowed are {ALLOWED}")
    if not match[3] or "?" in match[3]:
        fault = "has a query (?)" if match[3] else "names no bucket"
        raise InputError(f"{value}: the URI {fault}; allowed are {ALLOWED}, with settings in environment variables")
    return ObjectPath(f"{scheme}:/{match[3]}")


def local_path(value: Path | str) -> Path:
    """The local path. Raises InputError for a URI."""
    if isinstance(location(value), ObjectPath):
        raise InputError(f"{value}: an object store is not supported here; give a local path")
    return Path(value)


def readable(path: Path) -> Path | NativeFile:
    """The argument for pyarrow's Parquet readers: a local path itself, an object as a file with range reads.

    Raises FileNotFoundError if the object does not exist.
    """
    if not isinstance(path, ObjectPath):
        return path
    with _answering(path):
        return path.filesystem.open_input_file(path.key)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A local path, or a temporary local copy of an object or of the objects below a prefix, with the same name."""
    if not isinstance(path, ObjectPath):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        path.download(Path(scratch, path.name))
        yield Path(scratch, path.name)


def _if_text(convert: Callable[[Path | str], Path]) -> BeforeValidator:
    """Converts text and paths; pydantic refuses other values."""
    return BeforeValidator(lambda value: convert(value) if isinstance(value, str | Path) else value)


Location = Annotated[Path, _if_text(location)]
LocalPath = Annotated[Path, _if_text(local_path)]


@lru_cache
def _filesystem(scheme: str, bucket: str) -> tuple[FileSystem, str]:
    """The file system and the path of the bucket in it. `scheme` ends with a colon."""
    import pyarrow
    import pyarrow.fs

    options = "?retry_limit_seconds=60" if scheme in ("gs:", "gcs:") else ""  # the default is 15 minutes
    try:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(f"{scheme}//{bucket}{options}")
        return filesystem, root.rstrip("/")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise InputError(f"{scheme}//{bucket}: {_short(error)}; allowed are {ALLOWED}") from None


@contextmanager
def _answering(path: ObjectPath) -> Iterator[None]:
    """Raises UnavailableError for an error of the object store other than a missing object."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnavailableError(f"{path}: the object store does not answer or denies access ({_short(error)})") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
