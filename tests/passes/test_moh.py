"""heads.moh: gates against a slow loop, the closed cases of the card, gradients, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.linear import LinearSpec
from rewriter.passes.moh import MixtureOfHeads, balance_loss, linear_gate, norm_gate, top
from rewriter.reference import reference
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Source

SITE = Site("layers.0.attn", 0, heads=8, kv_heads=8, head_dim=6, value_dim=6, input_dim=10)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q)


def site(heads: int) -> Site:
    return replace(SITE, heads=heads, kv_heads=heads)


def source_of(spec: Spec) -> Source:
    source = spec.tensors[-1].source
    assert source is not None
    return source


def drawn(source: Source, *, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [scale * torch.randn(p.shape, dtype=torch.float64) for p in source.parameters]


def gates(action: MixtureOfHeads, at: Site, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    source = source_of(action.rewrite(at, CAUSAL))
    return source.compute(x, *weights, **dict(source.options))


def slow(
    x: Tensor, weights: Sequence[Tensor], shared: Sequence[int], heads: int, routed: int
) -> Tensor:
    """The gates of one layer as the released code has them, one number at a time."""
    others = [h for h in range(heads) if h not in shared]
    left = list(weights)
    w_r = left.pop(0) if routed else None
    w_s = left.pop(0) if len(shared) > 1 else None
    w_h = left.pop(0) if routed and shared else None

    def softmax(w: Tensor, row: Tensor) -> list[float]:
        e = [math.exp(sum(float(a * c) for a, c in zip(line, row, strict=True))) for line in w]
        return [number / sum(e) for number in e]

    out = torch.zeros(x.shape[0], heads, x.shape[1], dtype=torch.float64)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            a1, a2 = (1.0, 1.0) if w_h is None else [2 * a for a in softmax(w_h, x[b, n])]
            g_s = [1.0] * len(shared)
            if w_s is not None:
                g_s = [len(shared) * g for g in softmax(w_s, x[b, n])]
            for h, g in zip(shared, g_s, strict=True):
                out[b, h, n] = a1 * g
            if w_r is not None:
                r = softmax(w_r, x[b, n])
                best = sorted(range(len(r)), key=lambda e: (-r[e], e))[:routed]
                total = sum(r[e] for e in best)
                for e in best:
                    out[b, others[e], n] = a2 * routed * r[e] / total
    return out


# --- the linear router ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "shared", "routed"),
    [(8, 4, 2), (8, 1, 3), (8, 0, 5), (8, 8, 0), (6, 2, 4), (3, 2, 1), (2, 1, 1)],
)
def test_linear_gates_are_those_of_a_slow_loop(heads: int, shared: int, routed: int) -> None:
    action, at = MixtureOfHeads(shared=shared, routed=routed), site(heads)
    weights = drawn(source_of(action.rewrite(at, CAUSAL)))
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    want = slow(x, weights, range(shared), heads, routed)
    torch.testing.assert_close(gates(action, at, x, weights), want, rtol=1e-12, atol=1e-12)


def test_shared_heads_may_stand_anywhere() -> None:
    action = MixtureOfHeads(shared_heads=(6, -7), routed=2)
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    want = slow(x, weights, (1, 6), 8, 2)
    torch.testing.assert_close(gates(action, SITE, x, weights), want, rtol=1e-12, atol=1e-12)


def test_a_permutation_of_heads_is_a_choice_of_which_are_shared() -> None:
    """Heads 5 and 2 in front, with all their tensors, give the same sum over the heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 7, 6, dtype=torch.float64) for _ in range(3))
    out_weight = torch.randn(8, 6, 10, dtype=torch.float64)
    x = torch.randn(1, 7, 10, dtype=torch.float64)
    order = [2, 5, 0, 1, 3, 4, 6, 7]
    results = []
    for action, rows in (
        (MixtureOfHeads(shared_heads=(2, 5), routed=3), list(range(8))),
        (MixtureOfHeads(shared=2, routed=3), order),
    ):
        spec = action.rewrite(SITE, CAUSAL)
        gate = gates(action, SITE, x, drawn(source_of(spec), seed=3))
        out = reference(spec, q[:, rows], k[:, rows], v[:, rows], [gate])
        results.append(torch.einsum("bhld,hdc->blc", out, out_weight[rows]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("router", ["linear", "norm"])
def test_identity_gates_are_exactly_one(heads: int, router: str) -> None:
    spec = MixtureOfHeads(active=1.0, router=router).rewrite(site(heads), CAUSAL)
    source = source_of(spec)
    assert spec.active is None
    x = torch.randn(2, 5, 10) if router == "linear" else torch.randn(2, heads, 5, 6)
    zeros = [torch.zeros(p.shape) for p in source.parameters]
    assert all(p.initial == 0.0 and p.trained for p in source.parameters)
    gate = source.compute(x, *zeros, **dict(source.options))
    assert torch.equal(gate, torch.ones(2, heads, 5))


def test_all_heads_shared_is_the_identity_too() -> None:
    action = MixtureOfHeads(shared=8, routed=0)
    source = source_of(action.rewrite(SITE, CAUSAL))
    assert [p.shape for p in source.parameters] == [(8, 10)]
    assert source.loss is None
    gate = gates(action, SITE, torch.randn(1, 3, 10), [torch.zeros(8, 10)])
    assert torch.equal(gate, torch.ones(1, 8, 3))


def test_two_heads_share_one_softmax_of_two() -> None:
    action, at = MixtureOfHeads(shared=1, routed=1), site(2)
    source = source_of(action.rewrite(at, CAUSAL))
    assert [(p.name, p.shape) for p in source.parameters] == [
        ("routed", (1, 10)),
        ("stages", (2, 10)),
    ]
    weights, x = drawn(source), torch.randn(1, 4, 10, dtype=torch.float64)
    share = torch.softmax(x @ weights[1].mT, dim=-1)
    torch.testing.assert_close(gates(action, at, x, weights), 2 * share.mT)


def test_equal_logits_choose_the_lowest_heads_with_gates_of_one() -> None:
    action = MixtureOfHeads(shared=3, routed=2)
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    gate = gates(action, SITE, torch.zeros(1, 4, 10, dtype=torch.float64), weights)
    assert gate[0].mT.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_exactly_so_many_routed_gates_are_on_and_gates_have_the_sum_of_the_law(shared: int) -> None:
    routed = 3
    action = MixtureOfHeads(shared=shared, routed=routed)
    spec = action.rewrite(SITE, CAUSAL)
    assert spec.active == shared + routed
    weights = drawn(source_of(spec))
    x = torch.randn(3, 17, 10, dtype=torch.float64)
    gate = gates(action, SITE, x, weights)
    assert ((gate[:, shared:] != 0).sum(1) == routed).all()
    a1, a2 = torch.softmax(x @ weights[-1].mT, -1).unbind(-1) if shared else (0.5, 0.5)
    want = 2 * (a1 * shared + a2 * routed)
    torch.testing.assert_close(gate.sum(1), torch.as_tensor(want).expand(3, 17).double())


def test_the_paper_prints_gates_that_are_not_renormalised() -> None:
    action = MixtureOfHeads(shared=2, routed=2, mode="paper")
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    x = torch.randn(1, 6, 10, dtype=torch.float64)
    w_r, w_s, w_h = weights
    a = torch.softmax(x @ w_h.mT, -1)
    r = torch.softmax(x @ w_r.mT, -1)
    r = r * (r >= r.topk(2).values[..., -1:])
    want = torch.cat([a[..., :1] * torch.softmax(x @ w_s.mT, -1), a[..., 1:] * r], -1).mT
    torch.testing.assert_close(gates(action, SITE, x, weights), want)


def test_a_gate_depends_on_its_own_token_alone() -> None:
    action = MixtureOfHeads()
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    x, order = torch.randn(2, 9, 10, dtype=torch.float64), torch.randperm(9)
    gate = gates(action, SITE, x, weights)
    torch.testing.assert_close(gates(action, SITE, x[:, order], weights), gate[..., order])
    torch.testing.assert_close(gates(action, SITE, x[1:], weights), gate[1:])


def test_logits_of_half_inputs_are_float32() -> None:
    action = MixtureOfHeads()
    weights = [w.float() for w in drawn(source_of(action.rewrite(SITE, CAUSAL)))]
    x = torch.randn(1, 9, 10).bfloat16()
    gate = gates(action, SITE, x, [w.bfloat16() for w in weights])
    assert gate.dtype == torch.float32
    assert torch.equal(
        gate, gates(action, SITE, x.float(), [w.bfloat16().float() for w in weights])
    )


def test_gradient_of_the_router_is_that_of_finite_differences() -> None:
    action = MixtureOfHeads(shared=3, routed=2)
    weights = [w.requires_grad_() for w in drawn(source_of(action.rewrite(SITE, CAUSAL)))]
    x = torch.randn(2, 4, 10, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *w: gates(action, SITE, x, w), weights)


# --- the load balance -----------------------------------------------------------------------------


def balance(action: MixtureOfHeads, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    source = source_of(action.rewrite(SITE, CAUSAL))
    assert source.loss is balance_loss
    return source.loss(x, *weights, **dict(source.options))


@pytest.mark.parametrize(("mode", "factor"), [("released", 5), ("paper", 1)])
def test_the_loss_is_that_of_a_slow_loop(mode: str, factor: int) -> None:
    action = MixtureOfHeads(shared=3, routed=2, mode=mode)
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    p, f = [0.0] * 5, [0.0] * 5
    for row in x.reshape(-1, 10):
        r = torch.softmax(weights[0] @ row, 0)
        for e in range(5):
            p[e] += float(r[e]) / 14
            f[e] += float(e in r.topk(2).indices) / 14
    want = 0.01 * factor * sum(a * c for a, c in zip(p, f, strict=True))
    assert float(balance(action, x, weights)) == pytest.approx(want, rel=1e-12)


def test_perfect_balance_costs_as_much_as_heads_are_picked() -> None:
    """Each of five inputs prefers another pair of heads, and all five share the probability."""
    action = MixtureOfHeads(shared=3, routed=2, balance=1.0)
    weights = drawn(source_of(action.rewrite(SITE, CAUSAL)))
    router = torch.zeros(5, 10, dtype=torch.float64)
    router[:, :5] = torch.eye(5)
    x = torch.zeros(1, 5, 10, dtype=torch.float64)
    for n in range(5):
        x[0, n, [n, (n + 1) % 5]] = 1.0
    assert float(balance(action, x, [router, *weights[1:]])) == pytest.approx(2.0)


def test_how_often_a_head_is_picked_has_no_gradient() -> None:
    action = MixtureOfHeads(shared=3, routed=2)
    weights = [w.requires_grad_() for w in drawn(source_of(action.rewrite(SITE, CAUSAL)))]
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    balance(action, x, weights).backward()
    assert weights[0].grad is not None
    assert weights[1].grad is None
    assert torch.autograd.gradcheck(lambda w: balance(action, x, [w, *weights[1:]]), weights[0])


def test_a_balance_of_zero_has_no_loss() -> None:
    assert source_of(MixtureOfHeads(balance=0.0).rewrite(SITE, CAUSAL)).loss is None
    assert source_of(MixtureOfHeads(router="norm").rewrite(SITE, CAUSAL)).loss is None


# --- the router without parameters ----------------------------------------------------------------

NORM = MixtureOfHeads(shared=4, routed=2, router="norm")


def norm_gates(q: Tensor, action: MixtureOfHeads = NORM, at: Site = SITE) -> Tensor:
    source = source_of(action.rewrite(at, CAUSAL))
    assert source.compute is norm_gate
    assert source.taps == ("q",)
    assert source.parameters == ()
    return source.compute(q, **dict(source.options))


def test_the_heads_with_the_largest_queries_are_on() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 8, 11, 6, dtype=torch.float64)
    gate = norm_gates(q)
    for b in range(2):
        for n in range(11):
            norms = [math.sqrt(float((q[b, h, n] ** 2).sum())) for h in range(4, 8)]
            best = sorted(range(4), key=lambda e: (-norms[e], e))[:2]
            assert gate[b, :, n].tolist() == [1.0] * 4 + [float(e in best) for e in range(4)]


def test_a_rotation_of_the_queries_changes_no_gate() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, 11, 6, dtype=torch.float64)
    angle = torch.arange(11, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    x, y = q[..., :3], q[..., 3:]
    rotated = torch.cat(
        [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1
    )
    assert torch.equal(norm_gates(q), norm_gates(rotated))


def test_equal_norms_are_no_nan_and_pick_the_lowest_heads() -> None:
    q = torch.ones(1, 8, 3, 6, requires_grad=True)
    gate = norm_gates(q)
    assert gate[0, :, 0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    gate.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_gradient_of_a_gate_goes_straight_to_the_softmax_of_the_norms() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 8, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(norm_gates(q), q, cotangent)
    s = q[:, 4:].norm(dim=-1).mT
    t = s / s.std(-1, keepdim=True)
    (want,) = torch.autograd.grad(torch.softmax(t, -1).mT, q, cotangent[:, 4:])
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert found[:, 4:].any()


def test_without_routed_heads_the_rest_is_pruned() -> None:
    gate = norm_gates(torch.randn(1, 8, 3, 6), MixtureOfHeads(shared=5, routed=0, router="norm"))
    assert gate[0].mT.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 3


def test_one_routed_head_has_no_deviation_to_divide_by() -> None:
    gate = norm_gates(torch.randn(1, 8, 3, 6), MixtureOfHeads(shared=7, routed=1, router="norm"))
    assert torch.equal(gate, torch.ones(1, 8, 3))


# --- the rewrite ----------------------------------------------------------------------------------


def test_output_is_the_gated_sum_of_the_heads() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 8, 5, 6, dtype=torch.float64) for _ in range(3))
    spec = MixtureOfHeads().rewrite(SITE, CAUSAL)
    gate = torch.rand(2, 8, 5, dtype=torch.float64)
    want = reference(CAUSAL, q, k, v) * gate[..., None]
    torch.testing.assert_close(reference(spec, q, k, v, [gate]), want)
    assert spec.tensors[0].name == "gate"


def test_linear_attention_is_gated_as_well() -> None:
    spec = MixtureOfHeads().rewrite(SITE, LinearSpec(position=sym.q))
    assert isinstance(spec, LinearSpec)
    assert spec.active == 6


BASE, SMALL = [5, 5, 23, 5], [5, 5, 22, 5]
"""Layers of each stage of the two classifiers."""


@pytest.mark.parametrize(
    ("layers", "heads", "shared", "routed", "percent"),
    [
        (BASE, [4, 8, 16, 32], [4, 8, 4, 5], [0, 0, 8, 16], 75.0),
        (BASE, [4, 8, 16, 32], [2, 2, 2, 4], [2, 4, 6, 8], 50.0),
        (SMALL, [3, 6, 12, 24], [3, 6, 3, 8], [0, 0, 6, 12], 80.0),
        (SMALL, [3, 6, 12, 24], [3, 6, 3, 4], [0, 0, 6, 12], 75.3),
        ([9, 10, 9], [8, 16, 24], [8, 16, 16], [0, 0, 3], 90.0),
    ],
)
def test_published_schedules_use_the_share_of_heads_that_names_them(
    layers: list[int], heads: list[int], shared: list[int], routed: list[int], percent: float
) -> None:
    on = 0
    for depth, count, hs, k in zip(layers, heads, shared, routed, strict=True):
        spec = MixtureOfHeads(shared=hs, routed=k).rewrite(site(count), CAUSAL)
        on += depth * (spec.active or count)
    of = sum(depth * count for depth, count in zip(layers, heads, strict=True))
    assert round(100 * on / of, 1) == percent


@pytest.mark.parametrize(
    ("action", "heads", "want"),
    [
        (MixtureOfHeads(), 32, (16, 8)),
        (MixtureOfHeads(active=0.5), 8, (2, 2)),
        (MixtureOfHeads(active=0.25), 8, (1, 1)),
        (MixtureOfHeads(active=1.0), 7, (3, 4)),
        (MixtureOfHeads(active=0.75, shared=2), 8, (2, 4)),
        (MixtureOfHeads(active=0.75, routed=1), 8, (5, 1)),
        (MixtureOfHeads(shared=0, routed=3), 8, (0, 3)),
    ],
)
def test_shares_of_heads_are_split_in_shared_and_picked_ones(
    action: MixtureOfHeads, heads: int, want: tuple[int, int]
) -> None:
    shared, others, routed = action.split(site(heads))
    assert (len(shared), routed) == want
    assert sorted((*shared, *others)) == list(range(heads))


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert top(scores, 2).tolist() == [0, 1, 1, 0, 0]
    assert top(torch.zeros(5), 3).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("action", "at", "reason"),
    [
        (MixtureOfHeads(shared=6, routed=3), SITE, "3 heads are to be picked from the 2 of 8"),
        (MixtureOfHeads(shared=9, routed=0), SITE, "9 heads are to be shared, and this site has 8"),
        (MixtureOfHeads(shared_heads=(8,)), SITE, "head 8 does not exist"),
        (MixtureOfHeads(shared_heads=(1, -7)), SITE, "names a head twice"),
        (MixtureOfHeads(), replace(SITE, heads=0), "how many heads this site has is not known"),
        (MixtureOfHeads(), replace(SITE, input_dim=0), "was not found in the graph"),
        (MixtureOfHeads(shared=4, routed=0), SITE, "the linear router picks at least one head"),
        (MixtureOfHeads(shared=0, routed=0, router="norm"), SITE, "no head is shared and none"),
    ],
)
def test_it_declines_heads_that_do_not_fit(action: MixtureOfHeads, at: Site, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        action.rewrite(at, CAUSAL)


def test_the_router_of_norms_needs_no_input() -> None:
    assert NORM.rewrite(replace(SITE, input_dim=0), CAUSAL).active == 6


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(PassError, match="shared=3, and shared_heads names 2 heads"):
        MixtureOfHeads(shared=3, shared_heads=(0, 1))
    with pytest.raises(PassError, match="it has to be above 0"):
        MixtureOfHeads(active=0.0)


def test_a_second_gate_has_another_name_and_keeps_the_smaller_count() -> None:
    spec = MixtureOfHeads(active=0.5).rewrite(SITE, MixtureOfHeads().rewrite(SITE, CAUSAL))
    assert [t.name for t in spec.tensors] == ["gate", "gate_1"]
    assert spec.active == 4
    assert spec.tensors[0].source is not None
    assert spec.tensors[0].source.compute is linear_gate
