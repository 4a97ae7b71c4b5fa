"""What a rewritten model has to agree with, for any choice of its sites."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from rewriter.passbase import Request
from rewriter.report import SiteReport
from rewriter.verify.against import original_runs, reference_runs
from rewriter.verify.call import Call, coarsest_dtype
from rewriter.verify.judge import Judge

__all__ = ["Yardstick"]


@dataclass
class Yardstick:
    """Judges runs of a model in which some sites are rewritten by requests."""

    original: nn.Module
    call: Call
    requests: tuple[Request, ...]
    _judges: dict[frozenset[str] | None, Judge] = field(default_factory=dict)

    def is_exact(self, report: SiteReport) -> bool:
        """Every pass that was applied to the site promises to keep its function."""
        applied = [r for r in self.requests if r.text in report.passes]
        return all(r.action.contract == "exact" for r in applied)

    def judge(self, changed: Collection[str] | None) -> Judge:
        """The judge of a model in which the function of these sites is changed on purpose; None for
        all that the requests change."""
        if changed is None and all(r.action.contract == "exact" for r in self.requests):
            changed = ()
        key = None if changed is None else frozenset(changed)
        if key not in self._judges:
            self._judges[key] = self._judge(key)
        return self._judges[key]

    def _judge(self, changed: frozenset[str] | None) -> Judge:
        dtype = coarsest_dtype(self.original, self.call.tensors.values())
        notes: list[str] = []
        if changed is not None and not changed:
            expected = original_runs(self.original, self.call, dtype, notes)
        else:
            requests = self.requests
            expected = reference_runs(self.original, self.call, requests, notes, changed)
        return Judge.of(expected.ref, expected.gold, expected.gold_dtype, dtype)
