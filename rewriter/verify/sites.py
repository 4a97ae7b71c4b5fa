"""Every attention site by itself: gold, the model's own code and what runs, at the same inputs.

One capture gives all three (`rewriter.watch`). At a site whose function a pass changed on purpose,
the dense reference of the new formula stands in the place of the model's own code. Sites differ
also by what their operands lost in the sites before them: the first one that fails is the one to
look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.isolation import kept_buffers, precise, seeded
from rewriter.optimize import reinstalled
from rewriter.report import Report, SiteReport
from rewriter.verify.call import Call, one_line
from rewriter.verify.compare import WITHOUT_GOLD, baseline_of
from rewriter.verify.judge import judged, weak_spots
from rewriter.verify.rows import VerifyRow
from rewriter.verify.structure import Structure
from rewriter.watch import SiteCall, Watched

__all__ = ["Sites", "compare_sites", "detached"]

_NAMED = 3  # sites that a note names

Look = Callable[[SiteReport, SiteCall], None]


@dataclass
class Sites:
    """What was seen of the sites of a model in one call."""

    seed: int
    dtype: torch.dtype
    """The coarsest dtype that the model computes in; it sets the floor."""
    look: Look | None = None
    """Called with every computation by new code, before the next graph runs."""
    rows: list[VerifyRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    report: Report = Report()
    rewritten: dict[str, bool] = field(default_factory=dict)
    """By name of the site: new code computed it, each time."""
    compared_new: bool = False
    """New code was compared somewhere."""
    failed: str = ""
    """Why the watched call did not end."""
    _calls: Counter[str] = field(default_factory=Counter)
    _graphs: dict[int, Watched] = field(default_factory=dict)
    _softmaxes: int = 0

    @property
    def structure(self) -> Structure:
        return Structure.of(replace(self.report, softmaxes=self._softmaxes), self.rewritten)

    def watch(self, w: Watched, args: Sequence[Any]) -> Any:
        """Runs one graph in all its forms; the result is that of the model."""
        self._count(w, args)
        devices = {x.device for x in args if isinstance(x, Tensor)}
        gold = self._gold(w, args, devices)
        try:
            with seeded(self.seed, devices):
                ref = w.base.run(detached(args))[1]
        except Exception as error:
            self.notes.append(f"{len(w.reports)} sites were not compared: {one_line(error)}")
            return w.ours(args)[0]
        with seeded(self.seed, devices):
            out, new = w.ours(args)
        if [x.name for x in ref] != [x.name for x in new]:
            self.notes.append("the sites of a graph were not compared: they run in another order")
            return out
        for number, (own, ours) in enumerate(zip(ref, new, strict=True)):
            self._compare(None if gold is None else gold[number], own, ours)
            if self.look is not None and ours.rewritten:
                self.look(w.reports[ours.name], ours)
        return out

    def _count(self, w: Watched, args: Sequence[Any]) -> None:
        """Softmaxes that are left in the form that runs; of each graph once."""
        if id(w) not in self._graphs:
            self._graphs[id(w)] = w
            self._softmaxes += w.softmaxes(args)

    def _gold(
        self, w: Watched, args: Sequence[Any], devices: set[torch.device]
    ) -> list[SiteCall] | None:
        try:
            with seeded(self.seed, devices), precise(torch.float64):
                return w.double().run(detached(args, torch.float64))[1]
        except Exception as error:
            note = "sites have no float64 gold, so their bound is the floor alone, taken wider"
            self.notes.append(f"{note}: {one_line(error)}")
            return None

    def _compare(self, gold: SiteCall | None, ref: SiteCall, new: SiteCall) -> None:
        self._calls[ref.name] += 1
        self.rewritten[ref.name] = self.rewritten.get(ref.name, True) and new.rewritten
        call = self._calls[ref.name]
        name = ref.name if call == 1 else f"{ref.name}#call{call}"
        best = (ref if gold is None else gold).out
        base = replace(baseline_of(ref.out, best), ref=ref.out)
        wider = WITHOUT_GOLD if gold is None else 1.0
        row = judged(name, "site", base, new.out, self.dtype, wider)
        self.rows.append(row)
        self.compared_new |= new.rewritten and (row.count > 0 or not row.ok)
        self.notes.extend(weak_spots(name, base))


def compare_sites(
    model: nn.Module, call: Call, dtype: torch.dtype, *, look: Look | None = None
) -> Sites:
    """Run an optimized model once, and compare each of its sites.

    A site that was not understood is not compared, and one that runs its own code shows nothing:
    the notes say which.

    Args:
        model: what `optimize` returned; it is afterwards as before.
        call: the arguments.
        dtype: the coarsest dtype that the model computes in.
        look: called with every computation of a site by new code.
    """
    sites = Sites(call.seed, dtype, look)
    with kept_buffers(model), reinstalled(model, watcher=sites.watch) as report:
        try:
            replace(call, gradients=False).run(model)
        except RewriterError:
            raise
        except Exception as error:
            sites.failed = f"the call whose sites are compared failed: {one_line(error)}"
            sites.notes.append(sites.failed)
        sites.report = report()
    sites.notes[:] = dict.fromkeys([*sites.notes, *sites.report.notes, *_shortfalls(sites)])
    return sites


def detached(args: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The inputs of a graph, so that it may write into them; parameters stay shared unless they are
    cast."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if dtype is not None and x.is_floating_point() and x.dtype != dtype:
            return x.detach().to(dtype)
        return x.detach() if isinstance(x, nn.Parameter) else x.detach().clone()

    return [one(x) for x in args]


def _shortfalls(sites: Sites) -> Iterator[str]:
    """What the rows do not show."""
    lines = {line.site.name: line for line in sites.report.attention}
    unread = {n: x for n, x in lines.items() if x.site.spec is None}
    missed = {n: x for n, x in lines.items() if n not in sites.rewritten and n not in unread}
    own = {n: lines[n] for n, new in sites.rewritten.items() if not new and n in lines}
    count = len(lines)
    if unread:
        yield f"{len(unread)} of {count} sites were not understood and not compared: {_few(unread)}"
    if missed:
        yield f"{len(missed)} of {count} sites were not compared: {', '.join(missed)}"
    if own:
        how = f"{len(own)} of {count} sites run their own code: not rewritten"
        yield f"{how}, so nothing is shown of new code there: {_few(own)}"


def _few(lines: dict[str, SiteReport]) -> str:
    shown = [f"{n} ({x.reason or 'no reason is known'})" for n, x in lines.items()][:_NAMED]
    more = len(lines) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])])
