"""What several commands need: a file to write, an end to interruptions."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Output = Annotated[Path, arg(aliases=["-o"])]


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which torchrun sends, ends the work as Ctrl-C does: files are finished and temporary ones removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
