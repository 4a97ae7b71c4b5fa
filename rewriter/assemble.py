"""The graph that runs: sites replaced by op nodes, and a choice by size where fusing pays late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
from sympy import Expr
from torch import fx, nn

from rewriter import symbols as sym
from rewriter.capture import Captured
from rewriter.decide import Planned, Work
from rewriter.insert import insert
from rewriter.recompute import closed

__all__ = ["as_tensors", "assembled", "chooser", "copied", "insert_all"]


def assembled(
    gm: fx.GraphModule, captured: Captured, planned: Planned, target: str, model: nn.Module
) -> Callable[..., Any]:
    """What runs in the place of Dynamo's graph.

    Sites that are only fused run as they were below the length at which fusion pays: then there are
    two graphs over the same inputs, and the sizes of a call choose.
    """
    changed, fused = planned.changed, planned.fused
    if not changed and not fused:
        return _as_given(gm, captured)
    pays = chooser(captured, fused)
    if pays is False:
        if changed:
            insert_all(captured, changed, target, model)
            return cast(Callable[..., Any], closed(captured.module))
        return _as_given(gm, captured)
    if pays is True:
        insert_all(captured, [*changed, *fused], target, model)
        return cast(Callable[..., Any], closed(captured.module))
    short = _as_given(gm, captured)
    if changed:
        copy, work = copied(captured, changed)
        insert_all(copy, work, target, model)
        short = closed(copy.module)
    insert_all(captured, [*changed, *fused], target, model)
    long: Callable[..., Any] = closed(captured.module)
    return lambda *args: long(*args) if pays(args) else short(*args)


def _as_given(gm: fx.GraphModule, captured: Captured) -> Callable[..., Any]:
    """Dynamo's graph, over the inputs of the captured one."""
    run = cast(Callable[..., Any], gm)
    more = sum(len(way.recipe.leaves) for way in captured.recipes.values())
    return (lambda *args: run(*args[:-more])) if more else run


def insert_all(captured: Captured, work: Sequence[Work], target: str, model: nn.Module) -> None:
    for item in work:
        insert(captured, item.lifted, item.spec, target, model)
    for made, mask in captured.remade.items():  # what still reads it takes the one that is there
        made.replace_all_uses_with(mask)
    captured.graph.eliminate_dead_code()
    captured.graph.lint()
    captured.module.recompile()
    alive = set(captured.graph.nodes)
    for item in work:
        if item.lifted.found.anchor in alive:
            note = "the original weights are still computed, because something else reads them"
            captured.notes.append(f"{item.lifted.site.name}: {note}")


def as_tensors(captured: Captured) -> Captured:
    """The same graph again, in which what was known of inputs of this process is not: bands are
    tensors, and masks those that are given."""
    copy, _ = copied(captured)
    for made, mask in copy.remade.items():
        made.replace_all_uses_with(mask)
    copy.graph.eliminate_dead_code()
    more = sum(len(way.recipe.leaves) for way in copy.recipes.values())
    inputs = [n for n in copy.graph.nodes if n.op == "placeholder"]
    for node in inputs[len(inputs) - more :]:
        copy.inputs.pop(node, None)
        copy.graph.erase_node(node)
    copy.recipes, copy.remade = {}, {}
    copy.module.recompile()
    return copy


def copied(captured: Captured, work: Sequence[Work] = ()) -> tuple[Captured, list[Work]]:
    """The same graph again, with fake values and metadata, and the sites as they stand in it;
    without what is known of its constants."""
    mapping: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(captured.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copy = Captured(
        fx.GraphModule(captured.module, graph),
        prefix=captured.prefix,
        is_root=captured.is_root,
        inputs={mapping[n]: origin for n, origin in captured.inputs.items() if n in mapping},
        written=frozenset(mapping[n] for n in captured.written if n in mapping),
        recipes=captured.recipes,
        remade={mapping[made]: mapping[mask] for made, mask in captured.remade.items()},
        without_grad=frozenset(mapping[n] for n in captured.without_grad if n in mapping),
        autocast={mapping[n]: dtype for n, dtype in captured.autocast.items() if n in mapping},
    )
    return copy, [replace(w, lifted=w.lifted.moved(mapping)) for w in work]


def chooser(captured: Captured, fused: list[Work]) -> Any:
    """Whether fusing pays: True or False where the graph's sizes decide, else a function of a
    call's inputs."""
    if not fused:
        return True
    sources = captured.shape_sources()
    tests: dict[tuple[Expr, int], Callable[[Any], bool]] = {}
    for work in fused:
        sizes = cast(Any, work.lifted.bounds).sizes
        scores = sympy.expand(sizes[sym.q] * sizes[sym.k])
        if work.from_scores == 0 or (scores.is_Integer and scores >= work.from_scores):
            return True
        if scores.is_Integer:
            continue
        symbols = sorted(scores.free_symbols, key=str)
        if any(x not in sources for x in symbols):
            return True
        tests[scores, work.from_scores] = _size_test(
            scores, symbols, [sources[x] for x in symbols], work.from_scores
        )
    if not tests:
        return False
    return lambda args: any(test(args) for test in tests.values())


def _size_test(
    scores: Expr, symbols: list[Any], places: list[tuple[int, int | None]], start: int
) -> Callable[[Any], bool]:
    function = sympy.lambdify(symbols, scores, modules="math")

    def test(args: Any) -> bool:
        sizes = [args[i] if dim is None else args[i].shape[dim] for i, dim in places]
        return bool(function(*sizes) >= start)

    return test
