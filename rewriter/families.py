"""The families of specs, and how one is read back."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from rewriter.errors import SpecError
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["FAMILIES", "from_dict", "from_json"]

FAMILIES: dict[str, Any] = {kind.family: kind for kind in (SoftmaxSpec, LinearSpec)}


def from_dict(data: dict[str, Any]) -> Spec:
    """The spec of any family that `Spec.to_dict` wrote.

    Raises:
        SpecError: if the data is not such a spec.
    """
    family = data.get("family")
    if family not in FAMILIES:
        raise SpecError(f"there is no family {family!r}; one of {', '.join(FAMILIES)}")
    spec: Spec = FAMILIES[family].from_dict(data)
    return spec


@lru_cache(maxsize=4096)
def from_json(text: str) -> Spec:
    """The spec of any family that `Spec.to_json` wrote; parsed once a text."""
    return from_dict(json.loads(text))
