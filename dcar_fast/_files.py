"""Files that are either the old ones or the new ones, never halves."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write(temporary)`` beside ``path``, flushes it to disk and renames it: an interruption leaves the old
    file whole. ``ValueError`` if the folder cannot be written."""
    write_all_atomically({path: write})


def write_all_atomically(files: dict[Path, Callable[[Path], None]]) -> None:
    """The same for several files: all are written before the first is renamed, and renamed in the order given.

    An exception on the way, an interrupt included, puts back what was renamed: all old files or all new ones.
    """
    staged: dict[Path, Path] = {}  # final name -> temporary one
    old: dict[Path, Path] = {}  # final name -> a second name of what was there
    try:
        for path, write in files.items():
            staged[path] = _temporary(path)
            write(staged[path])
            with open(staged[path], "rb+") as file:
                os.fsync(file.fileno())
            staged[path].chmod(0o666 & ~_umask())
        for path in files if len(files) > 1 else ():
            if path.exists():
                old[path] = _temporary(path)
                _duplicate(path, old[path])
        _rename(staged, old)
    finally:
        for temporary in (*staged.values(), *old.values()):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """``ValueError`` unless a file can be made at ``path``; its folder is made if missing."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    _temporary(path).unlink()


def _rename(staged: dict[Path, Path], old: dict[Path, Path]) -> None:
    try:
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except BaseException as error:
        # what was renamed has lost its temporary name: an interrupt may come between any two instructions
        for renamed in [path for path, temporary in staged.items() if not temporary.exists()]:
            if renamed in old:
                os.replace(old[renamed], renamed)
            else:
                renamed.unlink()
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        raise


def _temporary(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def _duplicate(path: Path, copy: Path) -> None:
    """``copy`` becomes a second name of the file, or a copy where the file system has no hard links."""
    copy.unlink()
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _umask() -> int:
    """The process's umask; elsewhere than on Linux it can only be read by setting it, which other threads may see."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
