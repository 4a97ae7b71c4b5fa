"""Numbers that the papers on linear attention with a fixed decay give to test by: Lightning
Attention-2 (arXiv 2401.04658), and the architecture round it, TNL (arXiv 2405.17381).

In the words of the papers: s is the slope of a head, its decay is `exp(-s)`, S the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import sympy
import torch
from sympy import Float, Symbol
from torch import Tensor
from torch.nn.functional import silu

from rewriter import symbols as sym
from rewriter.evaluate import evaluate
from rewriter.kernels import torch_linear_call
from rewriter.linear import LinearSpec
from rewriter.op import attention
from rewriter.passes.linear import Lightning
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg

F64 = torch.float64
SITE = Site("layers.1.attn", 1, heads=4, kv_heads=4, head_dim=8, value_dim=8, layers=4)
CAUSAL = SoftmaxSpec(Float(8**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)
SEEN = sympy.Ne(sym.Read(Symbol("pad"), sym.b, sym.k), 0)
PADDED = replace(CAUSAL, mask=CAUSAL.mask & SEEN, tensors=(TensorArg("pad", "bool", 2),))


def lightning(s: float) -> LinearSpec:
    """The operator of the paper, with one slope."""
    spec = Lightning(rule="none", map="identity", norm="none").rewrite(SITE, CAUSAL)
    return replace(spec, decay=Float(-s)) if s else spec


def run(spec: LinearSpec, *x: Tensor, tensors: Sequence[Tensor] = ()) -> Tensor:
    return attention(*x, tensors, [], spec, "torch")


def decoded(
    spec: LinearSpec, q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], name: str
) -> Tensor:
    """Calls that end at `ends`; each goes on from the state that the one before left."""
    outs, past, start = [], [k[:, :, :0], v[:, :, :0]], 0
    for end in ends:
        full = [k[:, :, :end].clone(), v[:, :, :end].clone()]
        with torch.no_grad():
            outs.append(
                torch.ops.rewriter.attention.default(
                    q[:, :, start:end],
                    *full,
                    [],
                    [],
                    spec.to_json(),
                    "torch",
                    full,
                    past,
                    name,
                )
            )
        past, start = full, end
    return torch.cat(outs, dim=2)


def distance(n: int) -> Tensor:
    return (torch.arange(n)[:, None] - torch.arange(n)).double()


def parallel(q: Tensor, k: Tensor, v: Tensor, s: Tensor | float) -> Tensor:
    """`((Q K^T) * M) V` with the N x N decay matrix M; s a number or `[H, 1, 1]`."""
    decay = torch.exp(-s * distance(q.shape[2]).clamp_min(0)).tril()
    return (q @ k.mT * decay) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, s: float) -> Tensor:
    """`S_t = exp(-s) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`."""
    state, rows = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        state = math.exp(-s) * state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append(q[:, :, t, None] @ state)
    return torch.cat(rows, dim=2)


def drawn(*shape: int) -> Tensor:
    """Inputs of unit scale."""
    return torch.randn(shape, dtype=F64)


def near(found: Tensor, want: Tensor, tolerance: float) -> None:
    """The largest error, over the largest value."""
    assert float((found.double() - want).abs().amax() / want.abs().amax()) <= tolerance


def rms_ratio(found: Tensor, want: Tensor) -> float:
    error = (found.double() - want).square().mean().sqrt()
    return float(error / want.square().mean().sqrt())


# --- the operator (Lightning Attention-2, test oracle) --------------------------------------------

LENGTHS, BLOCKS = (1, 63, 64, 65, 127, 913, 1213), (16, 32, 64, 128)
SLOPES, DIMS = (0, 0.004, 0.5, 2), (16, 32, 64, 96, 128, 192, 256)


def covering() -> list[tuple[int, int, float, int, int]]:
    """Every length with every block, and each of these with several slopes and head dims D, E."""
    return [
        (n, block, SLOPES[(i + i // 4) % 4], DIMS[i % 7], DIMS[(3 * i + 1) % 7])
        for i, (n, block) in enumerate(product(LENGTHS, BLOCKS))
    ]


def test_the_cases_cover_every_pair_that_the_paper_could_get_wrong() -> None:
    cases = covering()
    assert {(block, s) for _, block, s, _, _ in cases} == set(product(BLOCKS, SLOPES))
    assert {(block, d) for _, block, _, d, _ in cases} == set(product(BLOCKS, DIMS))
    assert sum(d != e for *_, d, e in cases) >= 20


@pytest.mark.parametrize(("n", "block", "s", "dim", "value_dim"), covering())
def test_parallel_recurrent_chunked_and_decoded_forms_are_one(
    n: int, block: int, s: float, dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths, blocks, slopes, D and E of the oracle, in float64 and, to 1e-5, in float32."""
    monkeypatch.setattr(torch_linear_call, "CHUNK", block)
    q, k, v = drawn(1, 1, n, dim), drawn(1, 1, n, dim), drawn(1, 1, n, value_dim)
    want = parallel(q, k, v, s)
    near(recurrent(q, k, v, s), want, 1e-12)
    near(run(lightning(s), q, k, v), want, 1e-12)
    near(run(lightning(s), q.float(), k.float(), v.float()), want, 1e-5)
    ends = sorted({max(1, n - 3), max(1, n - 2), n})
    near(decoded(lightning(s), q, k, v, ends, f"{n} {block}"), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", SLOPES)
def test_half_precision_has_an_error_ratio_of_5e_3(s: float, dtype: torch.dtype) -> None:
    """The root of the mean square of the error over that of the output."""
    x = [drawn(1, 2, 300, 64).to(dtype) for _ in range(3)]
    want = parallel(*(y.double() for y in x), s)
    assert rms_ratio(run(lightning(s), *x), want) <= 5e-3


def test_the_two_limits_of_the_slope() -> None:
    """s = 0 is `tril(Q K^T) V`; with s to infinity a row sees its own key alone."""
    q, k, v = (drawn(1, 2, 65, 8) for _ in range(3))
    near(run(lightning(0), q, k, v), (q @ k.mT).tril() @ v, 1e-12)
    near(run(lightning(800.0), q, k, v), (q * k).sum(-1, keepdim=True) * v, 1e-12)


# --- its backward (Lightning Attention-2, algorithm 2 in the end-of-block convention) -------------


def chunked_backward(
    x: tuple[Tensor, ...], start: Tensor, grad: Tensor, grad_end: Tensor, s: float, m: int
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the initial state, by the equations of the paper.

    Args:
        x: q, k, v `[N, D]`, `[N, D]`, `[N, E]`.
        start: the initial state `[D, E]`.
        grad: of the outputs `[N, E]`.
        grad_end: of the final state `[D, E]`.
        s: the slope.
        m: rows of a chunk.
    """
    cut = [y.split(m) for y in (*x, grad)]
    parts = list(zip(*cut, strict=True))
    state, dq = start, []
    for q, k, v, do in parts:
        r = torch.arange(len(q), dtype=F64)[:, None]
        decay = torch.exp(-s * distance(len(q)).clamp_min(0)).tril()
        dq.append((do @ v.mT * decay) @ k + torch.exp(-s * (r + 1)) * (do @ state.mT))
        state = math.exp(-s * len(q)) * state + (torch.exp(-s * (len(q) - 1 - r)) * k).mT @ v
    ds, dk, dv = grad_end, [], []
    for q, k, v, do in reversed(parts):
        r = torch.arange(len(q), dtype=F64)[:, None]
        decay = torch.exp(-s * distance(len(q)).clamp_min(0)).tril()
        left = torch.exp(-s * (len(q) - 1 - r))
        dk.append((do @ v.mT * decay).mT @ q + left * (v @ ds.mT))
        dv.append((q @ k.mT * decay).mT @ do + left * (k @ ds))
        ds = math.exp(-s * len(q)) * ds + (torch.exp(-s * (r + 1)) * q).mT @ do
    return torch.cat(dq), torch.cat(dk[::-1]), torch.cat(dv[::-1]), ds


@pytest.mark.parametrize("s", SLOPES)
@pytest.mark.parametrize("n", [65, 128])
def test_gradients_of_q_k_v_and_of_the_initial_state_with_one_on_the_final_state(
    n: int, s: float
) -> None:
    """D keys before the sequence make any initial state, D queries behind it read the final one."""
    d = 5
    q, k, v, grad = (drawn(n, d) for _ in range(4))
    start, grad_end = drawn(d, d), drawn(d, d)
    unit, at = torch.eye(d, dtype=F64), torch.arange(d, dtype=F64)[:, None]
    makes, reads = torch.exp(s * (d - 1 - at)) * unit, torch.exp(s * (at + 1)) * unit
    zero = torch.zeros(d, d, dtype=F64)
    leaves = [x.requires_grad_() for x in (q, k, v, start)]
    wide = [torch.cat(x) for x in ((zero, q, reads), (makes, k, zero), (start, v, zero))]
    out = run(lightning(s), *(x[None, None] for x in wide))[0, 0]
    found = torch.autograd.grad(out, leaves, torch.cat([zero, grad, grad_end]))
    with torch.no_grad():
        want = chunked_backward((q, k, v), start, grad, grad_end, s, 32)
    for x, y in zip(found, want, strict=True):
        near(x, y, 1e-11)


# --- the block of TNL (arXiv 2405.17381, test oracle) ---------------------------------------------


@pytest.mark.parametrize("length", [1, 8, 31])
@pytest.mark.parametrize("c", [1e-3, 0.5, 40.0])
def test_the_norm_of_a_constant_vector(length: int, c: float) -> None:
    """SRMSNorm of a constant c > 0 of any length is `1 / sqrt(1 + eps / c^2)`; of zeros, 0."""
    spec = Lightning(rule="none", map="identity").rewrite(SITE, CAUSAL)
    one = torch.ones(1, 4, 1, 1, dtype=F64)
    out = run(spec, one, one, torch.full((1, 4, 1, length), c, dtype=F64))
    torch.testing.assert_close(out, torch.full_like(out, (1 + 1e-6 / c**2) ** -0.5))
    assert not run(spec, one, one, torch.zeros(1, 4, 1, length, dtype=F64)).any()


H, D = 4, 8
TNL = Lightning(rule="tnl").rewrite(SITE, CAUSAL)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def slopes(spec: LinearSpec, heads: int) -> Tensor:
    """s `[H]`, in float32 as in the released models."""
    found = evaluate(spec.decay, {"h": torch.arange(heads)}, {}, F64)
    assert isinstance(found, Tensor)
    return -found


def weights(dtype: torch.dtype = F64) -> list[Tensor]:
    """`W_qkvu [d, 4 d]` and `W_o [d, d]`."""
    width = H * D
    return [(drawn(width, n * width) / width**0.5).to(dtype) for n in (4, 1)]


def block(x: Tensor, w_in: Tensor, w_out: Tensor, attend: Attend) -> Tensor:
    """Gated linear attention: `(u * o) W_o`, with heads split as (h d), u without activation."""
    q, k, v, u = (x @ w_in).chunk(4, dim=-1)
    out = attend(*(y.unflatten(-1, (H, D)).transpose(1, 2) for y in (q, k, v)))
    return (u * out.transpose(1, 2).flatten(2)) @ w_out


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SiLU, the decay matrix, the norm over the features of all heads."""
    out = parallel(silu(q), silu(k), v, slopes(TNL, H).double()[:, None, None])
    merged = out.transpose(1, 2).flatten(2)
    merged = merged * torch.rsqrt(merged.square().mean(-1, keepdim=True) + 1e-6)
    return merged.unflatten(-1, (H, D)).transpose(1, 2)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(TNL, q, k, v)


@pytest.fixture
def released_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of the released models goes by 256 tokens."""
    monkeypatch.setattr(torch_linear_call, "CHUNK", 256)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_a_whole_block_equals_the_one_with_a_decay_matrix(n: int, released_block: None) -> None:
    x, w = drawn(2, n, H * D), weights()
    near(block(x, *w, chunked), block(x, *w, dense), 1e-9)


@pytest.mark.parametrize("n", [255, 256, 257])
def test_a_block_goes_on_from_a_prompt(n: int, released_block: None) -> None:
    """Prefill, two steps, and a step of several tokens."""
    x, w = drawn(1, n + 6, H * D), weights()
    ends = [n, n + 1, n + 2, n + 6]

    def steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decoded(TNL, q, k, v, ends, f"tnl {n}")

    near(block(x, *w, steps), block(x, *w, dense), 1e-9)


def test_a_left_padded_batch_equals_the_rows_alone(released_block: None) -> None:
    spec = Lightning(rule="tnl").rewrite(SITE, PADDED)
    x, w, lost = drawn(2, 300, H * D), weights(), (70, 0)
    pad = torch.ones(2, 300, dtype=torch.bool)
    pad[0, :70] = False

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(spec, q, k, v, tensors=[pad])

    found = block(x, *w, padded)
    for b in range(2):
        alone = block(x[b : b + 1, lost[b] :], *w, dense)
        near(found[b : b + 1, lost[b] :], alone, 1e-9)


def test_gradients_of_all_projections_are_those_of_the_decay_matrix() -> None:
    x = drawn(1, 257, H * D).requires_grad_()
    leaves = [x, *(y.requires_grad_() for y in weights())]
    grad = drawn(1, 257, H * D)
    found, want = (torch.autograd.grad(block(*leaves, f), leaves, grad) for f in (chunked, dense))
    for g, h in zip(found, want, strict=True):
        near(g, h, 1e-9)


def test_a_block_in_bfloat16_has_an_error_ratio_of_5e_3() -> None:
    """Against the decay matrix in float64 behind the same projections."""
    x, w = drawn(1, 600, H * D).bfloat16(), weights(torch.bfloat16)

    def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q.double(), k.double(), v.double())

    w_out = w[1].double()

    def rest(attend: Attend) -> Tensor:
        q, k, v, u = (x @ w[0]).chunk(4, dim=-1)
        out = attend(*(y.unflatten(-1, (H, D)).transpose(1, 2) for y in (q, k, v)))
        return (u.double() * out.double().transpose(1, 2).flatten(2)) @ w_out

    assert rms_ratio(rest(chunked), rest(wide)) <= 5e-3


@pytest.mark.parametrize(
    ("heads", "first", "last"),
    [(8, 0.5, 0.00390625), (12, 0.5, 2**-3.5), (32, 2**-0.25, 2**-8)],
)
@pytest.mark.parametrize("layers", [2, 24])
def test_slopes_of_the_first_layer_are_strongest_and_of_the_last_almost_none(
    heads: int, first: float, last: float, layers: int
) -> None:
    """The geometric slopes times `1 - l / (L - 1) + 1e-5`, to 1e-6, as the pass writes them."""
    for layer, factor in ((0, 1 + 1e-5), (layers - 1, 1e-5)):
        site = replace(SITE, heads=heads, layer=layer, layers=layers)
        found = slopes(Lightning(rule="tnl").rewrite(site, CAUSAL), heads)
        want = [first * factor, last * factor]
        assert [float(found[0]), float(found[-1])] == pytest.approx(want, rel=1e-6, abs=0)
