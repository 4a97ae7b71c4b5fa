"""Faults of what is put into a graph, in a model of two layers that `verify` then judges.

The formula is right; operands, layouts, sizes, places and gradients around it are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mutants.catalogue import Mutant
from mutants.lifts import Broken
from rewriter import assemble, insert
from rewriter.capture import Captured
from rewriter.reading import value_of

__all__ = ["MUTANTS", "WINDOWED", "Planted", "Two", "inputs"]

MUTANTS: list[Mutant] = []

H, HKV, D = 4, 2, 8
FUSED = ("fuse(from_scores=0)",)
WINDOWED = ("fuse(from_scores=0)", "sparse.window(window=3) @ 1")


class Attention(nn.Module):
    """Grouped queries, causal, padded, with slopes."""

    def __init__(self, scale: float, in_place: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)
        self.k, self.v = nn.Linear(H * D, HKV * D), nn.Linear(H * D, HKV * D)
        self.slopes = nn.Parameter(torch.rand(H))
        self.scale, self.in_place = scale, in_place

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        own = v
        k, v = (y.repeat_interleave(H // HKV, dim=1) for y in (k, v))
        place = torch.arange(x.shape[1])
        seen = (place <= place[:, None]) & pad[:, None, None, :]
        s = q @ k.mT * self.scale + self.slopes.view(-1, 1, 1) * (place - place[:, None])
        weights = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
        if self.in_place:
            own.mul_(2.0)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Two(nn.Module):
    """Two layers on x `[B, L, 32]` and pad `[B, L]`."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(s, in_place) for s in (0.35, 0.5))

    def forward(self, x: Tensor, pad: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x, pad)
        return {"hidden": x}


def inputs(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pad = torch.ones(2, length, dtype=torch.bool)
    pad[seed % 2, -2:] = False
    return {"x": torch.randn(2, length, H * D, generator=generator), "pad": pad}


@dataclass(frozen=True)
class Planted:
    """What is broken, and how the model is optimized."""

    broken: Broken
    passes: tuple[str, ...] = FUSED
    in_place: bool = False


def planted(
    owner: Any,
    attribute: str,
    name: str,
    breaks: str = "",
    expected: str = "verify: output",
    **more: Any,
) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        made = Planted(Broken(((owner, attribute, function),)), **more)
        MUTANTS.append(Mutant(name, "graph", breaks, expected, made))
        return function

    return add


_operands, _shaped, _size = insert._operands, insert._Maker.shaped, insert._Maker.size


@planted(insert, "_operands", "keys without their values in another order")
def swapped(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    return q, maker.call(torch.ops.aten.flip.default, (k, [2])), v, tensors, sizes


@planted(insert, "_operands", "keys as values in the graph")
def keys_as_values(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, _, tensors, sizes = _operands(maker, lifted, spec, model)
    return q, k, k, tensors, sizes


@planted(insert, "_operands", "key heads in another order")
def heads_flipped(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    k, v = (maker.call(torch.ops.aten.flip.default, (x, [1])) for x in (k, v))
    return q, k, v, tensors, sizes


_FIRST: dict[int, Any] = {}


@planted(insert, "_operands", "values of another layer", "the first layer's, in every layer")
def values_of_first_layer(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    return q, k, _FIRST.setdefault(id(maker.graph), v), tensors, sizes


_TENSORS: dict[int, Any] = {}


@planted(insert, "_operands", "slopes of another layer", "the tensors of another site")
def tensors_of_first_layer(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    return q, k, v, _TENSORS.setdefault(id(maker.graph), tensors), sizes


@planted(insert, "_operands", "padding frozen at capture", "a mask folded into a constant")
def padding_frozen(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    new = [
        maker.call(torch.ops.aten.ones_like.default, (t,))
        if t.meta["val"].dtype == torch.bool
        else t
        for t in tensors
    ]
    return q, k, v, new, sizes


@planted(insert, "_operands", "gradient of a captured tensor cut", "detached", "verify: gradient")
def tensors_detached(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    new = [maker.call(torch.ops.aten.detach.default, (t,)) for t in tensors]
    return q, k, v, new, sizes


@planted(insert, "_operands", "gradient of the keys cut", "keys detached", "verify: gradient")
def keys_detached(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    return q, maker.call(torch.ops.aten.detach.default, (k,)), v, tensors, sizes


@planted(
    insert,
    "_operands",
    "keys cut at the length of the capture",
    "a stale size",
    expected="another length: output",
)
def stale_length(maker: Any, lifted: Any, spec: Any, model: Any = None) -> Any:
    q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
    hint = value_of(k).shape[2]
    hint = int(hint.node.hint) if isinstance(hint, torch.SymInt) else int(hint)
    with_hint = [
        maker.call(torch.ops.aten.roll.default, (x, [hint], [2])) if x is k else x for x in (k, v)
    ]
    return q, *with_hint, tensors, sizes


@planted(insert._Maker, "shaped", "result with its heads in another order")
def heads_rolled(self: Any, node: Any, lifted: Any) -> Any:
    return self.call(torch.ops.aten.roll.default, (_shaped(self, node, lifted), [1], [1]))


@planted(insert._Maker, "shaped", "result rounded on its way out", "a cast to bfloat16 and back")
def rounded(self: Any, node: Any, lifted: Any) -> Any:
    half = self.call(torch.ops.aten.to.dtype, (_shaped(self, node, lifted), torch.bfloat16))
    return self.call(torch.ops.aten.to.dtype, (half, torch.float32))


@planted(insert._Maker, "shaped", "dropout at inference in the graph")
def dropping(self: Any, node: Any, lifted: Any) -> Any:
    return self.call(torch.ops.aten.dropout.default, (_shaped(self, node, lifted), 0.1, True))


_insert = insert.insert
_SPECS: dict[int, Any] = {}


@planted(assemble, "insert", "formula of another layer", "layers told apart by their shapes only")
def spec_of_first_layer(
    captured: Captured, lifted: Any, spec: Any, target: str, model: Any = None
) -> Any:
    first = _SPECS.setdefault(id(captured.graph), spec)
    same = [t.name for t in first.tensors] == [t.name for t in spec.tensors]
    names = {t.name: t for t in spec.tensors}
    if not same:
        first = replace(spec, scale=first.scale)
    assert names
    return _insert(captured, lifted, first, target, model)


@planted(Captured, "overwritten", "write in place not seen", in_place=True)
def never_overwritten(self: Any, node: Any, end: Any) -> bool:
    return False
