"""Rewrites that are wrong on purpose, and models that are hard to watch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
import torch
from torch import Tensor, nn

import rewriter
from rewriter import lowering, op
from rewriter.passbase import Pass
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from verify.small_models import Shape, Tower

FUSE = "fuse(from_scores=0)"
SMALL = Shape()


@dataclass(frozen=True)
class Lie(Pass):
    """Says that the function stays the same, and scales the scores of one layer by 1.02."""

    name: ClassVar[str] = "test.lie"
    contract: ClassVar[str] = "exact"  # type: ignore[assignment]
    stage: ClassVar[str] = "score"
    layer: int = 1

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        wrong = site.layer == self.layer
        return replace(spec, scale=spec.scale * sympy.Float(1.02)) if wrong else spec


@contextmanager
def implemented(forward: Callable[..., Tensor]) -> Iterator[None]:
    """Target `torch.blocked` is computed by another function for a while."""
    before = lowering._TARGETS["torch.blocked"]
    lowering._TARGETS["torch.blocked"] = (replace(lowering.BLOCKED, forward=forward),)
    _forget()
    try:
        yield
    finally:
        lowering._TARGETS["torch.blocked"] = before
        _forget()


def _forget() -> None:
    """What was chosen for shapes that have been seen."""
    lowering._chosen.cache_clear()
    op._chosen_for.cache_clear()


def pair(
    *passes: str | Pass, shape: Shape = SMALL, dtype: torch.dtype = torch.float32
) -> tuple[Tower, Tower]:
    """A small model, and a copy that is optimized."""
    torch.manual_seed(0)
    original = Tower(shape).to(dtype).eval()
    model = copy.deepcopy(original)
    rewriter.optimize(model, *(passes or (FUSE,)))
    return original, model


class Looped(nn.Module):
    """One attention, computed twice by one graph that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(Shape(layers=1))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        for block in (self.tower.blocks[0], self.tower.blocks[0]):
            x = block(x, pad)
            torch._dynamo.graph_break()
        return x


class Restless(nn.Module):
    """Draws noise and counts its calls, inside the graph."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(Shape(layers=1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        self.steps.add_(1.0)
        x = x + torch.rand(x.shape) * self.steps
        hidden: Tensor = self.tower(x, pad)["hidden"]
        return hidden
