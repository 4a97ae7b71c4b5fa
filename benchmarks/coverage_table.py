"""What neither the shrinker nor the guesses of inputs can know of architectures of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import coverage_table_audio as audio
import coverage_table_multimodal as multimodal
import coverage_table_text as text
import coverage_table_vision as vision

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS", "VARIANTS"]

OPTIONS: dict[str, dict[str, Any]] = {
    **text.OPTIONS,
    **vision.OPTIONS,
    **audio.OPTIONS,
    **multimodal.OPTIONS,
}
"""Arguments of a configuration."""

MODELS: dict[str, str] = {**text.MODELS, **vision.MODELS, **audio.MODELS, **multimodal.MODELS}
"""The model class, where it is not the one that the library registers: its name, or its path below
transformers.models; after a colon, the part of the configuration that it is made from."""

INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    **text.INPUTS,
    **vision.INPUTS,
    **audio.INPUTS,
    **multimodal.INPUTS,
}
"""Arguments of a forward, from the configuration and a generator of random numbers."""

VARIANTS = text.VARIANTS

LEFT_OUT: dict[str, str] = {
    **text.LEFT_OUT,
    **vision.LEFT_OUT,
    **audio.LEFT_OUT,
    **multimodal.LEFT_OUT,
}
"""Why an architecture cannot be built here."""
