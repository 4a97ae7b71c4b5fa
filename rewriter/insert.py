"""Putting one op node in the place of a region: the operands in their layout, the op, and the
result in the region's."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Symbol
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from rewriter.beside import SITE
from rewriter.capture import Captured
from rewriter.frame import Lifted
from rewriter.indices import as_size
from rewriter.programs import Programs
from rewriter.reading import op_name, value_of
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.symbols import IDiv
from rewriter.taps import link_of

__all__ = ["insert", "operands_of"]

aten = torch.ops.aten

REPLACED = "rewriter_replaced_by"

LAYOUT = (
    "aten.transpose",
    "aten.permute",
    "aten.view",
    "aten.reshape",
    "aten.flatten",
    "aten.unflatten",
    "aten.slice",
)


def insert(
    captured: Captured, lifted: Lifted, spec: Spec, target: str, model: nn.Module | None = None
) -> fx.Node:
    """Replaces the site's region by a `rewriter::attention` node that computes `spec`; returns that
    node. Parameters that a pass adds go to `model`.

    The nodes of the region are left to dead-code elimination, so that what is used elsewhere stays.
    """
    replaced = lifted.found.product if lifted.found.product is not None else lifted.found.anchor
    maker = _Maker(captured, replaced)
    with captured.graph.inserting_before(replaced):
        q, k, v, tensors, sizes = _operands(maker, lifted, spec, model)
        args: tuple[Any, ...] = (q, k, v, tensors, sizes, spec.to_json(), target)
        if _remembers(spec) and not captured.is_exported:
            links = link_of(lifted, "k"), link_of(lifted, "v")
            if links[0] is not None and links[1] is not None:
                full = [_current(x.full) for x in links if x is not None]
                past = [_current(x.past) for x in links if x is not None]
                args = (*args, full, past, lifted.site.name)
        node = maker.call(torch.ops.rewriter.attention.default, args)
        node.meta[SITE] = lifted.site.name
        out = maker.shaped(node, lifted)
    out.meta |= {k: v for k, v in replaced.meta.items() if k != "val"}
    replaced.replace_all_uses_with(out)
    replaced.meta[REPLACED] = out
    _views_to_reshapes(out)
    return node


def operands_of(captured: Captured, lifted: Lifted) -> tuple[Any, ...]:
    """Nodes for q, k, v, the tensors and the sizes of a site that stays as it is."""
    place = lifted.found.product if lifted.found.product is not None else lifted.found.anchor
    with captured.graph.inserting_before(place):
        return _operands(_Maker(captured, place), lifted, cast(SoftmaxSpec, lifted.site.spec))


def _remembers(spec: Spec) -> bool:
    """Something that a lowering works out of the keys is worth keeping beside a KV cache."""
    return not isinstance(spec, SoftmaxSpec) or spec.route is not None


def _operands(
    maker: _Maker, lifted: Lifted, spec: Spec, model: nn.Module | None = None
) -> tuple[Any, ...]:
    """Queries, keys and values in the layout of the op, and what the formulas of `spec` read."""
    q, k, v = (maker.operand(x) for x in (lifted.q, lifted.k, lifted.v))
    own = cast(SoftmaxSpec, lifted.site.spec)
    nodes = dict(zip((t.name for t in own.tensors), lifted.tensors, strict=True))
    sizes = dict(zip(own.sizes, lifted.sizes, strict=True))
    added = [t for t in spec.tensors if t.source is not None]
    programs = None
    if added:
        assert model is not None, "parameters are added to a model"
        programs = Programs(maker.captured, lifted, model, maker.call, _current, (q, k, v))
    tensors = [
        _current(nodes[t.name]) if t.source is None else cast(Programs, programs).node(t)
        for t in spec.tensors
    ]
    return q, k, v, tensors, [maker.size(sizes[n]) for n in spec.sizes]


def _current(node: fx.Node) -> fx.Node:
    """What stands in the place of the node, which another site may have replaced by now."""
    while REPLACED in node.meta:
        node = node.meta[REPLACED]
    return node


class _Maker:
    """Adds nodes to the graph and gives them the fake values that later readers need."""

    def __init__(self, captured: Captured, like: fx.Node) -> None:
        self.captured = captured
        self.graph = captured.graph
        self.mode = captured.fake_mode
        self.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.like = like

    def call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta |= self.meta
        values = fx.map_arg(args, lambda n: n.meta["val"])
        if self.mode is not None:
            with self.mode, torch.no_grad(), enable_python_dispatcher():
                node.meta["val"] = target(*values)
        return node

    def operand(self, operand: Any) -> fx.Node:
        node = _current(operand.node)
        for target, args in operand.steps:
            node = self.call(
                target, (node, *(self.numbers(a) if isinstance(a, list) else a for a in args))
            )
        return node

    def numbers(self, sizes: Sequence[Any]) -> list[Any]:
        """Sizes as numbers, and as nodes where they are known only when the graph runs."""
        return [self.number(n) if isinstance(n, Expr) else n for n in sizes]

    def number(self, size: Expr) -> Any:
        """A size as a number, or as a node that computes it."""
        if size.is_Integer:
            return int(size)
        if isinstance(size, Symbol):
            return self.size(size)
        function = {sympy.Add: operator.add, sympy.Mul: operator.mul, IDiv: operator.floordiv}.get(
            size.func
        )
        if function is None:
            raise LookupError(f"no input of the graph has the size {size}")
        result, *rest = (self.number(a) for a in size.args)
        for other in rest:
            result = (
                self.call(function, (result, other))
                if isinstance(result, fx.Node) or isinstance(other, fx.Node)
                else function(result, other)
            )
        return result

    def size(self, symbol: Symbol) -> Any:
        """A node with the value of a shape symbol."""
        for node in self.graph.nodes:
            value = value_of(node)
            if isinstance(value, torch.SymInt) and as_size(value) == symbol and node < self.like:
                return node
        for node in self.graph.nodes:
            if node.op == "placeholder" and isinstance(value_of(node), torch.Tensor):
                for dim, size in enumerate(value_of(node).shape):
                    if as_size(size) == symbol:
                        return self.call(aten.sym_size.int, (node, dim))
        raise LookupError(f"no input of the graph has the size {symbol}")

    def unflattened(self, sizes: Sequence[Expr]) -> list[Any]:
        """Sizes for an unflatten: the first one that is not a number follows from the others."""
        unknown = next((n for n in sizes if not n.is_Integer), None)
        first = sizes.index(unknown) if unknown is not None else -1
        return [-1 if i == first else self.number(n) for i, n in enumerate(sizes)]

    def shaped(self, node: fx.Node, lifted: Lifted) -> fx.Node:
        """The result `[B, H, L, Dv]` in the dimensions, order and dtype of the node that is
        replaced."""
        lead = lifted.lead
        if len(lead) == 0:
            node = self.call(aten.squeeze.dim, (self.call(aten.squeeze.dim, (node, 0)), 0))
        elif len(lead) == 1:
            node = self.call(aten.flatten.using_ints, (node, 0, 1))
        elif len(lead) > 2:
            node = self.call(aten.unflatten.int, (node, 0, self.unflattened(lead[:-1])))
        if lifted.out_order != tuple(range(len(lifted.out_order))):
            node = self.call(aten.permute.default, (node, list(lifted.out_order)))
        wanted = value_of(self.like).dtype
        if wanted != torch.float64:  # autocast leaves that alone
            wanted = self.captured.autocast.get(self.like, wanted)
        if value_of(node) is not None and value_of(node).dtype != wanted:
            node = self.call(aten.to.dtype, (node, wanted))
        return node


def _views_to_reshapes(node: fx.Node) -> None:
    """The op's result is contiguous; what it replaces may not have been, and a view relies on
    strides."""
    open_nodes = [node]
    while open_nodes:
        for user in open_nodes.pop().users:
            if op_name(user) in LAYOUT:
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
                open_nodes.append(user)
