"""Masks that cross a graph break are read as what they are, and looked at again in each call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.report import Report

FUSE = "fuse(from_scores=0)"
WIDTH = 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).split(WIDTH, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        hidden = ~mask if mask.dtype == torch.bool else mask < -1
        scores = scores.masked_fill(hidden, torch.finfo(x.dtype).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def as_truths(seen: Tensor) -> Tensor:
    return seen


def as_numbers(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


class Broken(nn.Module):
    """A mask that is made in one graph; each layer is another graph."""

    def __init__(
        self,
        form: Callable[[Tensor], Tensor] = as_truths,
        between: Callable[[Any, Tensor, Tensor], Tensor] = lambda self, mask, pad: mask,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.form, self.between = form, between
        self.window = 100

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        seen = (place[:, None] >= place) & (place[:, None] - place < self.window)
        mask = self.form(seen[None, None] & pad[:, None, None].bool())
        torch._dynamo.graph_break()  # not in a loop: all of the code would be left to Python
        mask = self.between(self, mask, pad)
        x = self.layers[0](x, mask)
        torch._dynamo.graph_break()
        return self.layers[1](x, mask)


def models(**options: Any) -> tuple[Broken, nn.Module]:
    torch.manual_seed(0)
    original = Broken(**options).eval()
    return original, rewriter.optimize(copy.deepcopy(original), FUSE)


def inputs(n: int = 20, batch: int = 2) -> tuple[Tensor, Tensor]:
    pad = torch.ones(batch, n, dtype=torch.long)
    pad[0, : n // 4] = 0
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(n)), pad


def assert_same(model: nn.Module, original: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        found = model(*(x.clone() for x in args))
        torch.testing.assert_close(found, original(*(x.clone() for x in args)))


def formulas(model: nn.Module) -> set[str]:
    report: Report = rewriter.inspect(model)
    return {str(site.site.spec).partition(" ) ")[0] for site in report.attention}


READ = {"softmax( s | k ≤ q ∧ q - k < 100 ∧ pad[b, k] ≠ 0"}


@pytest.mark.parametrize("form", [as_truths, as_numbers])
def test_a_mask_made_in_another_graph_is_read_as_a_formula(form: Any) -> None:
    original, model = models(form=form)
    for args in (inputs(), inputs(33), inputs(12, 5)):
        assert_same(model, original, args)
    assert formulas(model) == READ
    report = rewriter.inspect(model)
    assert report.breaks >= 1
    assert len(report.rewritten) == 2
    assert not report.notes


def test_a_part_of_a_mask_that_is_handed_on_is_read_too() -> None:
    original, model = models(between=lambda self, mask, pad: mask.transpose(2, 3).transpose(2, 3))
    assert_same(model, original, inputs())
    assert formulas(model) == READ


def test_gradients_flow_beside_it() -> None:
    original, model = models()
    for module in (original, model):
        module(*inputs()).square().sum().backward()
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert formulas(model) == READ


def test_the_harness_sees_the_same_model() -> None:
    original, model = models()
    assert_same(model, original, inputs())
    assert rewriter.verify(original, model, inputs()).ok


def test_a_pass_that_changes_the_function_is_applied_to_it() -> None:
    original, _ = models()
    whole = copy.deepcopy(original)
    whole.window = 4
    model = rewriter.optimize(original, "sparse.window(window=4)")
    assert_same(model, whole, inputs())
    assert [s.passes for s in rewriter.inspect(model).rewritten] == [
        ("sparse.window(window=4)",)
    ] * 2


@torch.compiler.disable
def written(model: Any, mask: Tensor, pad: Tensor) -> Tensor:
    """Once asked to, writes to the mask between two graphs."""
    if getattr(model, "changes", False):
        mask[..., 0] = True
    return mask


@torch.compiler.disable
def source_written(model: Any, mask: Tensor, pad: Tensor) -> Tensor:
    if getattr(model, "changes", False):
        pad.zero_()
    return mask


@torch.compiler.disable
def another(model: Any, mask: Tensor, pad: Tensor) -> Tensor:
    return torch.ones_like(mask) if getattr(model, "changes", False) else mask


@pytest.mark.parametrize("change", [written, source_written, another])
def test_a_mask_that_is_no_longer_what_was_made_is_read_as_a_tensor(change: Any) -> None:
    original, model = models(between=change)
    assert_same(model, original, inputs())
    assert formulas(model) == READ
    original.changes = model.changes = True
    for n in (20, 25):
        assert_same(model, original, inputs(n))
    assert any("and was read anew" in note for note in rewriter.inspect(model).notes)
    original.changes = model.changes = False
    assert_same(model, original, inputs())


def in_place(model: Any, mask: Tensor, pad: Tensor) -> Tensor:
    """In the graph of the layer."""
    return mask.logical_and_(mask.roll(1, -1))


def test_a_mask_that_the_graph_itself_writes_to_is_a_tensor() -> None:
    original, model = models(between=in_place)
    for n in (20, 25):
        assert_same(model, original, inputs(n))
    assert READ.isdisjoint(formulas(model))


def test_a_number_that_the_mask_was_made_with_may_change() -> None:
    original, model = models()
    assert_same(model, original, inputs())
    for window in (7, 3, 5):
        original.window = model.window = window
        assert_same(model, original, inputs())


def test_without_counted_writes_it_is_a_tensor() -> None:
    original, model = models()
    args = inputs()
    with torch.inference_mode():
        made = tuple(x.clone() for x in args)
        torch.testing.assert_close(model(*made), original(*made))
    assert all("mask" in formula for formula in formulas(model))


class Halves(nn.Module):
    """A number of heads that comes through a graph break as a number like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(WIDTH, 3 * WIDTH), 4

    def forward(self, x: Tensor) -> Tensor:
        heads, key_heads, x = self.heads, self.heads, x * 1.0
        torch._dynamo.graph_break()
        q, k, v = self.qkv(x).split(WIDTH, 2)
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (key_heads, -1)).transpose(1, 2) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_number_of_heads_that_crosses_a_break_becomes_a_constant() -> None:
    original = Halves().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for heads in (4, 8, 2, 4):
        original.heads = model.heads = heads
        x = inputs()[0]
        with torch.no_grad():
            torch.testing.assert_close(model(x), original(x))
    sites = rewriter.inspect(model).rewritten
    assert {s.site.heads for s in sites} == {2, 4, 8}


def test_nothing_is_kept_of_a_mask_that_is_gone() -> None:
    from rewriter.optimize import _STATES

    original, model = models()
    assert_same(model, original, inputs())
    assert not len(_STATES[model].handed.made)
