"""One spelling for what is written in place: a graph that reads as values.

Arithmetic in place on a fresh tensor becomes arithmetic out of place. A write to a part of a tensor
that is made of numbers and positions alone, `mask[i:j, i:j] = 0`, becomes a new tensor that has the
part; such tensors are masks and positions, and as values they can be read as logic. What is left,
`written_nodes` names.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, TypeGuard, cast

import torch
from torch import fx

from rewriter.reading import op_name, value_of
from rewriter.rules_layout import has_float_input

__all__ = ["is_view", "normalize", "same_memory", "writes_of", "written_nodes"]

VIEWS = frozenset(
    f"aten.{x}"
    for x in [
        "view",
        "reshape",
        "transpose",
        "permute",
        "t",
        "expand",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "unbind",
        "split",
        "chunk",
        "alias",
        "detach",
        "narrow",
        "view_as",
        "expand_as",
        "flatten",
        "unflatten",
        "mT",
        "as_strided",
        "diagonal",
    ]
)

MAYBE_VIEWS = frozenset(
    f"aten.{x}"
    for x in ["to", "contiguous", "reshape", "dropout", "type_as", "view_as", "reshape_as"]
)

_SCATTERS = {
    "aten.slice": torch.ops.aten.slice_scatter.default,
    "aten.select": torch.ops.aten.select_scatter.default,
}
"""What puts a part back, for each way to take one."""


def normalize(module: fx.GraphModule) -> None:
    """Drops dead nodes and makes in-place arithmetic on fresh tensors out of place, so that a graph
    reads as values."""
    graph = module.graph
    for node in list(graph.nodes):
        if op_name(node) == "aten._assert_tensor_metadata":  # would keep what it looks at alive
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        plain = _out_of_place(node)
        if plain is None:
            continue
        if _owns_its_memory(node):
            target = cast(fx.Node, node.args[0])
            later = [u for u in target.users if u is not node and _after(u, node)]
            node.target = plain
            for user in later:
                user.replace_input_with(target, node)
        elif _writes_a_part(node):
            _with_part(graph, node, plain)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def written_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node that shares memory with a tensor that some operation writes to."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        for target in writes_of(node):
            written |= same_memory(target)
    return frozenset(written)


def writes_of(node: fx.Node) -> list[fx.Node]:
    """The tensors to whose memory the node writes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if op_name(node) == "aten.detach_":  # writes no element
        return []
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    writes = [v for a, v in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [v for v in writes if isinstance(v, fx.Node)]


def is_view(node: fx.Node) -> bool:
    """The node is its first argument under another name, or may be."""
    looks = op_name(node) in VIEWS | MAYBE_VIEWS or node.target is operator.getitem
    return looks or node.args[:1] == tuple(writes_of(node)[:1]) != ()


def same_memory(node: fx.Node) -> set[fx.Node]:
    """The tensor that a view looks at, and every view of it."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    found, open_nodes = {node}, [node]
    while open_nodes:
        name = open_nodes.pop()
        for user in name.users:
            if user not in found and is_view(user) and user.args[0] is name:
                found.add(user)
                open_nodes.append(user)
    return found


def _out_of_place(node: fx.Node) -> Any:
    """The plain overload of an in-place operation."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None or not node.target._schema.is_mutable:
        return None
    return getattr(packet, node.target._overloadname, None)


def _owns_its_memory(node: fx.Node) -> bool:
    """What is written is a fresh tensor, of the written shape and dtype, that nothing else looks at
    under another name."""
    target = node.args[0]
    if not _is_fresh(target) or not _keeps_type(node):
        return False
    looked_at = [u for u in target.users if u is not node and not _after(u, node)]
    return not any(is_view(u) and u.args[0] is target for u in looked_at)


def _is_fresh(target: Any) -> TypeGuard[fx.Node]:
    """The tensor is the result of an operation that looks at no other tensor's memory."""
    if not isinstance(target, fx.Node) or target.op != "call_function":
        return False
    if not isinstance(target.target, torch._ops.OpOverload) or target.target._schema.is_mutable:
        return False
    if any(r.alias_info is not None for r in target.target._schema.returns):
        return False
    return op_name(target) not in VIEWS | MAYBE_VIEWS


def _keeps_type(node: fx.Node) -> bool:
    """What is written has the shape and dtype of what it is written to."""
    before, after = value_of(cast(fx.Node, node.args[0])), value_of(node)
    return (
        isinstance(before, torch.Tensor)
        and before.dtype == after.dtype
        and before.shape == after.shape
    )


def _writes_a_part(node: fx.Node) -> bool:
    """What is written is a part of a fresh tensor, without tensors of the model's numbers, which
    would be copied; and no other name that the tensor has by then is used later."""
    if not isinstance(node.args[0], fx.Node) or node.users or not _keeps_type(node):
        return False
    whole = _parts(node.args[0])[-1]
    if whole is node.args[0] or not _is_fresh(whole):
        return False
    names = [x for x in same_memory(whole) - {whole, node} if not _after(x, node)]
    stale = any(_after(u, node) for x in names for u in x.users)
    given = [x for x in node.all_input_nodes if x is not node.args[0]]
    large = [x for x in given if isinstance(value_of(x), torch.Tensor) and value_of(x).dim()]
    return not stale and not any(map(has_float_input, (whole, *large)))


def _parts(part: fx.Node) -> list[fx.Node]:
    """The part, what it is a part of, and so on up to a tensor that is no slice or row."""
    parts = [part]
    while op_name(parts[-1]) in _SCATTERS:
        parts.append(cast(fx.Node, parts[-1].args[0]))
    return parts


def _with_part(graph: fx.Graph, node: fx.Node, plain: Any) -> None:
    """Replaces a write to a part by a new tensor with the part, for all that comes later."""
    parts = _parts(cast(fx.Node, node.args[0]))
    later = [u for u in parts[-1].users if _after(u, node)]
    with graph.inserting_before(node):
        new = graph.call_function(plain, node.args, node.kwargs)
        new.meta = dict(node.meta)
        for part, whole in itertools.pairwise(parts):
            arguments = (whole, new, *part.args[1:])
            new = graph.call_function(_SCATTERS[op_name(part)], arguments, part.kwargs)
            new.meta = {**node.meta, "val": value_of(whole)}
    for user in later:
        user.replace_input_with(parts[-1], new)
    graph.erase_node(node)


def _after(a: fx.Node, b: fx.Node) -> bool:
    return a > b
