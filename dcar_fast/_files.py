"""Files that are either the old ones or the new ones, never halves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write(temporary)`` beside ``path``, flushes it to disk and renames it: an interruption leaves the old
    file whole. ``ValueError`` if the folder cannot be written."""
    write_all_atomically({path: write})


def write_all_atomically(files: dict[Path, Callable[[Path], None]]) -> None:
    """The same for several files, renamed only after all of them are written, in the order given."""
    staged: list[tuple[Path, Path]] = []
    try:
        for path, write in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
            except OSError as error:
                raise ValueError(f"{path} cannot be written: {error.strerror}") from error
            os.close(handle)
            temporary = Path(name)
            staged.append((temporary, path))
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
        for temporary, path in staged:
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: Path) -> None:
    """``ValueError`` unless a file can be made at ``path``; its folder is made if missing."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
