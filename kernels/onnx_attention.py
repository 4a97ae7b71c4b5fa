"""Attention in primitive ATen ops, in place of the op nodes: what an ONNX exporter reads.

The forms are those of `rewriter.reference`. Scores are float32 also where q is narrower.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from rewriter.beside import SITE
from rewriter.families import from_json
from rewriter.kernels.onnx_linear import linear_form, stateful_form
from rewriter.kernels.onnx_routes import block_sums, has_sums, summaries
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.kernels.onnx_softmax import softmax_form
from rewriter.kernels.onnx_stages import finished
from rewriter.kernels.onnx_state import States, has_state, recent
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["inline_attention"]


def inline_attention(graph_module: GraphModule, states: States | None = None) -> int:
    """Replaces every attention op node by primitive ATen ops; returns how many there were.

    What torch keeps beside a KV cache is computed from all keys, unless it is handed on: a file has
    no memory.

    Args:
        graph_module: a graph whose nodes carry fake values in `meta["val"]`; changed in place.
        states: if given, sites that have a state take it from here and leave the new one here.

    Raises:
        ExportError: if a spec drops weights, or has a formula that no ATen op computes.
    """
    target: Any = torch.ops.rewriter.attention.default
    graph = graph_module.graph
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is target]
    written: dict[Any, Node] = {}
    for node in found:
        spec = from_json(cast(str, node.args[5]))
        with graph.inserting_before(node):
            site = SiteWriter(graph, node, spec, written)
            out = finished(site, spec, _product(site, spec, states, node.meta.get(SITE, "")))
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return len(found)


def _product(site: SiteWriter, spec: Spec, states: States | None, name: str) -> Node:
    """Weights times values, `[B, Hq, L, Dv]` in the dtype of v."""
    handed = states if name else None
    if isinstance(spec, LinearSpec):
        if handed is not None and has_state(site, spec):
            new = recent(site, handed)
            out, state = stateful_form(new, spec, handed.past.get(name))
            handed.hand_on(name, state)
            return out
        return linear_form(site, spec)
    assert isinstance(spec, SoftmaxSpec)
    if handed is not None and has_sums(site, spec):
        sums = block_sums(site, spec, recent(site, handed), handed.past.get(name))
        handed.hand_on(name, summaries(site, spec, sums))
        return softmax_form(site, spec, sums)
    return softmax_form(site, spec)
