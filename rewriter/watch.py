"""A graph that runs with its attention sites in sight: what goes into each one, and what comes out.

A watched graph has two forms over the same inputs. `base` defines what is right: the model's own
code, and at a site whose function a pass changes on purpose, the dense reference of its new
formula. `ours` is what `optimize` runs. Nothing here compares the two: `rewriter.verify` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx, nn

from rewriter.assemble import chooser, copied
from rewriter.capture import Captured
from rewriter.decide import Planned, Work
from rewriter.find import softmaxes
from rewriter.insert import REPLACED, insert, operands_of
from rewriter.reading import value_of
from rewriter.report import SiteReport

__all__ = ["SiteCall", "Watched", "watched"]


@dataclass(frozen=True)
class SiteCall:
    """One computation of one site."""

    name: str
    """`Site.name`."""
    out: Tensor
    """`[B, Hq, L, Dv]`."""
    q: Tensor
    k: Tensor
    v: Tensor
    tensors: tuple[Tensor, ...]
    """In the order of the tensors of the site's own spec, or of its new one where it has one."""
    sizes: tuple[int, ...]
    rewritten: bool = False
    """An op node computed it, not the model's own code."""


class _Form:
    """A graph with a tap at every site."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.calls: list[SiteCall] = []

    def run(self, args: Sequence[Any]) -> tuple[Any, list[SiteCall]]:
        """The result of the graph, and each computation of a site, in the order of the graph."""
        self.calls.clear()
        result = self.captured.module(*args)
        return result, list(self.calls)

    def tap(
        self,
        name: str,
        out: fx.Node,
        operands: tuple[Any, ...],
        order: Sequence[int],
        rewritten: bool,
    ) -> None:
        """Hands over the value of `out`, whose axes are `order` of (leading..., L, Dv)."""

        def site_tap(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rest: Any, sizes: Any) -> Tensor:
            plain = out.detach().permute([list(order).index(n) for n in range(out.dim())])
            plain = plain.reshape(*q.shape[:3], v.shape[3]).clone()  # a later op may write into it
            read = tuple(x.detach() for x in rest)
            parts = (q.detach(), k.detach(), v.detach(), read, tuple(sizes), rewritten)
            self.calls.append(SiteCall(name, plain, *parts))
            return out

        graph = self.captured.graph
        with graph.inserting_after(max(out, *_nodes(operands))):
            node = graph.call_function(site_tap, (out, *operands))
        node.meta |= out.meta
        out.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        out.meta[REPLACED] = node

    def finish(self) -> _Form:
        # As when torch compiles: outside of that it keeps every dropout, and what it reads.
        self.captured.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
        self.captured.graph.lint()
        self.captured.module.recompile()
        return self


@dataclass
class Watched:
    """One graph, to be run by whoever watches."""

    reports: dict[str, SiteReport]
    """By the name of the site; only sites that were understood."""
    base: _Form
    choose: Callable[[Sequence[Any], frozenset[str] | None], _Form] = field(repr=False)

    def ours(
        self, args: Sequence[Any], only: Collection[str] | None = None
    ) -> tuple[Any, list[SiteCall]]:
        """What `optimize` runs for these inputs; with `only`, where just the sites of these names
        are rewritten and the others run the model's own code."""
        return self.choose(args, None if only is None else frozenset(only)).run(args)

    def softmaxes(self, args: Sequence[Any]) -> int:
        """How many softmax nodes are left in what `optimize` runs for these inputs."""
        return softmaxes(self.choose(args, None).captured.graph)

    def double(self) -> _Form:
        """`base` with its constants in float64."""
        twin = copy.deepcopy(self.base.captured.module)
        for node in twin.graph.nodes:
            if node.op == "get_attr":
                owner, _, name = cast(str, node.target).rpartition(".")
                module = twin.get_submodule(owner)
                value = getattr(module, name)
                if isinstance(value, nn.Parameter):  # its gradient goes to the narrow one
                    narrow = self.base.captured.module.get_parameter(cast(str, node.target))
                    del module._parameters[name]
                    module.__dict__[name] = narrow.double()
                elif isinstance(value, Tensor) and value.is_floating_point():
                    setattr(module, name, value.detach().double())
        form = _Form(Captured(twin))
        form.calls = self.base.calls
        return form


def watched(captured: Captured, planned: Planned, target: str, model: nn.Module) -> Watched:
    """Both forms of a graph; the graph itself is not changed."""
    meant = [w for w in planned.changed if not w.exact]
    claimed = [w for w in planned.changed if w.exact]
    plain = [*claimed, *planned.fused, *planned.kept]
    base = _form(captured, meant, plain, "reference", model)
    pays = chooser(captured, planned.fused) if planned.fused else False
    forms: dict[tuple[bool, frozenset[str] | None], _Form] = {}

    def choose(args: Sequence[Any], only: frozenset[str] | None) -> _Form:
        long = pays if isinstance(pays, bool) else bool(pays(args))
        key = long, only
        if key not in forms:
            new = [*planned.changed, *(planned.fused if long else ())]
            run = [w for w in new if only is None or w.lifted.site.name in only]
            left = [w for w in new if only is not None and w.lifted.site.name not in only]
            rest = [*planned.kept, *(() if long else planned.fused), *left]
            forms[key] = _form(captured, run, rest, target, model)
        return forms[key]

    reports = {r.site.name: r for r in planned.reports if r.site.spec is not None}
    return Watched(reports, base, choose)


def _form(
    captured: Captured,
    run: Sequence[Work],
    plain: Sequence[Work],
    target: str,
    model: nn.Module,
) -> _Form:
    """A copy in which the sites of `run` are op nodes, and all sites are tapped."""
    copy, works = copied(captured, [*run, *plain])
    form = _Form(copy)
    for number, work in enumerate(works):
        name = work.lifted.site.name
        if number < len(run):
            node = insert(copy, work.lifted, work.spec, target, model)
            q, k, v, tensors, sizes = node.args[:5]
            form.tap(name, node, (q, k, v, tensors, sizes), range(4), True)
        else:
            found = work.lifted.found
            place = found.product if found.product is not None else found.anchor
            operands = operands_of(copy, work.lifted)
            order = work.lifted.out_order or range(value_of(place).dim())
            form.tap(name, place, operands, order, False)
    return form.finish()


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found
