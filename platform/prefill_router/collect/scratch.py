"""The scratch folder of a sandbox, kept in memory between two commands.

In: a descriptor of the folder while no process of the sandbox runs. Out: its folders, files and symbolic links. Links
are copied as links and never followed, so that none of them leads to a file of the host. Sockets, pipes and devices are
left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from prefill_router.errors import InputError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """A folder, a file or a link. `content`: None of a folder, the target of a link. `mode`: type and permissions."""

    mode: int
    content: bytes | None = None


@dataclass
class Scratch:
    """A scratch folder that several commands use one after the other. `entries`: by path, parents first."""

    entries: dict[str, Entry] = field(default_factory=dict)


class TooLargeError(Exception):
    """The content of a scratch folder exceeds a limit."""


def entries_of(files: Mapping[str, bytes | str]) -> dict[str, Entry]:
    """Files and their folders. Text becomes UTF-8; every file can be executed. Raises InputError for other paths."""
    entries: dict[str, Entry] = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
            raise InputError(f"files: {name!r} must be a path in the scratch folder, such as 'main.py'")
        for parent in reversed(path.parents[:-1]):
            entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        entries[str(path)] = Entry(stat.S_IFREG | 0o755, content.encode() if isinstance(content, str) else content)
    return entries


def write(folder: int, entries: Mapping[str, Entry], owner: int | None) -> None:
    """Write entries into an empty folder. `owner`: uid and gid, None leaves them as they are. Raises OSError."""
    for name, entry in entries.items():
        content = entry.content
        if content is None:
            os.mkdir(name, 0o700, dir_fd=folder)
        elif stat.S_ISLNK(entry.mode):
            continue
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o600, dir_fd=folder), "wb", buffering=0) as file:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) or 0 :]
    # Links are made last: until then no path leads over one.
    for name, entry in reversed(list(entries.items())):
        if stat.S_ISLNK(entry.mode):
            os.symlink(entry.content or b"", name, dir_fd=folder)
        if owner is not None:
            os.chown(name, owner, owner, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            os.chmod(name, stat.S_IMODE(entry.mode) & 0o777, dir_fd=folder)


def read(folder: int, max_bytes: int, max_files: int) -> dict[str, Entry]:
    """The entries of a folder. Raises TooLargeError beyond the limits or for paths that are too long."""
    entries: dict[str, Entry] = {}
    left = max_bytes
    waiting = ["."]
    while waiting:
        parent = waiting.pop()
        try:
            opened = os.open(parent, FOLDER, dir_fd=folder)
            try:
                names = os.listdir(opened)
            finally:
                os.close(opened)
            for name in names:
                path = name if parent == "." else f"{parent}/{name}"
                found = os.stat(path, dir_fd=folder, follow_symlinks=False)
                if len(entries) >= max_files:
                    raise TooLargeError(f"more than {max_files} files")
                if stat.S_ISDIR(found.st_mode):
                    entries[path] = Entry(found.st_mode)
                    os.chmod(path, 0o700, dir_fd=folder)
                    waiting.append(path)
                elif stat.S_ISLNK(found.st_mode):
                    entries[path] = Entry(found.st_mode, os.fsencode(os.readlink(path, dir_fd=folder)))
                elif stat.S_ISREG(found.st_mode):
                    left -= found.st_size  # of a file with holes, more than the space that it takes
                    if left < 0:
                        raise TooLargeError(f"more than {max_bytes} bytes")
                    os.chmod(path, 0o600, dir_fd=folder)
                    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                    with open(file, "rb") as opened_file:
                        entries[path] = Entry(found.st_mode, opened_file.read())
        except OSError as error:
            raise TooLargeError(f"a path cannot be read ({error.strerror})") from None
    return entries
