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
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

__all__ = ["SITE", "Beside", "beside"]

SITE = "rewriter_site"
"""Where the metadata of the op's node has the name of the site."""

_KEPT: Any = WeakTensorKeyDictionary()
"""For each tensor of keys: its version, and what is kept by name, beside which values."""


@dataclass(frozen=True)
class Beside:
    """What one site keeps beside its cache, in one call."""

    name: tuple[Any, ...]
    """Whose value it is: the site, what it computes, and the weights it computes it with."""
    full: Tensor
    """The keys after this call, as they go into the cache."""
    past: Tensor | None
    """The keys before this call, as they came out of the cache; None if there were none."""
    full_values: Tensor | None = None
    """As `full`, the values, where what is kept depends on them too."""
    past_values: Tensor | None = None

    def recall(self) -> Any | None:
        """What was kept for exactly the keys before this call; None if nothing was."""
        if self.past is None or self.past not in _KEPT:
            return None
        version, kept = _KEPT[self.past]
        if version != _version(self.past) or self.name not in kept:
            return None
        value, values, version = kept[self.name]
        return value if _is_same(values, version, self.past_values) else None

    def keep(self, value: Any) -> None:
        """Keeps a value for the keys after this call."""
        x = self.full_values
        entry = (value, None, 0) if x is None else (value, cast(Any, TensorWeakRef)(x), _version(x))
        now = _version(self.full)
        if self.full in _KEPT and _KEPT[self.full][0] == now:
            _KEPT[self.full][1][self.name] = entry
        else:
            _KEPT[self.full] = (now, {self.name: entry})


def _is_same(kept: Any, version: int, x: Tensor | None) -> bool:
    """x is the tensor that was there, and nothing was written into it since."""
    if kept is None or x is None:
        return kept is None and x is None
    return kept() is x and _version(x) == version


def _version(x: Tensor) -> int:
    """How often the tensor was written to; of an inference tensor that is not known."""
    return -1 if x.is_inference() else x._version


def beside(
    full: Tensor,
    past: Tensor | None,
    name: tuple[Any, ...],
    weights: Sequence[Tensor] = (),
    values: tuple[Tensor, Tensor | None] | None = None,
    *,
    by_place: bool = False,
) -> Beside | None:
    """The handle for one call of a site; None where nothing can be kept safely.

    Args:
        full: the keys after the call, the very tensor that leaves the graph.
        past: those before it, the very tensor that entered the graph; None if there was none.
        name: of the value.
        weights: parameters that it depends on; when one is written to, the value is forgotten.
        values: as `full` and `past`, the values, for what depends on them too.
        by_place: the value says something of the places of keys and does not depend on what stands
            there: then it is kept where gradients are recorded or no changes can be seen, too.
    """
    if torch.is_grad_enabled() and not by_place:
        return None
    past = None if past is None or not past.numel() else past
    full_values, past_values = values or (None, None)
    read = (full, past, full_values, past_values, *weights)
    # changes of inference tensors cannot be seen
    if not by_place and any(x is not None and x.is_inference() for x in read):
        return None
    marks = tuple((x.data_ptr(), x._version) for x in weights)
    return Beside((*name, *marks), full, past, full_values, past_values)
