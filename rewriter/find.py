"""Finding: from every softmax of a graph down to the product with the values, or to the reason why
there is none.

Anchors are `softmax` in each ATen spelling and `scaled_dot_product_attention`. The dataflow below
an anchor is followed through operations that keep each weight (layout, casts, dropout) to the one
contraction that consumes it; anything else that reads the weights is an escape.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import cast

import networkx
import sympy
import torch
from sympy import Expr
from torch import fx

from rewriter.contraction import contraction_of
from rewriter.reading import op_name, shape_of, value_of
from rewriter.sites import Kind

__all__ = ["PROJECTIONS", "SOFTMAX", "Found", "find", "softmaxes"]

SOFTMAX = ("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.special_softmax")
SDPA = "aten.scaled_dot_product_attention"

KEEPS_WEIGHTS = frozenset(
    f"aten.{x}"
    for x in [
        "clone",
        "contiguous",
        "alias",
        "detach",
        "to",
        "_to_copy",
        "type_as",
        "float",
        "dropout",
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "view_as",
        "reshape_as",
        "permute",
        "transpose",
        "t",
        "mT",
        "mH",
        "adjoint",
        "numpy_T",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "slice",
        "narrow",
        "masked_fill",
        "where",
        "mul",
        "div",
    ]
)
"""Operations between the softmax and the values that a lifting may see through."""

SAMPLERS = ("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")

HARMLESS = ("aten.sym_size", "aten._assert_tensor_metadata")
"""Readers of a weight tensor that do not read its elements."""


@dataclass(frozen=True)
class Found:
    """One softmax, and what its weights are for."""

    anchor: fx.Node
    kind: Kind = "attention"
    product: fx.Node | None = None
    """The contraction of the weights with the values; None for a fused operation, and where there
    is no such product."""
    reason: str = ""
    """Why it is not an attention that can be lifted; empty if it may be one."""
    escapes: str = ""
    """What else reads its weights, in words; empty if nothing does."""


def dataflow(graph: fx.Graph) -> networkx.DiGraph:
    """The nodes of the graph, with an edge from each node to every reader of it."""
    flow = networkx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return flow


def find(graph: fx.Graph) -> list[Found]:
    """Every softmax of the graph, in the order in which they are computed."""
    flow = dataflow(graph)
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if op_name(node) == SDPA:
            found.append(Found(node))
        elif op_name(node) in SOFTMAX:
            found.append(_follow(node, flow))
    return found


def softmaxes(graph: fx.Graph) -> int:
    """How many anchors the graph has."""
    calls = (op_name(node) for node in graph.nodes if node.op == "call_function")
    return sum(name == SDPA or name in SOFTMAX for name in calls)


def _follow(anchor: fx.Node, flow: networkx.DiGraph) -> Found:
    """The product below a softmax, reached through operations that keep each weight where it can be
    read."""
    seen, open_nodes = {anchor}, [anchor]
    products: list[fx.Node] = []
    escapes: list[fx.Node] = []
    while open_nodes:
        node = open_nodes.pop()
        for user in flow.successors(node):
            if op_name(user) in HARMLESS:
                continue
            contraction = contraction_of(user)
            if contraction is not None and node in (contraction.a, contraction.b):
                if user not in products:
                    products.append(user)
            elif op_name(user) in KEEPS_WEIGHTS and user.args[0] is node:
                if user not in seen:
                    seen.add(user)
                    open_nodes.append(user)
            else:
                escapes.append(user)
    if not products:
        return _without_values(anchor, escapes)
    if len(products) > 1:
        return Found(
            anchor,
            reason=f"its weights are multiplied with {len(products)} tensors: {_names(products)}",
        )
    return Found(anchor, product=products[0], escapes=_names(escapes))


def _without_values(anchor: fx.Node, escapes: list[fx.Node]) -> Found:
    readers = {op_name(e) for e in escapes}
    if any(_is_sampled(other) for e in escapes for other in e.all_input_nodes):
        reason = "deformable sampling: its weights multiply values at places that a query chooses"
        return Found(anchor, "sampling", reason=reason)
    if {"aten.topk", "aten.sort"} & (readers | _makers(anchor)):
        return Found(
            anchor,
            "router",
            reason="a router: its weights choose among a few experts and multiply no values",
        )
    if "aten.multinomial" in readers or "aten.argmax" in readers:
        return Found(anchor, "draw", reason="its weights are drawn from")
    product = _later_product(anchor, escapes)
    if product is not None:
        changed = _names([e for e in escapes if e.op != "output"])
        return Found(
            anchor,
            product=product,
            reason=f"its weights are changed by {changed} before they meet the values",
        )
    if not escapes or any(e.op == "output" for e in escapes):
        return Found(
            anchor,
            "pointer",
            reason="a distribution that is returned: its weights multiply no values",
        )
    return Found(
        anchor,
        "unknown",
        reason=f"its weights go to {_names(escapes)} and to no product with values",
    )


def _is_sampled(node: fx.Node) -> bool:
    """The node is put together from values that were sampled off the grid of a tensor."""
    seen, open_nodes = {node}, [node]
    while open_nodes:
        node = open_nodes.pop()
        if op_name(node) in SAMPLERS:
            return True
        if op_name(node) in (*KEEPS_WEIGHTS, "aten.stack", "aten.cat"):
            new = [x for x in node.all_input_nodes if x not in seen]
            seen.update(new)
            open_nodes.extend(new)
    return False


def _later_product(anchor: fx.Node, escapes: list[fx.Node]) -> fx.Node | None:
    """A product that the weights reach as a tensor of as many elements, such as after a mixing of
    heads."""
    count = _elements(anchor)
    seen, open_nodes = set(escapes), list(escapes)
    while open_nodes:
        node = open_nodes.pop()
        contraction = contraction_of(node)
        if (
            contraction is not None
            and contraction.summed_size == shape_of(anchor)[cast(int, anchor.args[1])]
        ):
            return node
        if contraction is None and node.op == "call_function" and _elements(node) == count:
            new = [u for u in node.users if u not in seen]
            seen.update(new)
            open_nodes.extend(new)
    return None


def _elements(node: fx.Node) -> Expr | None:
    if not isinstance(value_of(node), torch.Tensor):
        return None
    return sympy.expand(sympy.Mul(*shape_of(node)))


def _makers(anchor: fx.Node) -> set[str]:
    """The operations that made the softmax's input, through the choice of one result of several."""
    source = cast(fx.Node, anchor.args[0])
    while source.target is operator.getitem or op_name(source) in ("aten.to", "aten._to_copy"):
        source = cast(fx.Node, source.args[0])
    return {op_name(source)}


def _names(nodes: list[fx.Node]) -> str:
    names = [op_name(n) or ("the output" if n.op == "output" else n.name) for n in nodes]
    return ", ".join(dict.fromkeys(names))


def module_path(node: fx.Node) -> str:
    """The module that computes the node, as the graph's metadata has it:
    `"model.layers.3.self_attn"`."""
    stack = node.meta.get("nn_module_stack") or {}
    for entry in reversed(list(stack.values())):
        path = entry[0] if isinstance(entry, tuple) else str(entry)
        return clean_path(path)
    return ""


def clean_path(path: str) -> str:
    """A module path without the spelling of the tracer that wrote it: `L['self'].a._modules['0'].b`
    is `a.0.b`."""
    path = re.sub(r"L\['\w+'\]", "", path, count=1)
    path = re.sub(r"\.__dict__\['_(modules|parameters|buffers)'\]\['", ".", path)
    for before, after in (
        ("._modules['", "."),
        ("._parameters['", "."),
        ("._buffers['", "."),
        ("['", "."),
        ("']", ""),
        ("getattr(", ""),
        ("[", "."),
        ("]", ""),
    ):
        path = path.replace(before, after)
    return path.strip(".")


def layer_of(path: str) -> int | None:
    """The first number in a module path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def comes_from_one_sequence(query: fx.Node, key: fx.Node) -> bool:
    """Queries and keys are projected from the same tensor, with one latent projection between at
    most."""
    queries, keys = _projected({query}), _projected({key})
    return bool((queries | _projected(queries)) & (keys | _projected(keys)))


PROJECTIONS = (
    "aten.linear",
    "aten.addmm",
    "aten.mm",
    "aten.convolution",
    "aten.conv2d",
    "aten.conv1d",
)


def _projected(nodes: set[fx.Node]) -> set[fx.Node]:
    """The tensors that the nearest projections above read."""
    result: set[fx.Node] = set()
    seen, open_nodes = set(nodes), list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        if op_name(node) in PROJECTIONS:
            position = 1 if op_name(node) == "aten.addmm" else 0
            result.add(_unmoved(cast(fx.Node, node.args[position])))
            continue
        for source in node.all_input_nodes:
            if source not in seen and isinstance(value_of(source), torch.Tensor | list | tuple):
                seen.add(source)
                open_nodes.append(source)
    return result


def _unmoved(node: fx.Node) -> fx.Node:
    """The tensor before layout operations: the same activations seen through another view."""
    while op_name(node) in (
        "aten.view",
        "aten.reshape",
        "aten.contiguous",
        "aten.clone",
        "aten.transpose",
        "aten.t",
    ):
        node = cast(fx.Node, node.args[0])
    return node
