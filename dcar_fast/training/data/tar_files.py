"""One tar shard as a stream of samples: opened and grouped by webdataset, damage found and reported."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from dcar_fast.training.data.examples import Skip

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")


def webdataset() -> Any:
    """The webdataset package; ``ValueError`` that says how to get it."""
    try:
        import webdataset
    except ImportError as error:
        raise ValueError(f"data.kind 'shards' needs webdataset ({error}): pip install -e '.[train]'") from error
    return webdataset


def read_samples(url: str, report: Callable[[Skip], None]) -> Iterator[dict[str, Any]]:
    """The samples of a shard in its order: dicts of bytes by suffix (PICTURES, CAPTIONS), and "__key__".

    url: a path, http(s)://..., "pipe:command" or what else webdataset opens. Files with one name up to the first dot
    of the last part make a sample. If the shard cannot be opened, or breaks off, ``report`` is told and the samples
    end.
    """
    wds = webdataset()

    def duplicate(error: Exception) -> bool:
        report(Skip(url, "duplicate name", str(error.args[0])))
        return True  # the first file of that name stays

    yield from wds.tariterators.group_by_keys(_read_files(url, report), handler=duplicate)


def _read_files(url: str, report: Callable[[Skip], None]) -> Iterator[dict[str, Any]]:
    """What ``group_by_keys`` takes: the shard's files that matter, as dicts of name and data."""
    try:
        stream = webdataset().gopen(url, "rb")
    except (OSError, ValueError) as error:
        report(Skip(url, "unreadable shard", str(error)))
        return
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedHeader) as archive:
            for member in archive:
                suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
                if member.isreg() and suffix in PICTURES + CAPTIONS:
                    data = archive.extractfile(member).read()
                    if len(data) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield {"fname": member.name, "data": data, "__url__": url}
                archive.members = []  # else every header of the shard stays in memory
        while stream.read(1 << 20):  # what follows the end mark, so that a command is not cut off
            pass
        stream.close()  # fails if a command did
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        report(Skip(url, "broken shard", f"the rest of it is left out: {error}"))
    finally:
        with suppress(OSError):  # a command that was cut off fails, and an error has been reported
            stream.close()


class _CheckedHeader(tarfile.TarInfo):
    """A damaged header is an error: tarfile takes it for the archive's end, as it does with no header at all."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """As in the base class."""
        if not buf:
            raise tarfile.ReadError("the archive ends without an end mark")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # the end mark is a block of zeros
                raise tarfile.ReadError(f"damaged header: {error}") from error
            raise
