"""Lifting: from a softmax that was found to the spec of what it computes, and to the tensors that
it computes it from.

The region is read top down from the score with `Reader`; the product of queries and keys is the
symbol `s`. What hides keys is taken out of the score and becomes the mask; what remains is the
score stage.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from sympy import Symbol
from torch import fx

from rewriter.find import SDPA, Found, layer_of
from rewriter.frame import GraphFacts, Lifted
from rewriter.lift_sdpa import lift_sdpa
from rewriter.lift_softmax import lift_softmax
from rewriter.operands import Unreadable
from rewriter.reading import op_name, value_of
from rewriter.rules_layout import has_float_input
from rewriter.sites import Site

__all__ = ["lift"]


def lift(found: Found, facts: GraphFacts, opaque: bool = False) -> Lifted:
    """The site that an anchor stands for. Never raises for what it does not understand: the site
    says the reason.

    Args:
        opaque: read nothing of what meets the score but the tensors themselves (used when a formula
            failed its check).
    """
    anchor = found.product if found.product is not None else found.anchor
    path = facts.path(anchor)
    site = Site(path=path, layer=layer_of(path), kind=found.kind, reason=found.reason)
    if found.reason:
        return Lifted(site, found)
    try:
        lift_form = lift_sdpa if op_name(found.anchor) == SDPA else lift_softmax
        lifted = lift_form(found, facts, site, opaque)
        counts = [x.heads for x in (lifted.q, lifted.k) if x is not None]
        if _fixed(anchor.graph, {x for n in counts for x in n.free_symbols}):
            return lift(found, facts, opaque)
        _refuse_overwritten(lifted, anchor, facts)
        _refuse_partly_without_grad(lifted, anchor, facts)
    except Unreadable as error:
        if _fixed(anchor.graph, error.loose):
            return lift(found, facts, opaque)
        return Lifted(replace(site, reason=str(error)), found)
    if not found.escapes or lifted.site.spec is None:
        return lifted
    reason = f"its weights are also used by {found.escapes}, so they have to be computed anyway"
    return replace(lifted, site=replace(lifted.site, reason=reason))


def _fixed(graph: fx.Graph, loose: Collection[Symbol]) -> bool:
    """Makes constants of the graph of numbers that it was given, such as how many heads a module
    has; torch captures it anew for another number. False if none of them is such a number."""
    inputs = [value_of(n) for n in graph.nodes if n.op == "placeholder"]
    found = [x for x in inputs if isinstance(x, torch.SymInt) and x.node.expr in loose]
    return bool([int(x) for x in found])


def _refuse_overwritten(lifted: Lifted, end: fx.Node, facts: GraphFacts) -> None:
    """Refuses a site whose inputs change between where they were read and where its op node will
    stand."""
    operands = [x.node for x in (lifted.q, lifted.k, lifted.v) if x is not None]
    for node in (*operands, *lifted.tensors):
        if facts.overwritten(node, end):
            raise Unreadable(
                f"{facts.origin(node)[0]} is written in place while the attention is computed"
            )


def _refuse_partly_without_grad(lifted: Lifted, end: fx.Node, facts: GraphFacts) -> None:
    """Refuses a site of which a part records no gradient: its op node would let one through."""
    ends = {x.node for x in (lifted.q, lifted.k, lifted.v) if x is not None} | {*lifted.tensors}
    seen, open_nodes = {end}, [end]
    while open_nodes:
        for node in open_nodes.pop().all_input_nodes:
            if node in seen or node in ends:
                continue
            if (node in facts.without_grad) != (end in facts.without_grad) and has_float_input(
                node
            ):
                raise Unreadable("a part of it is computed without gradients, and another is not")
            seen.add(node)
            open_nodes.append(node)
