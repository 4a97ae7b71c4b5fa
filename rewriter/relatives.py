"""Relatives of attention that have no softmax: linear attention, products of products under another
normaliser, recurrences, and gates over channels or positions. They are named, and left alone.

Each is known by its dataflow:

- a recurrence (a state-space layer, a linear recurrence): a state that is scaled and added to, step
  by step, with what each step takes from one tensor; or decays, the exponentials of running sums.
- a product of three activations, without a softmax between the two products. Where the first one
  sums over tokens it is linear attention; where it sums over features it is attention under another
  normaliser.
- a gate (squeeze-and-excite, ECA, CBAM): a sigmoid of layers over a mean or maximum of a tensor,
  which multiplies that tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import fx

from rewriter.contraction import Contraction, contraction_of
from rewriter.find import PROJECTIONS, SOFTMAX, Found
from rewriter.frame import GraphFacts
from rewriter.reading import is_float, op_name, value_of

__all__ = ["relatives"]

_LAYOUT = frozenset(
    f"aten.{x}"
    for x in [
        *("alias", "broadcast_to", "clone", "contiguous", "detach", "dropout", "expand"),
        *("expand_as", "flatten", "float", "mT", "movedim", "permute", "reshape", "reshape_as"),
        *("slice", "squeeze", "t", "to", "_to_copy", "transpose", "type_as", "unflatten"),
        *("unsqueeze", "_unsafe_view", "view", "view_as"),
    ]
)
_ELEMENTWISE = _LAYOUT | frozenset(
    f"aten.{x}"
    for x in [
        *("add", "clamp", "clamp_min", "div", "elu", "exp", "gelu", "masked_fill", "maximum"),
        *("mul", "neg", "pow", "relu", "sigmoid", "silu", "softplus", "sub", "tanh", "tril"),
        *("triu", "where"),
    ]
)
_EXPANSIONS = ("aten.expand", "aten.expand_as", "aten.broadcast_to")
_CHOICES = ("aten.select", "aten.slice", "aten.unbind", "aten.split", "aten.chunk", "aten.narrow")
_GATES = ("aten.sigmoid", "aten.hardsigmoid")
_SQUEEZES = {
    "aten.mean": "mean",
    "aten.amax": "maximum",
    "aten.max": "maximum",
    "aten.adaptive_avg_pool1d": "mean",
    "aten.adaptive_avg_pool2d": "mean",
    "aten._adaptive_avg_pool2d": "mean",
    "aten.avg_pool2d": "mean",
    "aten.adaptive_max_pool2d": "maximum",
    "aten.max_pool2d": "maximum",
}
_KINDS = ("recurrence", "linear", "product", "gate")

_FAR = 60
"""Nodes that a search looks at before it gives up."""

_WORDS = {
    "linear": "linear attention: keys meet the values before the queries do",
    "product": "queries meet keys and values with no softmax operation between",
    "state": "a recurrence: a state is scaled and added to, step by step",
    "decay": "decays, exponentials of running sums: a state-space layer or gated linear attention",
}


def relatives(graph: fx.Graph, facts: GraphFacts) -> list[Found]:
    """One for each module, of the first kind above that it shows; in the order of the graph."""
    work = _Work(graph, facts)
    found: dict[str, Found] = {}
    for node in graph.nodes:
        name = op_name(node)
        one = (
            work.of_product(node)
            or (work.of_gate(node) if name == "aten.mul" else None)
            or (work.of_state(node) if name == "aten.add" else None)
            or (work.of_decay(node) if name == "aten.exp" else None)
        )
        if one is None:
            continue
        one = replace(one, anchor=_in_module(node, facts))
        there = found.setdefault(facts.path(one.anchor), one)
        if _KINDS.index(one.kind) < _KINDS.index(there.kind):
            found[facts.path(one.anchor)] = one
    return list(found.values())


@dataclass
class _Work:
    graph: fx.Graph
    facts: GraphFacts
    active: set[fx.Node] = field(default_factory=set)
    """Nodes that depend on more than parameters and constants."""
    states: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What each new state adds, for those that may be a step of a recurrence."""

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            is_given = node.op == "placeholder" and not self.facts.origin(node)[1].startswith(
                ("parameter", "buffer")
            )
            if is_given or any(x in self.active for x in node.all_input_nodes):
                self.active.add(node)

    # --- products ---------------------------------------------------------------------------------

    def of_product(self, node: fx.Node) -> Found | None:
        """A product with a tensor that is itself a product, of three activations in all."""
        outer = contraction_of(node)
        if outer is None or not {outer.a, outer.b} <= self.active:
            return None
        for side in (outer.a, outer.b):
            for inner in _up_to(side, lambda x: contraction_of(x) is not None):
                found = self._chain(node, cast(Contraction, contraction_of(inner)))
                if found is not None:
                    return found
        return None

    def _chain(self, node: fx.Node, inner: Contraction) -> Found | None:
        sides = (inner.a, inner.b)
        if inner.summed_size == 1 or not {*sides} <= self.active:
            return None
        if any(_up_to(x, lambda y: op_name(y) in SOFTMAX) for x in sides):
            return None
        sums_features = self._sums_features(inner)
        if sums_features is None:
            return None
        if not sums_features:
            return Found(node, "linear", reason=_WORDS["linear"])
        return Found(node, "product", reason=_WORDS["product"])

    def _sums_features(self, c: Contraction) -> bool | None:
        """Whether the axis that is summed over is one of features, as what projects each token has
        it; None if the graph does not say."""
        found = {
            self._is_feature(node, axes.index(c.summed))
            for node, axes in ((c.a, c.a_axes), (c.b, c.b_axes))
        }
        return found.pop() if len(found) == 1 else None

    def _is_feature(self, node: fx.Node, dim: int) -> bool | None:
        """Follows a dimension up to the projection that made the tensor."""
        for _ in range(_FAR):
            name = op_name(node)
            if name in PROJECTIONS:
                return dim == (1 if "conv" in name else value_of(node).dim() - 1)
            above = [x for x in node.all_input_nodes if x in self.active and _has_shape(x)]
            if not above:
                return None
            source = max(above, key=lambda x: _sizes(x)[1])
            place = _place_above(node, source, dim)
            if place is None:
                return None
            node, dim = source, place
        return None

    # --- gates ------------------------------------------------------------------------------------

    def of_gate(self, node: fx.Node) -> Found | None:
        """A tensor times a sigmoid of what was squeezed out of that tensor."""
        given = [x for x in node.args if isinstance(x, fx.Node) and is_float(x)]
        if len(given) != 2:
            return None
        for x, gate in (given, given[::-1]):
            source = _unmoved(gate)
            if op_name(source) not in _GATES or x not in self.active:
                continue
            squeezed = _squeezed(source, _unmoved(x))
            if squeezed and _sizes(source)[1] < _sizes(x)[1]:
                return Found(node, "gate", reason=_gate_words(squeezed, gate, x))
        return None

    # --- recurrences ------------------------------------------------------------------------------

    def of_state(self, node: fx.Node) -> Found | None:
        """The second step of a recurrence: `a · state + u`, where the state is such a sum too and
        both take what they add from other places of one tensor."""
        if node not in self.active or len(node.all_input_nodes) != 2:
            return None
        for scaled, new in (node.all_input_nodes, node.all_input_nodes[::-1]):
            product = _unmoved(scaled)
            if op_name(product) != "aten.mul":
                continue
            if self._is_scan(product, new):
                return Found(node, "recurrence", reason=_WORDS["state"])
            self.states[node] = new
            for state in map(_unmoved, product.all_input_nodes):
                before = self.states.get(state)
                if before is None:
                    continue
                here, there = _chosen(new), _chosen(before)
                if any(here[x] != there[x] for x in here.keys() & there.keys()):
                    return Found(node, "recurrence", reason=_WORDS["state"])
        return None

    def _is_scan(self, product: fx.Node, new: fx.Node) -> bool:
        """A step of a parallel scan: every second element of a tensor, and the one before it times
        a part of another tensor."""
        if len(product.all_input_nodes) != 2:
            return False
        parts = [_part(x) for x in (new, *product.all_input_nodes)]
        if not all(parts):
            return False
        (source, place), *others = cast("list[tuple[fx.Node, fx.Node]]", parts)
        from_source = [other == source and at is not place for other, at in others]
        return sum(from_source) == 1 and all(other in self.active for other, _ in others)

    def of_decay(self, node: fx.Node) -> Found | None:
        sums = _up_to(node, lambda x: op_name(x) == "aten.cumsum")
        if not any(x in self.active and is_float(x) for x in sums):
            return None
        return Found(node, "recurrence", reason=_WORDS["decay"])


def _in_module(node: fx.Node, facts: GraphFacts) -> fx.Node:
    """The node, or for one that knows of no module the nearest one above that does."""
    seen, open_nodes = {node}, [node]
    while open_nodes and len(seen) < _FAR:
        here = open_nodes.pop(0)
        if facts.path(here):
            return here
        new = [x for x in here.all_input_nodes if x not in seen and x.op == "call_function"]
        seen.update(new)
        open_nodes.extend(new)
    return node


def _up_to(start: fx.Node, is_end: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nearest nodes of a kind, at the start or above it, through operations on elements."""
    found, seen, open_nodes = [], {start}, [start]
    while open_nodes and len(seen) < _FAR:
        node = open_nodes.pop()
        if is_end(node):
            found.append(node)
        elif op_name(node) in _ELEMENTWISE:
            new = [x for x in node.all_input_nodes if x not in seen]
            seen.update(new)
            open_nodes.extend(new)
    return found


def _has_shape(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor | list | tuple)


def _sizes(node: fx.Node) -> tuple[list[int], int]:
    """The shape of the example, and how many elements it has; of a split tensor, its source's."""
    while not isinstance(value_of(node), torch.Tensor):
        node = node.all_input_nodes[0]
    shape = [
        int(n.node.hint or 1) if isinstance(n, torch.SymInt) else n for n in value_of(node).shape
    ]
    return shape, math.prod(shape)


def _place_above(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Which dimension of the source a dimension of the node is; None if that is not known."""
    name = op_name(node)
    here, there = _sizes(node)[0], _sizes(source)[0]
    if name in ("aten.transpose", "aten.swapaxes", "aten.permute", "aten.movedim", "aten.t"):
        order = list(range(len(there)))
        if name == "aten.permute":
            order = [n % len(there) for n in cast("list[int]", node.args[1])]
        elif name == "aten.movedim":
            order.insert(cast(int, node.args[2]) % len(there), order.pop(cast(int, node.args[1])))
        else:
            a, b = cast("tuple[int, int]", node.args[1:3] or (0, 1))
            order[a], order[b] = order[b], order[a]
        return order[dim]
    if name in ("aten.mT", "aten.numpy_T"):
        return {-1: len(here) - 2, -2: len(here) - 1}.get(dim - len(here), dim)
    if name == "aten.select":
        return dim + (dim >= cast(int, node.args[1]) % len(there))
    if name == "aten.stack":
        return None
    if math.prod(here) != math.prod(there) or here == there:
        place = dim - len(here) + len(there)  # one element of each, broadcast or cut
        return place if place >= 0 else None
    inner = math.prod(here[dim + 1 :])
    for place in range(len(there)):
        below = math.prod(there[place + 1 :])
        if below <= inner and inner * here[dim] <= below * there[place]:
            return place
    return None


def _unmoved(node: fx.Node, but: Callable[[fx.Node], bool] = lambda node: False) -> fx.Node:
    while op_name(node) in _LAYOUT and not but(node):
        node = cast(fx.Node, node.args[0])
    return node


def _squeezed(gate: fx.Node, x: fx.Node) -> set[str]:
    """What of `x` the gate depends on: its mean, its maximum; nothing if it depends on `x` without
    them."""
    found, seen, open_nodes = set[str](), {gate}, [gate]
    while open_nodes and len(seen) < _FAR:
        node = open_nodes.pop()
        if node is x:
            return set()
        word = _SQUEEZES.get(op_name(node))
        if word is not None and _unmoved(cast(fx.Node, node.args[0])) is x:
            found.add(word)
            continue
        new = [y for y in node.all_input_nodes if y not in seen]
        seen.update(new)
        open_nodes.extend(new)
    return found


def _gate_words(squeezed: set[str], gate: fx.Node, x: fx.Node) -> str:
    while op_name(gate) in _EXPANSIONS:
        gate = cast(fx.Node, gate.args[0])
    shape, own = _sizes(x)[0], _sizes(gate)[0]
    own = [1] * (len(shape) - len(own)) + own
    axes = [str(n) for n, (a, b) in enumerate(zip(own, shape, strict=True)) if a < b]
    over = f"dimension{'s' * (len(axes) > 1)} {' and '.join(axes)}"
    return (
        f"a gate: a sigmoid of layers over the {' and the '.join(sorted(squeezed))} of a tensor "
        f"over {over} multiplies that tensor"
    )


def _chosen(node: fx.Node) -> dict[fx.Node, fx.Node]:
    """The tensors of which the node takes a part, and the part."""
    return dict(filter(None, map(_part, _up_to(node, _is_part))))


def _is_part(node: fx.Node) -> bool:
    return op_name(node) in _CHOICES or node.target is operator.getitem


def _part(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The tensor that the node is a part of, and the part; None if it is none."""
    part = source = _unmoved(node, but=_is_part)
    if not _is_part(part):
        return None
    while _is_part(source) or op_name(source) in _LAYOUT:
        source = cast(fx.Node, source.args[0])
    return (source, part) if isinstance(value_of(source), torch.Tensor) else None
