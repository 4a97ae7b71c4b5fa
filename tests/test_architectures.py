"""Each architecture of `zoo`: every attention is found, and the exact rewriting changes nothing.

`fuse(from_scores=0)` takes the fused form at any size; the default leaves sizes this small alone.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
import zoo
from rewriter.verify.generation import token_agreement

FUSE = "fuse(from_scores=0)"
TOKENS = 32

CASES = [
    pytest.param(c, id=str(c), marks=pytest.mark.xdist_group(str(c)))  # one case, one worker
    for c in zoo.cases()
]
# Either code and either dtype once: a case takes its seconds.
DIAGONAL = [
    p
    for p in CASES
    if (p.values[0].implementation == "eager") == (p.values[0].dtype == torch.float32)
]
GENERATING = [p for p in DIAGONAL if p.values[0].architecture.generates]


@dataclass
class Pair:
    """A model, and a copy of it that is rewritten."""

    original: nn.Module
    model: nn.Module
    inputs: dict[str, Any]
    prompt: dict[str, Any]
    implementation: str
    dtype: torch.dtype


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    case: zoo.Case = request.param
    original = case.build()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    yield Pair(original, model, case.inputs(), case.prompt(), case.implementation, case.dtype)
    torch._dynamo.reset()


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in output.values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("case", DIAGONAL)
def test_every_attention_is_found_and_restore_gives_the_original_bits(case: zoo.Case) -> None:
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        before = _tensors(model(**inputs))
        assert rewriter.optimize(model, FUSE) is model
        model(**inputs)
        report = rewriter.inspect(model)
        rewriter.restore(model)
        after = _tensors(model(**inputs))
    assert len(report.attention) == case.architecture.sites, str(report)
    assert [r.reason for r in report.attention if r.decision != "rewritten"] == []
    assert "not checked" not in str(report), str(report)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_exact_rewriting_passes_verify(pair: Pair) -> None:
    """Sites are compared once an architecture: that takes another capture."""
    sites = pair.implementation == "eager" and pair.dtype == torch.float32
    report = rewriter.verify(pair.original, pair.model, pair.inputs, sites=sites)
    assert report.ok, str(report)


def _gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The gradients of one training step, one a parameter that has one."""
    model.train()
    model.zero_grad()
    output = _tensors(model(**inputs))[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    (output * weights).mean().backward()
    model.eval()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_one_training_step_gives_the_same_gradients(pair: Pair) -> None:
    """Against the original in float32: twice the error of the original at most, or its rounding."""
    given = pair.inputs.items()
    wide = {n: x.float() for n, x in given if torch.is_tensor(x) and x.is_floating_point()}
    gold = _gradients(copy.deepcopy(pair.original).float(), pair.inputs | wide)
    base = _gradients(pair.original, pair.inputs)
    ours = _gradients(pair.model, pair.inputs)
    assert len(ours) == len(base) == len(gold) > 10
    # Some gradients are zero but for rounding, such as that of a bias on all keys.
    typical = statistics.median(map(_rms, gold))
    rounding = max(torch.finfo(base[0].dtype).eps, 64 * torch.finfo(torch.float32).eps)
    for x, y, exact in zip(ours, base, gold, strict=True):
        floor = rounding * max(_rms(exact), typical)
        assert _rms(x - exact) <= 2 * _rms(y - exact) + floor


@pytest.mark.parametrize("pair", GENERATING, indirect=True)
def test_greedy_generation_with_a_cache_gives_the_same_tokens(pair: Pair) -> None:
    """In bfloat16 two logits may be equal but for rounding; which wins then is no difference."""
    prompt = pair.prompt | {"use_cache": True}
    agreement = token_agreement(pair.original, pair.model, prompt, TOKENS, padding=False)
    assert agreement.rows == 2
    assert agreement.ok, str(agreement)
    if pair.dtype == torch.float32:
        assert agreement.agreement == 1.0
    report = rewriter.inspect(pair.model)
    assert [r.reason for r in report.attention if r.decision != "rewritten"] == []


PADDING = "attention_mask[b, k] ≠ 0"
MASKS = {  # one a layer; sliding windows of 4
    "bert": [PADDING, PADDING],
    "gpt2": [f"k ≤ q ∧ {PADDING}"] * 2,
    "llama": [f"k ≤ q ∧ {PADDING}"] * 2,
    "mistral": [f"k ≤ q ∧ q - k < 4 ∧ {PADDING}"] * 2,
    "gemma2": [f"k ≤ q ∧ q - k < 4 ∧ {PADDING}", f"k ≤ q ∧ {PADDING}"],
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(a.name, i) for a in zoo.ARCHITECTURES if a.name in MASKS for i in a.implementations],
)
def test_masks_print_as_logic(name: str, implementation: str) -> None:
    architecture = zoo.architecture(name)
    report = rewriter.inspect(architecture.build(implementation), architecture.inputs())
    score = "50·tanh(s/50)" if name == "gemma2" else "s"
    assert [str(r.site.spec) for r in report.attention] == [
        f"softmax( {score} | {mask} ) · v, s = 0.353553·q·k" for mask in MASKS[name]
    ]
    assert report.opaque == 0
