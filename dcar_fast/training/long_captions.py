"""Captions that are cut: said once in a training, which would else say it of a large part of them at every step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dcar_fast.models import text_encoder


class SaidOnce(logging.Filter):
    """Lets the first warning of a cut caption through."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        first, self.said = not self.said, True
        if first:
            record.msg = f"{record.msg} (longer captions are cut from here on without a word)"
        return first

    @contextmanager
    def applied(self) -> Iterator[None]:
        """To what the text encoder says inside the block."""
        text_encoder.log.addFilter(self)
        try:
            yield
        finally:
            text_encoder.log.removeFilter(self)
