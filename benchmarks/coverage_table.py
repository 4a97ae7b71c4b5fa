"""What the shrinker and the guesses of inputs cannot know of single architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS"]

OPTIONS: dict[str, dict[str, Any]] = {}
"""Arguments of a configuration."""

MODELS: dict[str, str] = {}
"""The model class, where it is not the one that the library registers."""

INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
"""Arguments of a forward, from the configuration and a generator of random numbers."""

LEFT_OUT: dict[str, str] = {}
"""Why an architecture cannot be built here."""
