"""A small attention module for each pattern, and one pass in it through the real `optimize`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from rewriter.giving import give, label_spans
from rewriter.optimize import optimize, report_of
from rewriter.passbase import Pattern, Request
from rewriter.registry import read_requests
from rewriter.testing.outcome import Outcome, Verdict
from rewriter.testing.subject import Subject
from rewriter.verify import verify

__all__ = ["SmallAttention", "inputs_for", "model_rows"]


class SmallAttention(nn.Module):
    """Queries from `x`, keys and values from `x` or from `memory`; two query heads a key head; what
    comes out is added to `x`."""

    heads, kv_heads, head_dim = 4, 2, 8

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        dim = self.heads * self.head_dim
        self.causal = pattern.startswith("causal")
        self.q, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * self.kv_heads * self.head_dim)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        (batch, q_len, _), kv_len = x.shape, source.shape[1]
        q = self.q(x).view(batch, q_len, self.heads, -1).transpose(1, 2)
        k, v = (
            self.kv(source).view(batch, kv_len, 2 * self.kv_heads, -1).transpose(1, 2).chunk(2, 1)
        )
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        if self.causal:
            seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ v
        return x + cast(Tensor, self.o(out.transpose(1, 2).flatten(2)))


def inputs_for(pattern: Pattern, seed: int = 0) -> dict[str, Tensor]:
    """The inputs of one call."""
    generator = torch.Generator().manual_seed(seed)
    dim = SmallAttention.heads * SmallAttention.head_dim
    given = {"x": torch.randn(2, 11, dim, generator=generator)}
    if "cross" in pattern:
        given["memory"] = torch.randn(2, 14, dim, generator=generator)
    return given


def model_rows(subject: Subject, *, full: bool = False) -> Iterator[Outcome]:
    """The pass in a small model: its one attention is rewritten, and outputs and gradients are
    those of the dense reference of the new formula; an exact pass keeps those of the model."""
    usual: Pattern = "causal self"
    patterns = subject.patterns
    if not full:
        patterns = (usual,) if usual in patterns else patterns[:1]
    for pattern in patterns:
        every = full and pattern == patterns[0]  # seconds each
        requests = subject.requests if every else subject.requests[-1:]
        found = [_in_model(subject, request, pattern) for request in requests]
        if any(row.verdict == "passed" for row in found):  # others may decline this very model
            found = [replace(x, verdict="skipped") if _IDLE in x.reason else x for x in found]
        yield from found


_IDLE = "the pass was not applied"


def _give(model: nn.Module) -> None:
    """What passes may want of a user: an image in the prompt, and head outputs of another run."""
    x = torch.randn(
        2,
        SmallAttention.heads,
        11,
        SmallAttention.head_dim,
        generator=torch.Generator().manual_seed(3),
    )
    give(model, labels=label_spans([(2, 6)], length=9), patches={"(no module)": x})


def _in_model(subject: Subject, request: Request, pattern: Pattern) -> Outcome:
    check, case = "model", f"{request.text}, {pattern}"
    torch.manual_seed(0)
    original, given = SmallAttention(pattern).eval(), inputs_for(pattern)
    model = copy.deepcopy(original)
    fused = read_requests(["fuse(from_scores=0)"])  # also where the original code would be faster
    try:
        optimize(model, request, *fused)
        _give(model)
        with torch.no_grad():
            model(**given)
        (site,) = report_of(model).attention
        if site.decision != "rewritten" or request.text not in site.passes:
            verdict: Verdict = "failed" if pattern in subject.kind.patterns else "skipped"
            return Outcome(check, case, verdict, f"{_IDLE}: {site.reason}")
        keeps = subject.kind.contract == "exact" or request == subject.identity
        report = verify(
            original, model, given, raises=False, against="original" if keeps else "reference"
        )
    except Exception as error:
        return Outcome(check, case, "failed", f"{type(error).__name__}: {error}")
    wrong = next((row for row in report.rows if not row.ok), None)
    if wrong is not None:
        return Outcome(check, case, "failed", f"{wrong.name}: {wrong.reason}", wrong.used)
    return Outcome(check, case, "passed", used=max(row.used for row in report.rows))
