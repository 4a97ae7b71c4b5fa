"""Loggers of other libraries, kept quiet for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["logging_at"]


@contextmanager
def logging_at(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """One logger, and those below it, from this level on; its own level is back afterwards."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
