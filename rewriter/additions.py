"""What passes add to a model: new parameters, what the user gives at run time, and loss terms.

The parameters are ordinary parameters of the model under `rewriter.<site>.<tensor>.<name>`, so that
optimisers, `state_dict`, `named_parameters` and moves to another device see them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewriter.errors import InputError
from rewriter.stages import Parameter

__all__ = [
    "NAME",
    "Gift",
    "Given",
    "addition",
    "additions_of",
    "discard",
    "forget",
    "given_to",
    "initial_value",
    "lent",
    "not_asked_for",
    "restored_additions",
    "saved_additions",
    "without_additions",
]

NAME = "rewriter"
"""The child of the model that holds what passes added."""


class Additions(nn.Module):
    """One level of the path of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()
        """At the first level: full names that graphs asked for since the model was optimized."""
        self.fresh: set[str] = set()
        """At the first level: those that were made in the last call."""

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError("this module holds parameters; it computes nothing")


def additions_of(model: nn.Module) -> Additions | None:
    """What passes added to the model; None if nothing was added."""
    found = model._modules.get(NAME)
    return found if isinstance(found, Additions) else None


def addition(
    model: nn.Module, path: str, wanted: Parameter, dtype: torch.dtype, device: torch.device
) -> str:
    """The full name of a parameter at the path, which is made if it is not there.

    Raises:
        InputError: if it is there in another shape: it belongs to another plan; if it has the name
            of an attribute of modules.
    """
    holder = _holder(model, path)
    name = f"{NAME}.{path}.{wanted.name}"
    root = cast(Additions, additions_of(model))
    root.asked.add(name)
    known = {**holder._parameters, **holder._buffers}.get(wanted.name)
    if known is not None:
        if tuple(known.shape) != wanted.shape:
            raise InputError(
                f"{name} has shape {tuple(known.shape)}, and this plan needs {wanted.shape}: it "
                "belongs to another plan; call rewriter.restore(model) first"
            )
        return name
    if hasattr(holder, wanted.name):
        raise InputError(f"{name}: {wanted.name!r} is something that every module has; rename it")
    root.fresh.add(name)
    value = initial_value(wanted).to(device, dtype)
    if wanted.trained:
        holder.register_parameter(wanted.name, nn.Parameter(value))
    else:
        holder.register_buffer(wanted.name, value)
    return name


def _holder(model: nn.Module, path: str) -> Additions:
    holder = additions_of(model)
    if holder is None:
        if hasattr(model, NAME):
            raise InputError(f"{type(model).__name__} has something called {NAME!r} of its own")
        holder = Additions()
        model.add_module(NAME, holder)
    for part in path.split("."):
        child = holder._modules.get(part)
        if not isinstance(child, Additions):
            child = Additions()
            holder._modules[part] = child
        holder = child
    return holder


def initial_value(wanted: Parameter, generator: torch.Generator | None = None) -> Tensor:
    """What a new parameter is filled with, in float32."""
    if wanted.initial == "eye":
        rows, columns = wanted.shape[-2:]
        return torch.eye(rows, columns).expand(wanted.shape).clone()
    if wanted.initial == "kaiming":
        bound = 1.0 / math.sqrt(wanted.shape[-2])
        return torch.empty(wanted.shape).uniform_(-bound, bound, generator=generator)
    return torch.full(wanted.shape, float(wanted.initial))


def discard(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Takes away what passes added: all of it, or what has these full names."""
    root = additions_of(model)
    if root is None:
        return
    for name in () if names is None else names:
        path, _, last = name.removeprefix(f"{NAME}.").rpartition(".")
        delattr(root.get_submodule(path), last)
    if names is None or not root.state_dict():
        del model._modules[NAME]


def not_asked_for(model: nn.Module, sites: Collection[str]) -> list[str]:
    """The full names of what was added to these sites and no graph has asked for."""
    root = additions_of(model)
    if root is None:
        return []
    names = (f"{NAME}.{name}" for name in root.state_dict())
    ours = tuple(f"{NAME}.{site}." for site in sites)
    return [name for name in names if name.startswith(ours) and name not in root.asked]


@contextmanager
def without_additions(model: nn.Module) -> Iterator[None]:
    """The model as if nothing had been added to it; what is added meanwhile is gone afterwards."""
    found = model._modules.pop(NAME, None) if additions_of(model) is not None else None
    try:
        yield
    finally:
        discard(model)
        if found is not None:
            model._modules[NAME] = found


@contextmanager
def lent(source: nn.Module, to: nn.Module) -> Iterator[None]:
    """`to` has for a while what was added and given to `source`, the very same parameters."""
    found, before = additions_of(source), to._modules.get(NAME)
    if source is to:
        found = None
    given = _GIVEN.get(to)
    try:
        if found is not None:
            to._modules[NAME] = found
        _GIVEN[to] = replace(given_to(source), losses={})
        yield
    finally:
        if found is not None:
            to._modules.pop(NAME, None)
            if before is not None:
                to._modules[NAME] = before
        if given is None:
            _GIVEN.pop(to, None)
        else:
            _GIVEN[to] = given


def saved_additions(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Everything that passes added, by full name, and which of it are buffers."""
    found = additions_of(model)
    if found is None:
        return {}, []
    values = {f"{NAME}.{n}": x.detach().cpu().contiguous() for n, x in found.state_dict().items()}
    return values, [f"{NAME}.{n}" for n, _ in found.named_buffers()]


def restored_additions(
    model: nn.Module, values: Mapping[str, Tensor], buffers: Sequence[str]
) -> None:
    """Puts saved parameters in their places, by their full names."""
    like = next((p for p in model.parameters()), torch.empty(()))
    for full, value in values.items():
        path, _, name = full.removeprefix(f"{NAME}.").rpartition(".")
        wanted = Parameter(name, tuple(value.shape), trained=full not in buffers)
        addition(model, path, wanted, value.dtype, like.device)
        with torch.no_grad():
            cast(Tensor, getattr(_holder(model, path), name)).copy_(value)


# --- what the user gives at run time --------------------------------------------------------------


@dataclass(eq=False)
class Gift:
    """What one call of `rewriter.give` hands over."""

    labels: Tensor | None = None
    """int64 `[B, M]`: the group of each token of the prompt, 0 for none."""
    patches: dict[str, Tensor] | None = None
    """Head outputs `[B, H, L, Dv]` by the name of the site."""
    handle: weakref.ref[Any] | None = None
    """Who can take it back; gone, if nobody can any more."""


@dataclass
class Given:
    """Tensors for one model that no graph computes, and the loss terms of its last call."""

    gifts: list[Gift] = field(default_factory=list)
    """The last one counts."""
    losses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, gift: Gift) -> None:
        """The gift counts from now on. Those that a later one hides for ever are forgotten."""
        hidden: set[str] = set()
        kept = []
        for one in reversed(self.gifts):
            says = {name for name in ("labels", "patches") if getattr(one, name) is not None}
            if says <= hidden:
                continue
            kept.append(one)
            if one.handle is not None and one.handle() is None:
                hidden |= says
        self.gifts[:] = [*reversed(kept), gift]

    @property
    def labels(self) -> Tensor | None:
        return next((x.labels for x in reversed(self.gifts) if x.labels is not None), None)

    @property
    def patches(self) -> dict[str, Tensor]:
        return next((x.patches for x in reversed(self.gifts) if x.patches is not None), {})


_GIVEN: weakref.WeakKeyDictionary[nn.Module, Given] = weakref.WeakKeyDictionary()


def given_to(model: nn.Module) -> Given:
    """What was given to the model."""
    return _GIVEN.setdefault(model, Given())


def forget(model: nn.Module) -> None:
    """Nothing is given to the model."""
    _GIVEN.pop(model, None)
