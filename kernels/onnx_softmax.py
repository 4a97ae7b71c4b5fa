"""Softmax attention in primitive ATen ops, in place of the op nodes: what an ONNX exporter reads.

The form is that of `rewriter.reference`. Scores are float32 also where q is narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from rewriter.errors import ExportError
from rewriter.kernels.onnx_formulas import Formulas, Value, Writer
from rewriter.spec import SoftmaxSpec

__all__ = ["inline_attention"]

aten = torch.ops.aten


def inline_attention(graph_module: GraphModule, target: Any = None) -> int:
    """Replaces every attention op node by primitive ATen ops; returns how many there were.

    Args:
        graph_module: a graph whose nodes carry fake values in `meta["val"]`; changed in place.
        target: the op that is replaced; `torch.ops.rewriter.attention.default` if it is not given.

    Raises:
        ExportError: if a spec drops weights, or has a formula that no ATen op computes.
    """
    target = torch.ops.rewriter.attention.default if target is None else target
    graph = graph_module.graph
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is target]
    written: dict[Any, Node] = {}
    for node in found:
        q, k, v, tensors, sizes, text, *_ = node.args
        spec = SoftmaxSpec.from_json(cast(str, text))
        writer = Writer(graph, node, written)
        with graph.inserting_before(node):
            out = _attention(writer, spec, q, k, v, cast(Any, tensors), cast(Any, sizes))
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return len(found)


def _attention(
    write: Writer,
    spec: SoftmaxSpec,
    q: Node,
    k: Node,
    v: Node,
    tensors: Sequence[Node],
    sizes: Sequence[Value],
) -> Node:
    """Writes one attention; the node of its result `[B, Hq, L, Dv]`."""
    if spec.dropout:
        raise ExportError(
            "attention with dropout has no ONNX form; call model.eval() before the export"
        )
    dtype, device = write.value(v).dtype, write.value(q).device
    extent = {
        "b": write.size(q, 0),
        "h": write.size(q, 1),
        "q": write.size(q, 2),
        "k": write.size(k, 2),
    }
    values = _index_values(write, spec, extent, sizes, device)
    formula = Formulas(
        write, values, dict(zip((t.name for t in spec.tensors), tensors, strict=True)), extent
    )

    q32, k32 = (write.to(x, torch.float32) if write.value(x).itemsize < 4 else x for x in (q, k))
    q32 = formula.fold("mul", [q32, formula(spec.scale)]) if spec.scale != 1 else q32
    product = _grouped(
        write, q32, write(aten.transpose.int, k32, -2, -1), extent, extent["k"]
    )  # [B, Hq, L, M]
    values["s"] = product
    score = formula(spec.score)
    if not write.is_tensor(score) or write.value(score).ndim < 4:
        whole = [extent[name] for name in "bhqk"]
        score = write(aten.expand.default, write.tensor(score, torch.float32, device), whole)
    seen = None if spec.is_unmasked else write.tensor(formula(spec.mask), torch.bool, device)
    if seen is not None:
        score = _masked(write, seen, spec, score)
    weights = _softmax(write, formula, spec, score, extent)

    out = _grouped(write, write.to(weights, dtype), v, extent, write.size(v, 3))
    if seen is not None and spec.masked == "zero":
        some = write(aten.any.dim, seen, -1, True) if write.value(seen).ndim else seen
        out = write(aten.where.self, some, out, write.tensor(0.0, dtype, device))
    if spec.heads != 1:
        out = write.to(formula.fold("mul", [out, formula(spec.heads)]), dtype)
    return out


def _index_values(
    write: Writer,
    spec: SoftmaxSpec,
    extent: dict[str, Value],
    sizes: Sequence[Value],
    device: torch.device,
) -> dict[str, Value]:
    """The index symbols as tensors that broadcast to `[B, H, L, M]`, and the sizes as integers."""
    shapes = {"b": [-1, 1, 1, 1], "h": [-1, 1, 1], "q": [-1, 1], "k": [-1]}
    values: dict[str, Value] = {}
    for name, shape in shapes.items():
        whole = write(aten.arange.default, extent[name], device=device, pin_memory=False)
        values[name] = write(aten.reshape.default, whole, shape)
    values |= {"B": extent["b"], "H": extent["h"], "L": extent["q"], "M": extent["k"]}
    return values | dict(zip(spec.sizes, sizes, strict=True))


def _grouped(
    write: Writer, rows: Node, shared: Node, extent: dict[str, Value], columns: Value
) -> Node:
    """`rows @ shared`, where consecutive heads of `rows`, as one matrix, meet one of `shared`."""
    heads, kv_heads = write.size(rows, 1), write.size(shared, 1)
    if write.value(heads) == write.value(kv_heads):
        return write(aten.matmul.default, rows, shared)
    folded = write(aten.reshape.default, rows, [extent["b"], kv_heads, -1, write.size(rows, 3)])
    product = write(aten.matmul.default, folded, shared)
    return write(aten.reshape.default, product, [extent["b"], heads, extent["q"], columns])


def _masked(write: Writer, seen: Node, spec: SoftmaxSpec, score: Node) -> Node:
    """The scores, with those of hidden keys so low that their weights vanish."""
    dtype, device = write.value(score).dtype, write.value(score).device
    low = write.tensor(
        -torch.inf if spec.masked == "nan" else torch.finfo(dtype).min, dtype, device
    )
    if spec.masked == "add":
        zero = write.tensor(0.0, dtype, device)
        return write(aten.add.Tensor, score, write(aten.where.self, seen, zero, low))
    return write(aten.where.self, seen, score, low)


def _softmax(
    write: Writer, formula: Formulas, spec: SoftmaxSpec, score: Node, extent: dict[str, Value]
) -> Node:
    if spec.sink is None:
        return write(aten.softmax.int, score, -1)
    sink = write.tensor(formula(spec.sink), write.value(score).dtype, formula.device)
    column = write(aten.expand.default, sink, [extent["b"], extent["h"], extent["q"], 1])
    weights = write(aten.softmax.int, write(aten.cat.default, [score, column], -1), -1)
    return write(aten.slice.Tensor, weights, 3, 0, -1)
