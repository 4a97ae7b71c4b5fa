"""What sites and calls allocate, and that the measurement would see a matrix of scores."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import rewriter
from rewriter import symbols as sym
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.report import SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.verify import verify
from rewriter.verify.memory import ENOUGH, MemoryUse, SiteMemory, SiteMeter, peak_of
from rewriter.watch import SiteCall
from verify.faults import implemented
from verify.small_models import Shape, Tower, batch

CPU = torch.device("cpu")
CAUSAL = SoftmaxSpec(score=10 * sympy.tanh(sym.s / 10), mask=sym.k <= sym.q)


def metered(
    target: str, spec: SoftmaxSpec = CAUSAL, *, heads: int = 8, length: int = 512, dim: int = 8
) -> SiteMemory:
    """One site by itself."""
    meter = SiteMeter(target)
    line = SiteReport(Site("layers.0", 0, spec=spec), 0, spec, "rewritten", target)
    q, k, v = torch.randn(3, 1, heads, length, dim)
    meter(line, SiteCall("layers.0", q, q, k, v, (), ()))
    (site,) = meter.sites
    return site


def test_peak_and_largest_allocation_are_exact() -> None:
    def work() -> Tensor:
        x = torch.zeros(1000)
        y = x + 1  # both alive: 8000 bytes
        del x
        return y[:500] + y[500:]

    found = peak_of(work, CPU)
    assert 8000 <= found.peak < 8100  # and a few numbers that torch wraps
    assert found.largest == 4000
    assert peak_of(lambda: None, CPU) == (0, 0)


def test_allocations_inside_our_op_are_seen() -> None:
    q = torch.randn(1, 2, 256, 8)
    dense = peak_of(lambda: attention(q, q, q, (), (), CAUSAL, "reference"), CPU)
    assert dense.largest >= 4 * 2 * 256 * 256
    assert dense.peak >= 2 * dense.largest


def test_fused_code_makes_no_matrix_of_scores() -> None:
    site = metered("torch.blocked")
    assert site.judged
    assert site.ok
    assert site.scores == 4 * 8 * 512 * 512
    assert 0 < site.largest < site.scores / 4


def test_what_makes_the_matrix_and_claims_to_be_fused_fails() -> None:
    with implemented(reference):
        site = metered("torch.blocked")
    assert site.judged
    assert not site.ok
    assert "it claims to be fused and allocates" in site.reason
    assert "where all 1 x 8 x 512 x 512 scores are 8.0 MiB" in site.reason


def by_head(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any) -> Tensor:
    """Dense, one head of one batch after the other."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = (slice(b, b + 1), slice(h, h + 1))
            out[one] = reference(spec, q[one], k[one], v[one], tensors, sizes)
    return out


def test_what_makes_the_scores_of_one_head_after_the_other_fails() -> None:
    honest = metered("torch.blocked", length=1536)
    assert honest.judged
    assert honest.ok
    with implemented(by_head):
        site = metered("torch.blocked", length=1536)
        few = metered("torch.blocked", length=512)
    assert not site.ok
    assert site.largest < site.scores / 2
    assert site.peak < site.scores
    assert "where the scores of one head, 1536 x 1536, are 9.0 MiB: it makes them whole" in (
        site.reason
    )
    assert few.ok  # one head is no more than a block: not told apart


def test_too_few_scores_and_the_reference_are_not_judged() -> None:
    short = metered("torch.blocked", length=64)
    assert not short.judged
    assert f"8 x 64 x 64 scores are too few to tell: it takes {ENOUGH['cpu']}" in short.reason
    wide = metered("torch.blocked", dim=128)
    assert not wide.judged
    assert "and 1024 queries and keys" in wide.reason
    dense = metered("reference")
    assert not dense.judged
    assert dense.reason == "the reference does not claim to be fused"


def test_a_measurement_that_judged_nothing_is_not_fine() -> None:
    site = SiteMemory("a", "torch.blocked", 1, 1, 10, judged=False, ok=True, reason="too short")
    use = MemoryUse(5, 5, (site,))
    assert not use.ok
    assert use.failures == ("no site's memory could be judged: too short",)
    assert "no site runs new code" in MemoryUse(5, 5, ()).failures[0]
    assert MemoryUse(5, 5, (replace(site, judged=True), site)).ok
    assert MemoryUse(5, 5, (site,)).to_dict()["scores"] == 10


def test_verify_measures_both_models_and_every_new_site() -> None:
    torch.manual_seed(0)
    shape = Shape(dim=16, heads=8, kv_heads=8, layers=1)
    original = Tower(shape).eval()
    model = rewriter.optimize(copy.deepcopy(original))
    inputs = batch(0, rows=1, length=512, dim=16)
    options: dict[str, Any] = {"gradients": False, "memory": True}
    report = verify(original, model, inputs, **options)
    assert report.memory is not None
    assert report.memory.original > report.memory.scores == 4 * 8 * 512 * 512 > report.memory.model
    assert [site.name for site in report.memory.sites] == ["blocks.0.attention"]
    assert report.to_dict()["memory"]["ok"]
    assert "1 of 1 site judged: fine" in str(report)
    report = verify(original, model, batch(0, rows=1, dim=16), raises=False, **options)
    assert not report.ok
    assert not report.failures
    assert "no site's memory could be judged: no site runs new code" in str(report)


@pytest.mark.gpu
def test_on_a_gpu_the_counter_of_the_allocator_is_read() -> None:
    q = torch.randn(1, 16, 4096, 16, device="cuda")
    scores = q.shape[1] * 4096 * 4096 * 4
    with torch.no_grad():
        dense = peak_of(lambda: attention(q, q, q, (), (), CAUSAL, "reference"), q.device)
        fused = peak_of(lambda: attention(q, q, q, (), (), CAUSAL, "auto"), q.device)
    assert dense.peak > scores
    assert fused.peak < scores / 4
