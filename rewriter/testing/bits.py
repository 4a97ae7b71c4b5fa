"""Equal to the last bit: tensors, outputs, and the whole of a model before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.isolation import COMPILED
from rewriter.optimize import requests_of
from rewriter.passbase import Request
from rewriter.verify.leaves import Leaves

__all__ = ["Trace", "different", "tells", "tensors_of", "unequal"]


def unequal(what: str, want: Leaves, found: Leaves) -> str:
    reason = different(f"the outputs of {what}", want.tensors, found.tensors)
    if reason:
        return reason
    for name, value in want.values.items():
        if not isinstance(value, Tensor) and value != found.values.get(name):
            return f"{what} gives {found.values.get(name)!r} for {name}, not {value!r}"
    return ""


def different(what: str, want: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first tensor that has other bits."""
    if want.keys() != found.keys():
        missing, more = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
        return f"{what}: {f'no {missing[0]}' if missing else f'also {more[0]}'}"
    for name, x in want.items():
        y = found[name]
        if (x.dtype, x.shape, x.device) != (y.dtype, y.shape, y.device):
            return f"{what}: {name} is {y.dtype} {list(y.shape)}, was {x.dtype} {list(x.shape)}"
        if not _same_bits(x, y):
            count = int((x != y).sum())
            apart = float((x.double() - y.double()).abs().max()) if not x.is_complex() else 0.0
            return f"{what}: {name} differs in {count} of {x.numel()} values, by up to {apart:.1e}"
    return ""


def _same_bits(x: Tensor, y: Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return torch.equal(a, b)


def tells(x: Tensor) -> bool:
    """Not empty, and not one number everywhere."""
    return x.numel() > 1 and not bool((x == x.flatten()[0]).all()) and not bool(x.isnan().all())


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state, and buffers that are not part of it."""
    return {**dict(module.named_buffers()), **module.state_dict()}


@dataclass(frozen=True)
class Trace:
    """Everything of a model that a check could leave changed."""

    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    installed: tuple[Any, ...]
    requests: tuple[Request, ...]
    modes: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Trace:
        return cls(
            {n: x.detach().clone() for n, x in tensors_of(model).items()},
            {n: p.grad for n, p in model.named_parameters()},
            tuple(m.__dict__.get(COMPILED) for m in model.modules()),
            requests_of(model),
            tuple(m.training for m in model.modules()),
        )

    def differs(self, now: Trace) -> str:
        reason = different("the model that was given", self.tensors, now.tensors)
        if reason:
            return reason
        same_gradients = all(now.gradients[n] is x for n, x in self.gradients.items())
        kept = {
            "a compiled call": self.installed == now.installed,
            "its requests": self.requests == now.requests,
            "its mode": self.modes == now.modes,
            "a gradient": same_gradients,
        }
        return next(
            (f"{what} of the given model has changed" for what, ok in kept.items() if not ok), ""
        )
