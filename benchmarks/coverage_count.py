"""An independent count of softmaxes: what a model really computes while it runs, seen by torch's
dispatcher, and the module that computes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["counted", "place_of"]

ANCHORS = (
    "aten._softmax",
    "aten._safe_softmax",
    "aten._scaled_dot_product",
    "aten._flash_attention",
    "aten._native_multi_head_attention",
    "aten._transformer_encoder_layer_fwd",
)


def place_of(path: str) -> str:
    """A path without its numbers: `layers.3.attn` is `layers.*.attn`."""
    return re.sub(r"(?<![^.#])\d+(?![^.#])", "*", path)


class _Counting(TorchDispatchMode):
    """Counts the calls of softmax and of fused attention by module; one inside another is none."""

    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self.where = where
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(ANCHORS) and "backward" not in name:
            self.calls[place_of(self.where[-1])] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """The number of softmaxes by place (`place_of` of the module), filled while the block runs."""
    where = [""]
    handles = []

    def enter(path: str) -> Any:
        return lambda *_: where.append(path)

    def leave(*_: Any) -> None:
        where.pop()

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    mode = _Counting(where)
    try:
        with mode:
            yield mode.calls
    finally:
        for handle in handles:
            handle.remove()
