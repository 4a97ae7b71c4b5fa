"""A model with only some of its sites rewritten, and what each site was given: one capture for
all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import InputError, LoweringError
from rewriter.isolation import precise, seeded
from rewriter.report import SiteReport
from rewriter.verify.call import Call, one_line
from rewriter.verify.judge import Judge
from rewriter.verify.sites import detached
from rewriter.verify.stages import Operands, unmasked_rows
from rewriter.watch import SiteCall, Watched

__all__ = ["Recorded", "Reverter", "failure", "first_failing"]


@dataclass(frozen=True)
class Recorded:
    """One computation of one site, by the code that defines what is right."""

    report: SiteReport
    is_defined: bool
    """A pass changed the function on purpose, so that its new formula defines what is right."""
    ref: SiteCall
    gold: SiteCall | None
    """The same in float64."""

    @property
    def name(self) -> str:
        return self.ref.name

    def has_rows_without_key(self) -> bool:
        spec, operands = self.report.site.spec, self.operands(self.ref)
        if spec is None or not operands.hold(spec):
            return False
        return not bool(unmasked_rows(spec, operands).all())

    def operands(self, call: SiteCall) -> Operands:
        spec = self.report.after if self.is_defined else self.report.site.spec
        assert spec is not None
        tensors = dict(zip((t.name for t in spec.tensors), call.tensors, strict=True))
        sizes = dict(zip(spec.sizes, call.sizes, strict=True))
        return Operands(call.q, call.k, call.v, tensors, sizes)


@dataclass
class Reverter:
    """A watcher that runs each graph with the sites in `only` rewritten."""

    seed: int
    is_exact: Callable[[SiteReport], bool]
    only: frozenset[str] | None = None
    recorded: list[Recorded] = field(default_factory=list)
    _graphs: dict[int, Watched] = field(default_factory=dict)

    def watch(self, w: Watched, args: Sequence[Any]) -> Any:
        if id(w) not in self._graphs:
            self._graphs[id(w)] = w
            with torch.no_grad():
                self.recorded.extend(self._record(w, args))
        return w.ours(args, self.only)[0]

    def _record(self, w: Watched, args: Sequence[Any]) -> Iterator[Recorded]:
        devices = {x.device for x in args if isinstance(x, Tensor)}
        gold: Sequence[SiteCall | None]
        try:
            with seeded(self.seed, devices), precise(torch.float64):
                gold = w.double().run(detached(args, torch.float64))[1]
        except Exception:
            gold = ()  # some models do not run in float64
        with seeded(self.seed, devices):
            ref = w.base.run(detached(args))[1]
        missing: list[SiteCall | None] = [None] * len(ref)
        for own, wide in zip(ref, gold or missing, strict=True):
            report = w.reports[own.name]
            defined = not self.is_exact(report) and report.after != report.site.spec
            yield Recorded(report, defined, own, wide)

    @property
    def changed(self) -> list[Recorded]:
        """Sites whose function is changed on purpose."""
        return [x for x in self.recorded if x.is_defined]

    @property
    def names(self) -> list[str]:
        """The sites that are rewritten, in the order in which they run."""
        found = [r.ref.name for r in self.recorded if r.report.decision == "rewritten"]
        return list(dict.fromkeys(found))


def failure(module: nn.Module, call: Call, judge: Judge) -> str:
    """The first difference between a run and its original; `""` if they agree.

    Raises:
        InputError: if nothing was compared.
        LoweringError: if an implementation was asked for by name and cannot be had.
    """
    try:
        rows = judge.rows(call.run(module))
    except LoweringError:
        raise
    except Exception as error:
        return f"the model raises {one_line(error)}"
    if not any(row.kind == "output" for row in rows):
        raise InputError(
            "nothing was compared: the model returns no tensor and no number; "
            "give a module that returns one"
        )
    return next((f"the {r.kind} `{r.name}`: {r.reason}" for r in rows if not r.ok), "")


def first_failing(fails: Callable[[int], str], count: int) -> tuple[int, str]:
    """The least number of sites, taken in order, that fails, and how, if all `count` of them do."""
    low, high = 0, count
    found = ""
    while high - low > 1:
        middle = (low + high) // 2
        reason = fails(middle)
        if reason:
            high, found = middle, reason
        else:
            low = middle
    return high, found
