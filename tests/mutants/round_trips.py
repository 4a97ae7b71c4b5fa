"""Faults of what is done to a model and undone: restore, a second rewriting, plans, files, ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mutants.catalogue import Mutant
from mutants.lifts import Broken
from rewriter import plan as plans

__all__ = ["MUTANTS", "Trip"]

MUTANTS: list[Mutant] = []

TRIPS: Any = import_module("rewriter.testing.round_trips")
OPTIMIZE: Any = import_module("rewriter.optimize")
EXPORT: Any = import_module("rewriter.export")


@dataclass(frozen=True)
class Trip:
    """What is broken, the requests, and the round trips that are made."""

    broken: Broken
    passes: tuple[str, ...]
    only: tuple[str, ...]


SCALED = ("heads.scale(heads=[0], by=0.5)",)
LAYERED = ("heads.scale(heads=[1], by=0.25) @ 0", "fuse(from_scores=0) @ 1")


def fault(
    owner: Any, attribute: str, name: str, only: str, breaks: str = "", passes: Any = SCALED
) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        made = Trip(Broken(((owner, attribute, function),)), passes, ("rewrite", only))
        MUTANTS.append(Mutant(name, "round trip", breaks, only, made))
        return function

    return add


_restore, _optimize = OPTIMIZE.restore, OPTIMIZE.optimize


@fault(TRIPS, "restore", "restore leaves the compiled call", "restore")
def restore_half(model: nn.Module) -> nn.Module:
    OPTIMIZE._STATES.pop(model, None)
    return model


@fault(TRIPS, "restore", "restore leaves a factor in the weights", "restore", "folded, not undone")
def restore_rounds(model: nn.Module) -> nn.Module:
    _restore(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.0001)
    return model


@fault(TRIPS, "restore", "restore forgets a buffer", "restore")
def restore_without_buffer(model: nn.Module) -> nn.Module:
    _restore(model)
    next(model.modules()).register_buffer("left", torch.ones(1))
    return model


@fault(
    TRIPS, "optimize", "rewriting twice applies a pass twice", "optimize twice", "not idempotent"
)
def optimize_again(model: nn.Module, *passes: Any, target: str = "auto") -> nn.Module:
    before = OPTIMIZE.requests_of(model)
    return _optimize(model, *before, *passes, target=target)


_to_dict = plans.Plan.to_dict


@fault(plans.Plan, "to_dict", "plan drops a pass", "plan", passes=LAYERED)
def plan_without_last(self: Any) -> Any:
    return _to_dict(replace(self, passes=self.passes[:-1]))


@fault(plans.Plan, "to_dict", "plan drops the layers of a request", "plan", passes=LAYERED)
def plan_everywhere(self: Any) -> Any:
    bare = tuple(replace(r, selector=type(r.selector)()) for r in self.passes)
    return _to_dict(replace(self, passes=bare))


_export = EXPORT.export_onnx


@fault(TRIPS, "export_onnx", "ONNX with a static length", "export", "the length of the example")
def static_onnx(model: Any, inputs: Any, path: Any, **options: Any) -> Any:
    return _export(model, inputs, path, **options | {"dynamic": False})


@fault(TRIPS, "export_onnx", "ONNX of the model before the pass", "export")
def plain_onnx(model: Any, inputs: Any, path: Any, **options: Any) -> Any:
    return _export(TRIPS._plain(model), inputs, path, **options)
