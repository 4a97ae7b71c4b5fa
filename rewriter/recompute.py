"""Gradient checkpointing: regions of a graph that run again in the backward pass.

torch leaves each region as a graph of its own, inside of which nothing is found. While a graph is
re-traced its regions are therefore opened, between two marks, and closed again once their sites are
rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

__all__ = ["body_of", "closed", "enter", "keep_random_state", "leave", "mark", "recomputed"]

SELECTIVE = "_checkpoint_context_fn"
"""Where torch keeps, in the metadata of a region, what says which of its results are kept."""


def recomputed(region: fx.GraphModule, *inputs: Any, **options: Any) -> Any:
    """Runs a region of which only the inputs are kept for the backward pass.

    Random numbers of the second run are those of the first one. torch's own operation leaves that
    to its compiler, and draws others where none follows.
    """
    if SELECTIVE in region.meta:
        options["context_fn"] = region.meta[SELECTIVE]
    return cast(Any, checkpoint)(region, *inputs, **options | {"use_reentrant": False})


def keep_random_state(gm: fx.GraphModule) -> None:
    """Puts `recomputed` in the place of torch's operation, in a graph of Dynamo's and those inside
    it."""
    for module in (m for m in gm.modules() if isinstance(m, fx.GraphModule)):
        regions = [n for n in module.graph.nodes if _name(n) == "tag_activation_checkpoint"]
        for node in regions:
            node.target = recomputed
        if regions:
            module.recompile()


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


# --- marks in an open graph -----------------------------------------------------------------------


def enter(**options: Any) -> None:
    """A mark: here begins a region. It computes nothing."""


def leave() -> None:
    """A mark: here ends the innermost region."""


for _mark in (enter, leave):
    torch.fx.node.has_side_effect(_mark)  # without users, and not dead


def mark(tracer: Any, which: Any, region: fx.GraphModule, options: dict[str, Any]) -> None:
    """Writes a mark into a graph that is being traced."""
    node = tracer.create_proxy("call_function", which, (), options).node
    if SELECTIVE in region.meta:
        node.meta[SELECTIVE] = region.meta[SELECTIVE]


def closed(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with one node for each of its regions; itself if it has none.

    Regions inside a region run again as parts of it.
    """
    if not any(n.target is enter for n in module.graph.nodes):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    result = fx.GraphModule(module, graph)
    for number, (first, inside, last) in enumerate(list(_regions(graph))):
        nodes = [n for n in inside if n.target not in (enter, leave)]
        given = dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside)
        taken = [n for n in nodes if not inside.keys() >= n.users.keys()]
        body, name = body_of(result, list(given), nodes, taken), f"recomputed_{number}"
        body.meta |= {k: v for k, v in first.meta.items() if k == SELECTIVE}
        result.add_submodule(name, body)
        with graph.inserting_before(last):
            run = graph.call_function(
                recomputed, (graph.get_attr(name), *given), dict(first.kwargs)
            )
            for place, node in enumerate(taken):
                value = graph.call_function(operator.getitem, (run, place))
                value.meta = dict(node.meta)
                node.replace_all_uses_with(value, delete_user_cb=lambda u: u not in inside)  # noqa: B023 - called at once
        for node in reversed([first, *inside, last]):
            graph.erase_node(node)
    graph.lint()
    result.recompile()
    return result


def _regions(graph: fx.Graph) -> Iterator[tuple[fx.Node, dict[fx.Node, None], fx.Node]]:
    """The outermost regions: the mark that begins one, the nodes inside, and the mark that ends
    it."""
    depth, first = 0, None
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        depth -= node.target is leave
        if first is not None and depth == 0:
            yield first, inside, node
            first, inside = None, {}
        elif depth:
            inside[node] = None
        if node.target is enter:
            first = node if depth == 0 else first
            depth += 1


def body_of(
    root: fx.GraphModule, given: list[fx.Node], nodes: list[fx.Node], taken: list[fx.Node]
) -> fx.GraphModule:
    """The nodes as a graph from `given` to `taken`."""
    graph = fx.Graph()
    copies = {x: graph.placeholder(x.name) for x in given}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in taken))
    return fx.GraphModule(root, graph)
