"""Faults of what is done to a model and undone: restore, a second rewriting, plans, files, ONNX.

Saving and loading takes a model that transformers can name; that one is `saved_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mutants.catalogue import Mutant
from mutants.lifts import Broken
from rewriter import checkpoint
from rewriter import plan as plans

__all__ = ["LAYERED", "MUTANTS", "SAVED", "Trip", "saved_model"]

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
    saved: bool = False
    """Made with `saved_model`."""


SCALED = ("heads.scale(heads=[0], by=0.5)",)
LAYERED = ("heads.scale(heads=[1], by=0.25) @ 0", "fuse(from_scores=0) @ 1")


SAVED = ("heads.scale(heads=[1], by=0.25) @ 0", "sparse.window(window=3) @ 1")


def saved_model() -> tuple[nn.Module, dict[str, Any]]:
    """A decoder of two layers, and its inputs."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 53, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, initializer_range=0.2, attn_implementation="eager"
    )
    ids = torch.randint(3, 53, (2, 7), generator=torch.Generator().manual_seed(0))
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids, "use_cache": False}


def fault(
    owner: Any, attribute: str, name: str, only: str, breaks: str = "", passes: Any = SCALED
) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        broken, saved = Broken(((owner, attribute, function),)), passes is SAVED
        made = Trip(broken, passes, ("rewrite", only), saved)
        MUTANTS.append(Mutant(name, "round trip", breaks, f"round trip: {only}", made))
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


# --- saved and loaded -----------------------------------------------------------------------------

_save, _open = TRIPS.save, checkpoint.open_directory


@fault(plans.Plan, "to_dict", "saved plan drops a pass", "save and load", passes=SAVED)
def saved_without_last(self: Any) -> Any:
    return _to_dict(replace(self, passes=self.passes[:-1]))


@fault(TRIPS, "load", "load ignores the selector", "save and load", passes=SAVED)
def load_everywhere(directory: Any) -> Any:
    model, plan = _open(directory)
    bare = [replace(r, selector=type(r.selector)()) for r in plan.passes]
    return _optimize(model, *bare, target=plan.target)


@fault(TRIPS, "load", "load of the original alone", "save and load", "the plan unread", SAVED)
def load_original(directory: Any) -> Any:
    return _open(directory)[0]


@fault(TRIPS, "save", "a factor saved in the weights", "plain load", "folded, then saved", SAVED)
def save_folded(model: nn.Module, directory: Any) -> None:
    weight = dict(model.named_parameters())["model.layers.0.self_attn.o_proj.weight"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, 8:16] *= 0.25
    _save(model, directory)
    with torch.no_grad():
        weight.copy_(before)


@fault(TRIPS, "save", "weights saved in bfloat16", "plain load", "the dtype of the run", SAVED)
def save_rounded(model: nn.Module, directory: Any) -> None:
    before = {n: x.detach().clone() for n, x in model.named_parameters()}
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(x.to(torch.bfloat16))
    _save(model, directory)
    with torch.no_grad():
        for n, x in model.named_parameters():
            x.copy_(before[n])
