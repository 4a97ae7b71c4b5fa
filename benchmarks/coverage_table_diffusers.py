"""What cannot be guessed of the transformers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ARGUMENTS", "INPUTS", "LEFT_OUT"]

ARGUMENTS: dict[str, dict[str, Any]] = {}
"""Arguments of a constructor."""

INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
"""Arguments of a forward, from the configuration and a generator of random numbers."""

LEFT_OUT: dict[str, str] = {}
"""Why an architecture cannot be built here."""
