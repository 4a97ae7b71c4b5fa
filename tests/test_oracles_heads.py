"""Numbers that the work on heads gives to test by: mixture of heads (MoH, arXiv 2410.11842), and
heads that are pruned, folded, gated or replaced (arXiv 1905.10650, arXiv 2505.06708).

The slow reference computes every head, query by query, in float64, and sums
`y = sum_h g_h O_h W_O^h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from sympy import Float
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels.torch_compact import compact_forward
from rewriter.op import attention
from rewriter.passes.heads import HeadAblate, HeadGate, HeadPatch, HeadScale
from rewriter.passes.moh import MixtureOfHeads
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec

F64 = torch.float64
H, KV, D, C, OUT = 8, 4, 6, 10, 12
SITE = Site("layers.0.attn", 0, heads=H, kv_heads=KV, head_dim=D, value_dim=D, input_dim=C)
CAUSAL = SoftmaxSpec(Float(D**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)
PRECISION = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def operands(n: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Input x `[B, N, C]`, q, k, v, and `W_O [H, D, OUT]`."""
    shapes = [(2, n, C), (2, H, n, D), (2, KV, n, D), (2, KV, n, D), (H, D, OUT)]
    return [torch.randn(s, dtype=F64).to(dtype) for s in shapes]


def projected(heads: Tensor, weight: Tensor) -> Tensor:
    """`sum_h O_h W_O^h`, `[B, N, OUT]`."""
    return torch.einsum("bhnd,hdc->bnc", heads, weight)


def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads O `[B, H, N, D]` one query at a time; heads h and h + 1 share keys `h // 2`."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(H):
            for i in range(q.shape[2]):
                weights = (k[b, h // 2, : i + 1] @ q[b, h, i] * D**-0.5).softmax(0)
                out[b, h, i] = weights @ v[b, h // 2, : i + 1]
    return out


def close(found: Tensor, want: Tensor, allowed: float) -> None:
    """Relative to the largest |y|."""
    assert float((found.double() - want).abs().amax() / want.abs().amax()) <= allowed


def gate_of(spec: Spec, tap: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
    """What the program of the last tensor of the spec gives."""
    source = spec.tensors[-1].source
    assert source is not None
    return source.compute(tap, *weights, **dict(source.options))


def by_blocks(spec: Spec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return attention(q, k, v, tensors, [], spec, "torch.blocked")


def packed(spec: Spec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """As torch.compact has it, which refuses inputs as small as these."""
    assert isinstance(spec, SoftmaxSpec)
    return compact_forward(spec, q, k, v, tensors, [])


@pytest.fixture(params=[by_blocks, packed], ids=["dense", "compact"])
def run(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Heads that are off times 0, and left out."""
    return cast(Callable[..., Tensor], request.param)


# --- mixture of heads -----------------------------------------------------------------------------


def two_stage(x: Tensor, w_r: Tensor, w_s: Tensor, w_h: Tensor, routed: int) -> Tensor:
    """The gates of the two-stage linear router `[B, H, N]`, in float64, step by step: softmax, top
    K, renormalised, times K; shared heads times Hs; the two shares times 2."""
    x, w_r, w_s, w_h = (y.double() for y in (x, w_r, w_s, w_h))
    r = (x @ w_r.mT).softmax(-1)
    m = torch.zeros_like(r).scatter_(-1, r.topk(routed).indices, 1.0)
    g_r = r * m / (r * m).sum(-1, keepdim=True) * routed
    g_s = (x @ w_s.mT).softmax(-1) * w_s.shape[0]
    a = (x @ w_h.mT).softmax(-1) * 2
    return torch.cat([a[..., :1] * g_s, a[..., 1:] * g_r], dim=-1).mT


def by_norm(q: Tensor, shared: int, routed: int) -> Tensor:
    """1 for shared heads and for the `routed` others with the largest queries."""
    norms = q.double().square().sum(-1).sqrt()[:, shared:]
    on = torch.zeros_like(norms).scatter_(1, norms.topk(routed, dim=1).indices, 1.0)
    return torch.cat([torch.ones_like(q[:, :shared, :, 0], dtype=F64), on], dim=1)


@pytest.mark.parametrize(("dtype", "allowed"), PRECISION, ids=str)
@pytest.mark.parametrize("router", ["linear", "norm"])
def test_the_output_is_the_sum_of_gated_heads(
    router: str, dtype: torch.dtype, allowed: float, run: Callable[..., Tensor]
) -> None:
    """To 1e-5 in float32 and 2e-2 in bfloat16, relative to the largest |y|; 5 of 8 heads are on."""
    x, q, k, v, w_out = operands(23, dtype)
    spec = MixtureOfHeads(shared=3, routed=2, router=router).rewrite(SITE, CAUSAL)
    routers = [torch.randn(s).to(dtype) for s in ((5, C), (3, C), (2, C))]
    if router == "linear":
        gate, want = gate_of(spec, x, routers), two_stage(x, *routers, 2)
    else:
        gate, want = gate_of(spec, q), by_norm(q, 3, 2)
    out = run(spec, q, k, v, [gate])
    assert not out[want == 0].any()
    y = projected(slow(q, k, v) * want[..., None], w_out.double())
    close(projected(out.double(), w_out.double()), y, allowed)


def test_the_gradient_of_the_routed_router_is_that_of_finite_differences() -> None:
    """Through gates, heads and output projection, away from ties; differences of the form that
    leaves heads out."""
    x, q, k, v, w_out = operands(5)
    spec = MixtureOfHeads(shared=3, routed=2).rewrite(SITE, CAUSAL)
    w_r, *others = (torch.randn(s, dtype=F64) for s in ((5, C), (3, C), (2, C)))
    logits = (x @ w_r.mT).sort(dim=-1, descending=True).values
    assert (logits[..., 1] - logits[..., 2]).min() > 1e-3
    cotangent = torch.randn(2, 5, OUT, dtype=F64)

    def loss(w: Tensor, run: Callable[..., Tensor]) -> Tensor:
        gate = gate_of(spec, x, (w, *others))
        return (projected(run(spec, q, k, v, [gate]), w_out) * cotangent).sum()

    (found,) = torch.autograd.grad(loss(w_r.requires_grad_(), by_blocks), w_r)
    with torch.no_grad():
        for place in [(0, 0), (1, 3), (2, 9), (4, 5)]:
            step = torch.zeros_like(w_r)
            step[place] = 1e-5
            slope = (loss(w_r + step, packed) - loss(w_r - step, packed)) / 2e-5
            assert float(found[place]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("router", "weights"), [("linear", (8, 2)), ("norm", ())])
def test_the_identity_settings_are_all_heads_as_they_were(
    router: str, weights: tuple[int, ...]
) -> None:
    """K = E and routers of zeros: gates of exactly 1, so that the output is the same bit for bit;
    with a router of norms nothing is trained."""
    x, q, k, v, _ = operands(23, torch.float32)
    spec = MixtureOfHeads(shared=0, routed=H, router=router).rewrite(SITE, CAUSAL)
    routers = [torch.zeros(H, C)] if weights else []
    gate = gate_of(spec, x if weights else q, routers)
    plain = attention(q, k, v, [], [], CAUSAL, "torch.blocked")
    assert torch.equal(attention(q, k, v, [gate], [], spec, "torch.blocked"), plain)


# --- heads that are edited ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "allowed"), PRECISION, ids=str)
def test_a_masked_head_is_a_pruned_one(
    dtype: torch.dtype, allowed: float, run: Callable[..., Tensor]
) -> None:
    """Rows of W_O of heads 1, 4 and 6 are deleted, with their queries; keys and values of head 4
    stay, since head 5 uses them."""
    _, q, k, v, w_out = operands(23, dtype)
    kept = [0, 2, 3, 5, 7]
    spec = HeadAblate(heads=(1, 4, 6)).rewrite(SITE, CAUSAL)
    out = run(spec, q, k, v, [])
    pruned = projected(slow(q, k, v)[:, kept], w_out.double()[kept])
    close(projected(out.double(), w_out.double()), pruned, allowed)


def test_a_static_scale_folds_into_the_output_projection(run: Callable[..., Tensor]) -> None:
    """The epilogue `c_r O_r` against W_O with its rows times c_r; the bias of W_O is not scaled."""
    _, q, k, v, w_out = operands(23)
    bias, factors = torch.randn(OUT, dtype=F64), torch.ones(H, 1, 1, dtype=F64)
    factors[[0, 5]] = 0.25
    spec = HeadScale(heads=(0, 5), by=0.25).rewrite(SITE, CAUSAL)
    plain = attention(q, k, v, [], [], CAUSAL, "torch.blocked")
    folded = projected(plain, w_out * factors) + bias
    epilogue = projected(run(spec, q, k, v, []), w_out) + bias
    torch.testing.assert_close(epilogue, folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "allowed"), PRECISION, ids=str)
def test_a_gate_is_one_number_a_head_and_token(dtype: torch.dtype, allowed: float) -> None:
    """`O_r <- O_r 2 sigmoid(x W_r + b_r)`; with W = 0 and b = 0 the factor is exactly 1."""
    x, q, k, v, w_out = operands(23, dtype)
    spec = HeadGate().rewrite(SITE, CAUSAL)
    weight, bias = torch.randn(H, C).to(dtype), torch.randn(H).to(dtype)
    factor = 2 / (1 + (-(x.double() @ weight.double().mT + bias.double())).exp())
    out = attention(q, k, v, [gate_of(spec, x, (weight, bias))], [], spec, "torch")
    y = projected(slow(q, k, v) * factor.mT[..., None], w_out.double())
    close(projected(out.double(), w_out.double()), y, allowed)
    new = gate_of(spec, x, (torch.zeros_like(weight), torch.zeros_like(bias)))
    assert torch.equal(new, torch.ones(2, H, 23))


def test_patched_heads_take_part_in_the_sum_as_they_are_given() -> None:
    """Heads 2 and 7 of another run; the other rows of W_O see this one."""
    _, q, k, v, w_out = operands(23)
    other = slow(*operands(23)[1:4])
    spec = HeadPatch(heads=(2, 7)).rewrite(SITE, CAUSAL)
    want = slow(q, k, v)
    want[:, [2, 7]] = other[:, [2, 7]]
    out = attention(q, k, v, [other], [], spec, "torch")
    close(projected(out, w_out), projected(want, w_out), 1e-12)


def editing(kind: str) -> tuple[Any, tuple[int, ...]]:
    """A pass, and the shape behind `[B, ...]` of what it reads of each token, if anything."""
    table: dict[str, tuple[Any, tuple[int, ...]]] = {
        "gate": (HeadGate(), (H,)),
        "ablate": (HeadAblate(heads=(1, 4)), ()),
        "patch": (HeadPatch(heads=(2,)), (H, D)),
        "moh": (MixtureOfHeads(shared=3, routed=2), (H,)),
    }
    return table[kind]


@pytest.mark.parametrize("kind", ["gate", "ablate", "patch", "moh"])
def test_a_step_of_decoding_is_the_row_of_the_prefill(kind: str) -> None:
    """The gate, or the patch, of the new token alone; keys of all heads stay in the cache."""
    _, q, k, v, _ = operands(12)
    action, shape = editing(kind)
    spec = action.rewrite(SITE, CAUSAL)
    of_token = torch.rand(2, H, 12, *shape[1:], dtype=F64) if shape else None
    if kind == "moh" and of_token is not None:
        of_token[:, 5:] *= torch.rand(2, 3, 12) < 0.5

    def read(rows: slice) -> list[Tensor]:
        return [] if of_token is None else [of_token[:, :, rows]]

    whole = attention(q, k, v, read(slice(None)), [], spec, "torch")
    for n in range(9, 12):
        cached = (x[:, :, : n + 1] for x in (k, v))
        row = slice(n, n + 1)
        step = attention(q[:, :, row], *cached, read(row), [], spec, "torch")
        torch.testing.assert_close(step, whole[:, :, row], rtol=1e-12, atol=1e-12)
