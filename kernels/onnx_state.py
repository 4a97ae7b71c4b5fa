"""Attention whose state comes in and goes out: only the new keys of a call are added to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from rewriter import symbols as sym
from rewriter.kernels.onnx_formulas import Formulas
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.linear import LinearSpec
from rewriter.spec import Spec

__all__ = ["States", "has_state", "is_last", "recent"]

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


@dataclass
class States:
    """The states of a graph, by the name of the site."""

    past: dict[str, Node] = field(default_factory=dict)
    """Before the call, linear `[B, H, P, Dv]`, routed `[B, H, C, D]`; 0 where there is none."""
    results: dict[str, Node] = field(default_factory=dict)
    """Copies of something, which are to be copies of the states after the call."""
    present: dict[str, Node] = field(default_factory=dict)
    """The states after the call, as they are written."""
    caches: set[str] = field(default_factory=set)
    """Names of the inputs that hold cached keys and values of these sites."""

    def hand_on(self, name: str, state: Node) -> None:
        """Keeps the state of a site."""
        self.present[name] = state
        if name in self.results:
            self.results[name].args = (state,)


def has_state(site: SiteWriter, spec: Spec) -> bool:
    """All that earlier keys do to the queries of this call is one sum of a fixed size."""
    if not isinstance(spec, LinearSpec) or spec.position is None or spec.near is not None:
        return False
    if site.write.value(site.q).dtype == torch.float64:
        return False
    return is_last(site, spec.position)


def is_last(site: SiteWriter, position: sympy.Expr) -> bool:
    """The queries stand at the last keys: those of this call, behind what is cached."""
    if site.write.same_size(site.k, 2, site.extent["q"]):
        position = cast(Any, position.subs(sym.M, sym.L))
        return bool(position == sym.q)
    return bool(sympy.expand(position - (sym.q + sym.M - sym.L)) == 0)


def recent(site: SiteWriter, states: States) -> SiteWriter:
    """The same site, with the last L keys alone: those that belong to its queries."""
    if site.write.same_size(site.k, 2, site.extent["q"]):
        return site
    new = copy.copy(site)
    new.k, new.v = (_rows_of_queries(site, x, states) for x in (site.k, site.v))
    new.extent = {**site.extent, "k": site.extent["q"]}
    first = site.add(site.extent["k"], site.mul(site.extent["q"], -1))
    new.values = {**site.values, "k": site.add(site.count(site.extent["q"]), first)}
    new.formula = Formulas(site.write, new.values, site.tensors, new.extent)
    return new


def _rows_of_queries(site: SiteWriter, x: Node, states: States) -> Node:
    """The last L rows of x `[B, H, M, F]`: what was added to a cache, if x is one."""
    write, length = site.write, site.extent["q"]
    x = _source(x)
    if x.target is aten.cat.default:
        parts, dim = cast(Any, (*x.args, 0)[:2])
        if len(parts) == 2 and dim in (2, -2) and write.same_size(parts[1], 2, length):
            if parts[0].op == "placeholder":
                states.caches.add(parts[0].name)
            return cast(Node, parts[1])
    start = site.add(site.extent["k"], site.mul(length, -1))
    return write(aten.slice.Tensor, x, 2, start, site.extent["k"])


def _source(x: Node) -> Node:
    """What x is the whole of, in the same layout; keys read out of `q @ k.mT` are turned twice."""
    node, order, found = x, list(range(4)), x
    while len(node.all_input_nodes) == 1:
        match node.target, node.args[1:]:
            case aten.transpose.int, (int(i), int(j)):
                turn = list(range(4))
                turn[i], turn[j] = turn[j], turn[i]
            case aten.permute.default, (list(dims),):
                turn = [int(cast(Any, d)) % 4 for d in dims]
            case aten.slice.Tensor, (int(), 0, int(end)) if end >= _END:
                turn = list(range(4))
            case _:
                break
        node, order = node.all_input_nodes[0], [turn[d] for d in order]
        found = node if order == list(range(4)) else found
    return found
