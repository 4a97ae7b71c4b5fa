"""What is kept beside a KV cache: a value that belongs to the keys of a tensor.

A model that generates text hands the keys of the last call back to the next one, with new ones
behind them. What was worked out for those keys (the state of linear attention, the sums of blocks,
the labels of a prompt) is found again by the identity of that tensor. It is a memory only: where
nothing is found, because the cache was reordered, cropped, cloned or filled elsewhere, the value is
worked out from the keys again, or the caller refuses. Values die with their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Beside", "beside"]

_KEPT: Any = WeakTensorKeyDictionary()
"""For each tensor of keys: its version, and what is kept by name."""


@dataclass(frozen=True)
class Beside:
    """What one site keeps beside its cache, in one call."""

    name: tuple[Any, ...]
    """Whose value it is: the site, what it computes, and the weights it computes it with."""
    full: Tensor
    """The keys after this call, as they go into the cache."""
    past: Tensor | None
    """The keys before this call, as they came out of the cache; None if there were none."""

    def recall(self) -> Any | None:
        """What was kept for exactly the keys before this call; None if nothing was."""
        if self.past is None or self.past not in _KEPT:
            return None
        version, values = _KEPT[self.past]
        return values.get(self.name) if version == self.past._version else None

    def keep(self, value: Any) -> None:
        """Keeps a value for the keys after this call."""
        if self.full in _KEPT and _KEPT[self.full][0] == self.full._version:
            _KEPT[self.full][1][self.name] = value
        else:
            _KEPT[self.full] = (self.full._version, {self.name: value})


def beside(
    full: Tensor,
    past: Tensor | None,
    name: tuple[Any, ...],
    weights: Sequence[Tensor] = (),
) -> Beside | None:
    """The handle for one call of a site; None where nothing can be kept safely.

    Args:
        full: the keys after the call, the very tensor that leaves the graph.
        past: those before it, the very tensor that entered the graph; None if there was none.
        name: of the value.
        weights: parameters that it depends on; when one is written to, the value is forgotten.
    """
    if torch.is_grad_enabled():
        return None
    past = None if past is None or not past.numel() else past
    kept = (full, *weights) if past is None else (full, past, *weights)
    if any(x.is_inference() for x in kept):  # their changes cannot be seen
        return None
    marks = tuple((x.data_ptr(), x._version) for x in weights)
    return Beside((*name, *marks), full, past)
