"""Memory: does a site that claims to be fused still make its matrix of scores.

A CPU has no counter of its own, so torch's profiler lists every allocation, those inside an op as
well: the numbers are exact and the same in every run. On CUDA the counter of the allocator is read.

A site fails if it makes the scores of all heads, or those of one head at a time. The second shows
only where the scores of one head are more than a fused block and than the operands. Not told apart
from fused code are loops over heads with fewer scores than that, and loops over slices of the
queries or keys of one head: fused code is such a loop, in slices of a bounded size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rewriter.capture import uncompiled
from rewriter.isolation import kept_buffers
from rewriter.op import attention
from rewriter.report import SiteReport
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.verify.call import Call
from rewriter.verify.rows import counted
from rewriter.watch import SiteCall

__all__ = ["MemoryUse", "Peak", "SiteMemory", "SiteMeter", "memory_of", "peak_of"]

ENOUGH = {"cpu": 2**21, "cuda": 2**28}
"""Scores, over batch and heads, from which a site is judged: four times what fused code holds at
once. With fewer, a block and the whole matrix are hard to tell apart."""
_WIDE = 8
"""Queries and keys have to be this many times the head dimension, or else operands and scores are
of one size."""


class Peak(NamedTuple):
    """Bytes that a call allocates beyond what was in use before it."""

    peak: int
    largest: int
    """The largest single allocation; 0 on CUDA, where it is not known."""


@dataclass(frozen=True)
class SiteMemory:
    """What one site allocates by itself."""

    name: str
    lowering: str
    peak: int
    largest: int
    scores: int
    """Bytes of its matrix of scores, B x H x L x M, in the dtype of its queries."""
    judged: bool
    """There are enough scores to tell."""
    ok: bool
    reason: str = ""
    """Why it failed, or why it was not judged."""


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory of one call without gradients, in bytes, and what each new site allocates."""

    original: int
    model: int
    sites: tuple[SiteMemory, ...]

    @property
    def scores(self) -> int:
        """Bytes of the scores of the largest site; 0 if no site runs new code."""
        return max((site.scores for site in self.sites), default=0)

    @property
    def failures(self) -> tuple[str, ...]:
        """What fails, one sentence each: a site, or that none could be judged."""
        if any(site.judged for site in self.sites):
            return tuple(f"{s.name}: {s.reason}" for s in self.sites if not s.ok)
        why = self.sites[0].reason if self.sites else "no site runs new code at these inputs"
        return (f"no site's memory could be judged: {why}",)

    @property
    def ok(self) -> bool:
        """True if some site was judged, and none makes its matrix of scores."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = {"original": self.original, "model": self.model, "scores": self.scores}
        return {"ok": self.ok, **counts, "sites": [dict(vars(s)) for s in self.sites]}

    def __str__(self) -> str:
        count = sum(site.judged for site in self.sites)
        judged = f"{count} of {counted(len(self.sites), 'site')} judged"
        return (
            f"memory: a call peaks at {_bytes(self.model)}, the original at "
            f"{_bytes(self.original)}; the scores of the largest site are {_bytes(self.scores)}; "
            f"{judged}: {'fine' if self.ok else 'FAIL'}"
        )


@dataclass
class SiteMeter:
    """Measures sites as they run; equal ones once."""

    target: str
    sites: list[SiteMemory] = field(default_factory=list)
    _known: dict[tuple[Any, ...], SiteMemory] = field(default_factory=dict)

    def __call__(self, line: SiteReport, call: SiteCall) -> None:
        spec = line.after
        if spec is None:
            return
        operands = (call.q, call.k, call.v, *call.tensors)
        key = (spec.digest(), call.sizes, *((x.shape, x.dtype, x.stride()) for x in operands))
        if key not in self._known:
            self._known[key] = self._measured(line, spec, call)
        found = {**vars(self._known[key]), "name": line.site.name}
        self.sites.append(SiteMemory(**found))

    def _measured(self, line: SiteReport, spec: Spec, call: SiteCall) -> SiteMemory:
        q, k, v = call.q, call.k, call.v

        def run() -> Tensor:
            return attention(q, k, v, call.tensors, call.sizes, spec, self.target)

        with torch.no_grad():
            run()  # what is made once a shape, and kept
            peak, largest = peak_of(run, q.device)
        count = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        scores, kind = count * q.element_size(), q.device.type
        found = (line.site.name, line.lowering, peak, largest, scores)
        wide = _WIDE * max(q.shape[3], v.shape[3])
        few = f"{q.shape[0]} x {q.shape[1]} x {q.shape[2]} x {k.shape[2]} scores"
        if self.target == "reference":
            return SiteMemory(*found, False, True, "the reference does not claim to be fused")
        if count < ENOUGH.get(kind, ENOUGH["cuda"]) or min(q.shape[2], k.shape[2]) < wide:
            least = ENOUGH.get(kind, ENOUGH["cuda"])
            reason = f"{few} are too few to tell: it takes {least} in all, and {wide} queries and "
            return SiteMemory(*found, False, True, reason + "keys; give longer inputs")
        if not _sees_scores(q.device):
            reason = "the measurement does not see the scores of the dense reference, so it shows "
            return SiteMemory(*found, True, False, reason + "nothing; report it")
        if largest >= scores / 2 or peak >= scores:
            reason = f"it claims to be fused and allocates {_bytes(max(peak, largest))}, where all "
            return SiteMemory(*found, True, False, f"{reason}{few} are {_bytes(scores)}")
        one, held = q.shape[2] * k.shape[2] * q.element_size(), _beside_scores(call)
        most = largest if kind == "cpu" else peak - _output_bytes(call)
        if one > held and most >= one:
            reason = f"it claims to be fused and allocates {_bytes(most)}, where the scores of one "
            reason += f"head, {q.shape[2]} x {k.shape[2]}, are {_bytes(one)}: it makes them whole"
            return SiteMemory(*found, True, False, reason)
        return SiteMemory(*found, True, True)


def _beside_scores(call: SiteCall) -> int:
    """Bytes that fused code may allocate at once: a block of scores, of 64 rows or more, or an
    operand in float32 with its heads repeated; on CUDA, where only the sum is known, some of
    each."""
    q, k, v = call.q, call.k, call.v
    width, is_cpu = max(q.element_size(), 4), q.device.type == "cpu"
    bound = ENOUGH["cpu"] // 2 if is_cpu else ENOUGH["cuda"] // 4
    block = max(bound, 64 * q.shape[1] // k.shape[1] * k.shape[2]) * width
    rows = q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2])
    operand = rows * max(q.shape[3], v.shape[3]) * width
    return max(block, operand) if is_cpu else 2 * block + 4 * operand


def _output_bytes(call: SiteCall) -> int:
    return call.out.numel() * call.out.element_size()


def memory_of(original: nn.Module, model: nn.Module, call: Call, meter: SiteMeter) -> MemoryUse:
    """The peak of one more call of both models, which have run before, beside what sites take."""
    bare = Call(call.args, call.kwargs, call.seed, gradients=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with kept_buffers(model):
        bare.run(model)  # without gradients it may be another graph, which is captured now
        new = peak_of(lambda: bare.run(model), device).peak
    with uncompiled(original), kept_buffers(original):
        old = peak_of(lambda: bare.run(original), device).peak
    return MemoryUse(old, new, tuple(meter.sites))


def peak_of(run: Callable[[], Any], device: torch.device) -> Peak:
    """What a function allocates at most, beyond what is in use before; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler tells stderr that it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    kineto: Any = found.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak, largest = max(peak, now), max(largest, event.nbytes())
    return Peak(peak, largest)


@cache
def _sees_scores(device: torch.device) -> bool:
    """The dense reference, measured the same way, shows its matrix: a control."""
    q = torch.zeros(1, 1, 512, 8, device=device)
    with torch.no_grad():
        found = peak_of(lambda: attention(q, q, q, (), (), SoftmaxSpec(), "reference"), device)
    return max(found) >= 512 * 512 * q.element_size()


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
