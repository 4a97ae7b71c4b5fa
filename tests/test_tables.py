"""Masks that a model keeps as buffers are read as formulas, and looked at again in each call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from sympy import Integer
from torch import Tensor, nn

import rewriter
from rewriter.tables import TakenForGranted, band_of

FUSE = "fuse(from_scores=0)"
INF = float("inf")


def triangle(rows: int, columns: int, start: int = 0) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(start)


BANDS = {
    "causal": triangle(6, 6),
    "strictly above": triangle(6, 6).logical_not(),
    "wide": triangle(4, 9, 5),
    "tall": triangle(9, 4, -3),
    "window": triangle(7, 7) ^ triangle(7, 7, -3),
    "all but a band": ~(triangle(7, 7, 1) ^ triangle(7, 7, -2)),
    "bytes": triangle(5, 5).to(torch.uint8),
    "added": torch.full((6, 6), -INF).triu(1),
    "added, finite": torch.full((6, 6), torch.finfo(torch.float32).min).triu(1),
    "half": torch.full((6, 6), -1e4, dtype=torch.bfloat16).triu(1),
    "with more dimensions": triangle(6, 8).view(1, 6, 1, 8),
    "three numbers": torch.full((5, 5), 2.0).tril() + torch.full((5, 5), 0.5).tril(-2),
    "two columns": triangle(2, 2),
}

NO_BANDS = {
    "one value": torch.zeros(5, 5),
    "positions": torch.arange(25).view(5, 5),
    "blocks": torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)),
    "distances": (torch.arange(5)[:, None] - torch.arange(5)).float(),
    "random": torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5,
    "one wrong": triangle(6, 6).index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(False)),
    "not a number": torch.full((5, 5), float("nan")).triu(1),
    "a row": torch.arange(5)[None] < 3,
    "three dimensions": triangle(5, 5).expand(2, 5, 5),
    "complex": triangle(5, 5).to(torch.complex64),
    "without values": triangle(5, 5).to("meta"),
}


@pytest.mark.parametrize("name", BANDS)
def test_the_formula_of_a_band_gives_every_element(name: str) -> None:
    tensor = BANDS[name]
    band = band_of(tensor)
    assert band is not None
    for place in torch.ones(tensor.shape).nonzero().tolist():
        value = band.at([Integer(i) for i in place]).doit()
        expected = tensor[tuple(place)].item()
        if tensor.dtype == torch.bool:
            assert value == (sympy.true if expected else sympy.false)
        else:
            assert float(value) == expected


@pytest.mark.parametrize("name", NO_BANDS)
def test_what_is_no_band_stays_a_tensor(name: str) -> None:
    assert band_of(NO_BANDS[name]) is None


def test_a_tensor_whose_writes_torch_does_not_count_is_not_read() -> None:
    with torch.inference_mode():
        tensor = triangle(5, 5)
    assert band_of(tensor) is None


def test_what_was_taken_for_granted_is_looked_at_when_it_changes() -> None:
    mask = triangle(5, 5)
    granted = TakenForGranted({1: mask})
    assert granted.changed((None, mask)) is None
    assert granted.changed((None, mask.clone())) is None
    mask.copy_(triangle(5, 5))
    assert granted.changed((None, mask)) is None
    mask[3, 1] = False
    assert granted.changed((None, mask)) == 1
    assert granted.changed((None, triangle(5, 5, 1))) == 1


class Layer(nn.Module):
    """Attention as it is written by hand: a mask made once, of which a corner is read."""

    def __init__(self, mask: Tensor, hidden: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("mask", mask)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).split(32, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        scores = scores.masked_fill(self.hidden(self.mask[..., :n, :n]), -INF)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def layer(mask: Tensor | None = None) -> Layer:
    mask = triangle(64, 64).view(1, 1, 64, 64) if mask is None else mask
    torch.manual_seed(0)
    return Layer(mask, lambda m: m == 0).eval()


def formulas(model: nn.Module) -> list[str]:
    return [str(s.site.spec) for s in rewriter.inspect(model).sites]


def tokens(n: int = 20) -> Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n))


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("mask", "read"),
    [
        (triangle(64, 64), "k ≤ q"),
        (triangle(64, 64).float().view(1, 1, 64, 64), "k ≤ q"),
        (triangle(64, 64) ^ triangle(64, 64, -5), "k ≤ q ∧ q - k < 5"),
    ],
    ids=["bool", "float", "window"],
)
def test_a_buffer_is_read_as_a_mask_of_positions(mask: Tensor, read: str) -> None:
    original = layer(mask)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    for n in (20, 33):
        torch.testing.assert_close(run(model, tokens(n)), run(original, tokens(n)))
    assert formulas(model) == [f"softmax( s | {read} ) · v, s = 0.353553·q·k"]
    assert not rewriter.inspect(model).sites[0].site.spec.opaque_reads()


def test_a_mask_held_as_a_plain_attribute_is_read_too() -> None:
    original = layer()
    mask = original.mask
    del original.mask
    original.mask = mask.clone()
    assert not dict(original.named_buffers())
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    torch.testing.assert_close(run(model, tokens()), run(original, tokens()))
    assert "k ≤ q" in formulas(model)[0]


def overwritten(model: Any) -> None:
    model.mask[..., 0] = True
    model.mask[..., 5, 2:4] = False


def replaced(model: Any) -> None:
    model.mask = triangle(64, 64, 3).view(1, 1, 64, 64)


def loaded(model: Any) -> None:
    state = model.state_dict()
    model.load_state_dict({**state, "mask": triangle(64, 64, -1).view(1, 1, 64, 64) | True})


@pytest.mark.parametrize("change", [overwritten, replaced, loaded])
@pytest.mark.parametrize("request_", [FUSE, "sparse.window(window=4)"])
def test_a_buffer_that_changes_is_read_anew(change: Callable[[Any], None], request_: str) -> None:
    original = layer()
    model = rewriter.optimize(copy.deepcopy(original), request_)
    before = run(model, tokens())
    change(original)
    change(model)
    after = run(model, tokens())
    expected = original if request_ == FUSE else rewriter.optimize(original, request_)
    torch.testing.assert_close(after, run(expected, tokens()))
    assert not torch.allclose(before, after)
    assert len(formulas(model)) == 1
    assert any("buffer mask changed" in note for note in rewriter.inspect(model).notes)
    torch.testing.assert_close(run(model, tokens()), after)


def test_a_buffer_that_is_loaded_with_the_same_values_changes_nothing() -> None:
    model = rewriter.optimize(layer(), FUSE)
    before = run(model, tokens())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(run(model, tokens()), before)
    assert not rewriter.inspect(model).notes


def test_a_buffer_that_the_model_writes_is_a_tensor() -> None:
    class Writes(Layer):
        def forward(self, x: Tensor) -> Tensor:
            self.mask[..., 0, 5] = True
            return super().forward(x)

    torch.manual_seed(0)
    original = Writes(triangle(64, 64), lambda m: m == 0).eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    torch.testing.assert_close(run(model, tokens()), run(original, tokens()))
    assert "k ≤ q" not in formulas(model)[0]
