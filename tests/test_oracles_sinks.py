"""Numbers that the work on attention sinks gives to test by: learned sink logits and the grouped
edit of weights, and VAR (arXiv 2503.03321) with its rules applied one after the other, slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
from sympy import Float, Integer
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels import torch_routed
from rewriter.op import attention
from rewriter.passes.sinks import LearnedSinks, RedirectSinks, RemoveSinks
from rewriter.passes.sinks_visual import RedistributeVisual
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.stages import Route

F64 = torch.float64
SITE = Site(
    "layers.3.attn", 3, heads=4, kv_heads=2, head_dim=8, value_dim=8, residual_dim=16, layers=8
)
CAUSAL = SoftmaxSpec(Float(8**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)
SINK = LearnedSinks().rewrite(SITE, CAUSAL)


def run(spec: SoftmaxSpec, *x: Tensor, tensors: Sequence[Tensor] = ()) -> Tensor:
    return attention(*x, tensors, [], spec, "torch")


def qkv(length: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.randn(2, n, length, 8, dtype=F64).to(dtype) for n in (4, 2, 2)]


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled and causal, `[B, 4, L, M]`, in float64."""
    found = q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return found.masked_fill(~seen, -torch.inf)


# --- learned sinks --------------------------------------------------------------------------------


def test_two_scores_of_0_beside_a_logit_of_ln_2() -> None:
    """p = [.25, .25], p_sink = .5, and half the mean of the values: `o sigmoid(ln 2 - ln 2)`."""
    spec = LearnedSinks(initial=math.log(2)).rewrite(replace(SITE, heads=1), SoftmaxSpec())
    zero, v = (
        torch.zeros(1, 1, 2, 1, dtype=F64),
        torch.tensor([[[[1.0, 0.0], [0.0, 3.0]]]]).double(),
    )
    out = run(spec, zero[:, :, :1], zero, v, tensors=[torch.tensor([math.log(2)], dtype=F64)])
    torch.testing.assert_close(out.flatten(), torch.tensor([0.25, 0.75], dtype=F64))
    out = run(spec, zero[:, :, :1], zero, v, tensors=[torch.zeros(1, dtype=F64)])
    torch.testing.assert_close(out.flatten(), torch.tensor([1 / 3, 1.0], dtype=F64))


def concatenated(s: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Scores with a column of sinks, minus the row's largest, softmax, the column cut off."""
    column = sigma.view(1, 4, 1, 1).expand(*s.shape[:3], 1)
    wide = torch.cat([s, column], dim=-1)
    wide = wide - wide.amax(-1, keepdim=True)
    return wide.softmax(-1)[..., :-1] @ v


def as_a_gate(s: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The logsumexp minus the sink, sigmoid, times the output."""
    share = (s.logsumexp(-1, keepdim=True) - sigma.view(4, 1, 1)).sigmoid()
    return s.softmax(-1) @ v * share


@pytest.mark.parametrize("encoding", [concatenated, as_a_gate])
def test_the_encodings_of_released_models_agree_to_1e_12(encoding: Callable[..., Tensor]) -> None:
    """With keys before the queries, as a step of decoding has them."""
    q, k, v = qkv(33)
    q, sigma = q[:, :, 20:], torch.randn(4, dtype=F64)
    want = encoding(scores(q, k), v.repeat_interleave(2, 1), sigma)
    found = run(SINK, q, k, v, tensors=[sigma])
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_parts_of_the_keys_joined_by_their_sums_count_the_sink_once(splits: int) -> None:
    """All blocks are chosen; each is a softmax of its own before they are joined."""
    q, k, v = qkv(42)
    sigma = 3 + torch.randn(4, dtype=F64)
    route = Route("query", topk=splits, block=42 // splits)
    found = torch_routed.forward(replace(SINK, route=route), q, k, v, [sigma], [])
    want = concatenated(scores(q, k), v.repeat_interleave(2, 1), sigma)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_near_the_eager_form_and_nearer_to_a_softmax_in_float32() -> None:
    """2e-2 against eager models, which take the softmax in bfloat16; 2e-3 against float32: beyond
    the rounding of the output, which alone is up to 2^-8 of a number, and as a ratio of root mean
    squares with it."""
    q, k, v = qkv(200, torch.bfloat16)
    sigma = torch.randn(4)
    found = run(SINK, q, k, v, tensors=[sigma]).float()
    s, values = scores(q, k), v.repeat_interleave(2, 1)
    wide = concatenated(s.float(), values.float(), sigma)
    assert ((found - wide).abs() - 2**-8 * wide.abs()).amax() <= 2e-3
    assert (found - wide).square().mean().sqrt() / wide.square().mean().sqrt() <= 2e-3
    eager = concatenated(s.bfloat16(), values, sigma.bfloat16()).float()
    torch.testing.assert_close(found, eager, rtol=2e-2, atol=2e-2)


def test_a_window_of_128_with_a_sink_ends_at_the_query() -> None:
    """Row 127 sees keys 0 to 127, row 128 keys 1 to 128."""
    spec = replace(SINK, mask=SINK.mask & (sym.q - sym.k < 128))
    q, k, _ = qkv(129)
    unit = torch.eye(129, dtype=F64).expand(2, 2, 129, 129)
    seen = run(spec, q, k, unit, tensors=[torch.zeros(4, dtype=F64)])[0, 0] > 0
    assert seen[127].nonzero().flatten().tolist() == list(range(128))
    assert seen[128].nonzero().flatten().tolist() == list(range(1, 129))


def test_the_limits_of_a_sink_logit() -> None:
    """Minus infinity: plain softmax, bit for bit; plus infinity: 0; a row that sees no key: 0."""
    x = qkv(33, torch.float32)
    plain = attention(*x, [], [], CAUSAL, "torch.blocked")
    for logit, want in ((-math.inf, plain), (math.inf, torch.zeros_like(plain))):
        sigma = torch.full((4,), logit)
        assert torch.equal(attention(*x, [sigma], [], SINK, "torch.blocked"), want)
    hidden = replace(SINK, mask=SINK.mask & (sym.k >= 5))
    assert not run(hidden, *x, tensors=[torch.zeros(4)])[:, :, :5].any()


@pytest.mark.parametrize("action", [RemoveSinks, RedirectSinks])
@pytest.mark.parametrize("sink", [None, Float(0.5)], ids=["plain", "learned sink"])
def test_rows_of_the_table_pass_gradcheck_as_the_passes_write_them(
    action: Callable[..., Any], sink: Any
) -> None:
    """`remove` and `redirect`, beside the virtual key of a sink and without."""
    spec = action(first=2).rewrite(SITE, replace(CAUSAL, sink=sink))
    x = [y[:1, :, :7].clone().requires_grad_() for y in qkv(7)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(spec, q, k, v)

    assert torch.autograd.gradcheck(f, x, fast_mode=True)


# --- VAR ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The four steps for one row of weights, in float64."""

    mode: str
    min_mass: float = 0.2
    rho: float = 0.5
    p: float = 0.6

    def edited(self, weights: list[float], group: list[int]) -> tuple[list[float], bool, float]:
        """The weights after the edit, whether the row was selected, and how far it was from a
        threshold. Groups: 0 other, 1 text sink, 2 visual sink, 3 other image tokens."""
        mass = [
            math.fsum(w for w, g in zip(weights, group, strict=True) if g == n) for n in range(4)
        ]
        image = mass[2] + mass[3]
        if not image:
            return weights, False, self.min_mass
        if self.mode == "paper":
            distance = mass[3] / image - self.rho
        else:
            distance = self.rho - mass[2] / image
        margin = min(abs(image - self.min_mass), abs(distance))
        if image < self.min_mass or distance < 0:
            return weights, False, margin
        kept = 1 - self.p if self.mode == "paper" else self.p
        moved = (1 - kept) * (mass[1] + mass[2])
        factors = [1.0, kept, kept, 1 + moved / mass[3]]
        return [w * factors[g] for w, g in zip(weights, group, strict=True)], True, margin


GROUPS = torch.tensor(
    [[1, 0, 3, 3, 2, 3, 3, 0, 0, 1, 0, 0, 0, 0], [1, 3, 3, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
)
FIRST_ROWS = torch.tensor([7, 5])


def card(rules: Rules, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int, float]:
    """Weights, the four steps, then `p' V`: the output, rows that were selected, least margin."""
    weights = scores(q, k).softmax(-1)
    count, least = 0, 1.0
    for b in range(2):
        for h in range(4):
            for i in range(int(FIRST_ROWS[b]), q.shape[2]):
                row, selected, margin = rules.edited(weights[b, h, i].tolist(), GROUPS[b].tolist())
                weights[b, h, i] = torch.tensor(row, dtype=F64)
                assert math.fsum(row) == pytest.approx(1.0, abs=1e-12)
                count, least = count + selected, min(least, margin)
    return weights @ v.double().repeat_interleave(2, 1), count, least


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize(
    ("mode", "rho"), [("paper", 0.5), ("paper", 0.8), ("paper", 0.9), ("released", 0.5)]
)
def test_var_is_its_four_steps(mode: str, rho: float, dtype: torch.dtype, allowed: float) -> None:
    """With rho of hallucination, general and vision-centric tasks; margins of 1e-3 and more."""
    options: dict[str, Any] = {} if mode == "released" else {"min_nonsink_ratio": rho}
    spec = RedistributeVisual(dims=(1,), mode=mode, **options).rewrite(SITE, CAUSAL)
    for seed in range(20):  # until no row is near a threshold
        torch.manual_seed(seed)
        q, k, v = qkv(14, dtype)
        want, count, margin = card(Rules(mode, rho=rho), q, k, v)
        if margin >= 1e-3 and 8 <= count <= 56:
            break
    assert margin >= 1e-3
    assert 8 <= count <= 56  # of 64 rows behind the images
    found = run(spec, q, k, v, tensors=[GROUPS, FIRST_ROWS])
    torch.testing.assert_close(found.double(), want, rtol=allowed, atol=allowed)


def test_a_sink_that_keeps_nothing_is_a_hidden_key_whose_weight_goes_to_the_image() -> None:
    """One visual sink, no text sink: its key is masked, and its mass is on the image alone, not on
    all keys."""
    spec = RedistributeVisual(dims=(1,), keep_fraction=0, min_nonsink_ratio=0, min_mass=0).rewrite(
        SITE, CAUSAL
    )
    q, k, v = qkv(9)
    group = torch.tensor([[0, 3, 2, 3, 0, 0, 0, 0, 0]]).expand(2, 9)
    found = run(spec, q, k, v, tensors=[group, torch.tensor([4, 4])])[:, :, 4:]
    p = scores(q, k).softmax(-1)[:, :, 4:]
    image = p[..., 1] + p[..., 3]
    p[..., [1, 3]] *= (1 + p[..., 2] / image)[..., None]
    p[..., 2] = 0
    torch.testing.assert_close(found, p @ v.repeat_interleave(2, 1), rtol=1e-12, atol=1e-12)


def test_its_backward_agrees_with_finite_differences_to_1e_9() -> None:
    """Central differences of fourth order along random directions, with the selection frozen."""
    spec = RedistributeVisual(dims=(1,), min_nonsink_ratio=0.5).rewrite(
        SITE, replace(CAUSAL, score=5 * sympy.tanh(sym.s / 5), sink=Integer(0))
    )
    x = qkv(14)
    cotangent = torch.randn(2, 4, 14, 8, dtype=F64)

    def loss(*y: Tensor) -> Tensor:
        return (run(spec, *y, tensors=[GROUPS, FIRST_ROWS]) * cotangent).sum()

    leaves = [y.clone().requires_grad_() for y in x]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    for place in range(3):
        along = torch.randn_like(x[place])
        along /= along.norm()

        def at(step: float, place: int = place, along: Tensor = along) -> float:
            return float(loss(*(y + step * along if n == place else y for n, y in enumerate(x))))

        e = 2e-3
        slope = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
        assert float((grads[place] * along).sum()) == pytest.approx(slope, rel=1e-9, abs=1e-9)
