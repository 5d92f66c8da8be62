"""One writer for a folder: a run's output, a cache of tokens."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".lock"
HELD = (errno.EAGAIN, errno.EACCES)


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Makes the folder and holds the lock on its file ``.lock``, which stays behind: the system frees it when the
    process ends, however it does, and its forked workers do not hold it.

    ``ValueError`` if another process holds it, or the folder cannot be written. Where the file system knows no locks
    this is said and nothing is refused.
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: str | Path) -> None:
    if fcntl is None:
        log.warning("%s is not locked, this system has no fcntl: let no other process write it", folder)
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            raise ValueError(f"{folder} is being written by {holder}; choose another folder") from None
        log.warning("%s is not locked (%s): let no other process write it", folder, error.strerror)
        return
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:  # a full disk
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
