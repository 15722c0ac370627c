"""A lock on an output folder, so that one process writes to it at a time.

In: a folder. Out: a context that holds the lock. The lock is `flock` on FOLDER/.lock: the system releases it when the
process ends, also after `kill -9`. The file names the owner and is deleted with the lock. An object store and a file
system without `flock` have no lock. Knows nothing of the content of the folder.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from prefill_router.errors import InputError
from prefill_router.files import remove_temporary
from prefill_router.locations import ObjectPath

LOCK = ".lock"
POLL_S = 0.2


@contextmanager
def locked(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of `folder`, which is created if it is missing and deleted at the end if it is still empty.

    Deletes temporary files that killed processes left in the folder. Raises InputError if another process holds the
    lock for longer than `wait_s` seconds, with its host, process id and start, and if the folder cannot be written.
    """
    if isinstance(folder, ObjectPath):
        yield
        return
    folder = folder.resolve()
    created = [one for one in (folder, *folder.parents) if not one.exists()]
    file = _acquire(folder, wait_s)
    try:
        remove_temporary(folder.rglob(".*.tmp"))
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # a folder with files stays
            for one in created:
                one.rmdir()


def _acquire(folder: Path, wait_s: float) -> BinaryIO:
    ends = time.monotonic() + wait_s
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("ab+", buffering=0)
        except FileNotFoundError:  # another process deleted the folder since
            continue
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another output folder") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace") or "another process"
            file.close()
            if time.monotonic() >= ends:
                raise InputError(
                    f"{folder}: locked by {owner}; wait until it ends or end it, or choose another output folder"
                ) from None
            time.sleep(POLL_S)
            continue
        except OSError:  # the file system has no locks
            return file
        if _is_same(file, folder / LOCK):
            with suppress(OSError):  # a full disk: the owner is only named in messages
                file.truncate(0)
                file.write(_owner().encode())
            return file
        file.close()  # its owner has deleted it


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner() -> str:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    command = shlex.join(["python", *sys.orig_argv[1:]])[:100]
    return f"process {os.getpid()} on {socket.gethostname()} since {started} ({command})"
