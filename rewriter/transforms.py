"""Regions of a graph inside a transform of functions (vmap), as masks of models are often made.

torch's tracer sees through a transform only below autograd's dispatch. A region is therefore traced
there first, on its own; the plain operations that come out are traced again with the rest.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from rewriter.recompute import body_of

__all__ = ["flat", "grouped", "transformed"]

BEGIN, END = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def transformed(region: fx.GraphModule, *inputs: Any) -> Any:
    """Runs a region."""
    return region(*inputs)


def grouped(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with one node for each outermost region; itself if it has none."""
    if not any(_name(n) == BEGIN for n in gm.graph.nodes):
        return gm
    graph = copy.deepcopy(gm.graph)
    result = fx.GraphModule(gm, graph)
    for number, nodes in enumerate(_regions(graph)):
        inside = dict.fromkeys(nodes)
        given = list(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
        taken = [n for n in nodes if not inside.keys() >= n.users.keys()]
        name = f"transformed_{number}"
        result.add_submodule(name, body_of(result, given, nodes, taken))
        with graph.inserting_before(nodes[-1].next):
            run = graph.call_function(transformed, (graph.get_attr(name), *given))
            run.meta = dict(nodes[-1].meta)
            for place, node in enumerate(taken):
                value = graph.call_function(operator.getitem, (run, place))
                value.meta = dict(node.meta)
                node.replace_all_uses_with(value, lambda user: user not in inside)  # noqa: B023 - called at once
        for node in reversed(nodes):
            graph.erase_node(node)
    graph.lint()
    result.recompile()
    return result


def flat(region: fx.GraphModule, inputs: Any) -> fx.GraphModule:
    """The region as plain operations."""
    with disable_proxy_modes_tracing():
        return make_fx(region)(*inputs)


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each outermost region, from the node that begins it to the one that ends it."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if _name(node) == BEGIN:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if _name(node) == END:
            depth -= 1
    return regions if depth == 0 else []


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))
