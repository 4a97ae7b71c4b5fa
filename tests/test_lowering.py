"""The choice of a lowering, and the op: fake tensors, autograd, autocast, memory, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import sympy
import torch
from sympy import And, Ne, Symbol, tanh
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter import symbols
from rewriter.errors import InputError, LoweringError, ShapeError
from rewriter.lowering import LOWERINGS, Shapes, at_lengths, check_target, choose, explain
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Route
from rewriter.symbols import L, M, Read, b, h, k, q, s

SHAPES = Shapes("cpu", torch.float32, 2, 4, 2, 6, 6, 8, 8, grad=False)
PLAIN = SoftmaxSpec(scale=sympy.S.Half)
CAUSAL = replace(PLAIN, mask=k <= q)
CAPPED = replace(CAUSAL, score=20 * tanh(s / 20))
BIASED = SoftmaxSpec(
    scale=sympy.S.Half,
    score=s + Read(Symbol("slope"), h) * (k - q),
    mask=And(k <= q, Ne(Read(Symbol("pad"), b, k), 0)),
    tensors=(TensorArg("slope", "float32", 1), TensorArg("pad", "bool", 2)),
)
OP = torch.ops.rewriter.attention.default


def inputs(dtype: torch.dtype = torch.float32, *, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(2)
    x = [torch.randn(2, n, 6, 8, dtype=dtype) for n in (4, 2, 2)]
    return [y.requires_grad_(grad) for y in x]


def reads() -> list[Tensor]:
    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[1, :2] = False
    return [torch.rand(4), pad]


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "target", "name"),
    [
        (PLAIN, "auto", "torch.sdpa"),
        (CAUSAL, "auto", "torch.sdpa"),
        (CAPPED, "auto", "torch.blocked"),
        (CAPPED, "torch", "torch.blocked"),
        (CAUSAL, "torch.blocked", "torch.blocked"),
        (CAPPED, "reference", "reference"),
    ],
)
def test_the_first_lowering_that_takes_a_spec_wins(
    spec: SoftmaxSpec, target: str, name: str
) -> None:
    assert choose(spec, SHAPES, target).lowering.name == name


def test_refusals_come_with_their_reasons() -> None:
    reason = "the score is not the scaled product plus a bias"
    assert choose(CAPPED, SHAPES).refusals[0] == ("torch.sdpa", reason)
    assert explain(CAPPED, SHAPES) == ("torch.blocked", f"torch.sdpa: {reason}")


def test_the_reference_is_never_chosen_unasked() -> None:
    with pytest.raises(LoweringError, match="complex64 is not a floating dtype"):
        choose(PLAIN, replace(SHAPES, dtype=torch.complex64))


def test_on_a_gpu_generated_kernels_come_first() -> None:
    refusals = choose(CAUSAL, replace(SHAPES, device="cuda", dtype=torch.float64)).refusals
    assert [name for name, _ in refusals] == ["triton"]


def test_a_target_by_name_does_not_fall_back() -> None:
    with pytest.raises(LoweringError) as caught:
        choose(CAPPED, SHAPES, "torch.sdpa")
    assert str(caught.value) == (
        f"target 'torch.sdpa' does not take {CAPPED} on cpu:"
        " torch.sdpa: the score is not the scaled product plus a bias"
    )
    assert explain(CAPPED, SHAPES, "torch.sdpa")[0] is None


def test_an_unknown_target_is_refused_with_the_list_of_targets() -> None:
    with pytest.raises(InputError) as caught:
        check_target("tpu")
    assert str(caught.value) == (
        "there is no target 'tpu'; one of auto, torch, triton, torch.compact, "
        "torch.sdpa, torch.blocked, torch.routed, torch.linear, reference"
    )
    for target in ("auto", "torch", *(x.name for x in LOWERINGS)):
        check_target(target)


PAST = symbols.size_symbol("past")
PAD = Ne(Read(Symbol("pad"), b, k), 0)


def routed(mask: Boolean, topk: int, position: sympy.Expr = q + M - L) -> SoftmaxSpec:
    """At 8 keys, two blocks of 4 are all of them."""
    return SoftmaxSpec(
        mask=mask,
        tensors=(TensorArg("pad", "bool", 2),) if mask.has(Read) else (),
        sizes=("past",) if mask.has(PAST) else (),
        route=Route("query", topk, 4, position),
    )


@pytest.mark.parametrize(
    ("spec", "q_len", "is_dropped"),
    [
        (routed(k <= q + M - L, 2), 8, True),
        (routed(k <= q + M - L, 2), 3, True),
        (routed(And(k <= q, PAD), 2, q), 8, True),
        (routed(k <= q + PAST, 2, q + PAST), 8, True),
        (routed(k < q + M - L, 2), 8, True),
        (routed(sympy.true, 2), 1, True),
        (routed(k <= q + M - L, 1), 8, False),
        (routed(sympy.true, 2), 8, False),
        (routed(k <= q + M - L + 1, 2), 8, False),
        (routed(k < 8, 2), 8, False),
        (routed(k <= 2 * q, 2, q), 8, False),
        (routed(k <= q, 2, 7 - q), 8, False),
        (routed((k <= q) | (k < 7), 2), 8, False),
        (routed(And(k <= q + PAST, PAD), 2, q), 8, False),
    ],
    ids=str,
)
def test_a_route_is_dropped_only_where_later_blocks_are_hidden_anyway(
    spec: SoftmaxSpec, q_len: int, is_dropped: bool
) -> None:
    pad = torch.ones(2, 8, dtype=torch.bool)
    pad[1, :2] = False
    tensors, sizes = [pad] * len(spec.tensors), (2,) * len(spec.sizes)
    torch.manual_seed(3)
    x = [torch.randn(2, 2, n, 8) for n in (q_len, 8, 8)]
    assert (at_lengths(spec, q_len, 8) != spec) is is_dropped
    found = attention(*x, tensors, sizes, spec)
    torch.testing.assert_close(found, reference(spec, *x, tensors, sizes))


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["auto", "torch.blocked", "reference"])
@pytest.mark.parametrize("spec", [CAUSAL, CAPPED, BIASED], ids=str)
def test_the_op_equals_the_reference(spec: SoftmaxSpec, target: str) -> None:
    x, tensors = inputs(), reads()[: len(spec.tensors)]
    found = attention(*x, tensors, (), spec, target)
    torch.testing.assert_close(found, reference(spec, *x, tensors))


@pytest.mark.parametrize("target", ["auto", "torch.blocked", "reference"])
@pytest.mark.parametrize("spec", [CAUSAL, CAPPED, BIASED], ids=str)
def test_gradients_of_the_op_equal_those_of_the_reference(spec: SoftmaxSpec, target: str) -> None:
    tensors = reads()[: len(spec.tensors)]
    x = inputs(grad=True)
    wanted = [*x, *(t.requires_grad_() for t in tensors if t.is_floating_point())]
    grad = torch.randn(2, 4, 6, 8)
    found = torch.autograd.grad(attention(*x, tensors, (), spec, target), wanted, grad)
    expected = torch.autograd.grad(reference(spec, *x, tensors), wanted, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("needed", range(4))
def test_inputs_that_want_no_gradient_get_none(needed: int) -> None:
    x, (slope, pad) = inputs(), reads()
    every = [*x, slope]
    every[needed].requires_grad_()
    attention(*x, [slope, pad], (), BIASED).sum().backward()
    assert [y.grad is not None for y in every] == [n == needed for n in range(4)]


@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, CAPPED, replace(CAPPED, dropout=0.5)], ids=str)
def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward(spec: SoftmaxSpec) -> None:
    x = [torch.randn(1, 2, 64, 4, requires_grad=True) for _ in range(3)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: (kept.append(y.numel()), y)[1], lambda y: y
    ):
        attention(*x, (), (), spec).sum()
    assert kept
    assert max(kept) <= 2 * 64 * 4


def test_dropout_in_the_backward_is_that_of_the_forward() -> None:
    """The output is linear in v: a gradient of v that fits it was drawn with the same mask."""
    spec = replace(CAPPED, dropout=0.5)
    x = inputs(torch.float64, grad=True)
    out = attention(*x, (), (), spec)
    (grad,) = torch.autograd.grad(out, x[2], torch.ones_like(out))
    torch.testing.assert_close((grad * x[2]).sum(), out.sum())


def test_dropout_follows_the_seed_with_and_without_gradients() -> None:
    spec = replace(CAUSAL, dropout=0.5)
    runs = []
    for grad in (True, False):
        torch.manual_seed(11)
        x = inputs(grad=grad)
        torch.manual_seed(11)
        runs.append(attention(*x, (), (), spec).detach())
    assert torch.equal(*runs)


def test_a_second_derivative_is_an_error_that_says_what_to_do() -> None:
    x = inputs(grad=True)
    (first,) = torch.autograd.grad(attention(*x, (), (), CAPPED).sum(), x[0], create_graph=True)
    torch.testing.assert_close(
        first, torch.autograd.grad(reference(CAPPED, *x).sum(), x[0], create_graph=True)[0]
    )
    with pytest.raises(LoweringError, match="can be differentiated once only"):
        first.sum().backward()


@pytest.mark.parametrize("spec", [CAUSAL, CAPPED], ids=str)
def test_autocast_around_the_op_changes_nothing_inside(spec: SoftmaxSpec) -> None:
    x = inputs(grad=True)
    plain = attention(*x, (), (), spec)
    expected = torch.autograd.grad(plain.sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(*x, (), (), spec)
        with torch.no_grad():
            assert torch.equal(attention(*x, (), (), spec), plain)
        grads = torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, plain)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))


def test_the_op_runs_in_inference_mode() -> None:
    with torch.inference_mode():
        x = inputs()
        torch.testing.assert_close(attention(*x, (), (), CAPPED), reference(CAPPED, *x))


@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_the_op_is_one_node_in_a_graph(mode: str, pre_dispatch: bool) -> None:
    x, tensors = inputs(), reads()

    def model(q: Tensor, k: Tensor, v: Tensor, *t: Tensor) -> Tensor:
        return attention(q, k, v, t, (), BIASED) + 1

    graph = make_fx(model, tracing_mode=mode, pre_dispatch=pre_dispatch)(*x, *tensors)
    nodes = [n for n in graph.graph.nodes if n.target is OP]
    assert len(nodes) == 1
    assert nodes[0].meta["val"].dtype == torch.float32
    torch.testing.assert_close(graph(*x, *tensors), model(*x, *tensors))
    if mode == "symbolic":
        longer = [torch.randn(3, n, 9, 8) for n in (4, 2, 2)]
        more = [tensors[0], torch.ones(3, 9, dtype=torch.bool)]
        torch.testing.assert_close(graph(*longer, *more), model(*longer, *more))


def test_sizes_may_be_symbols_of_the_graph() -> None:
    spec = replace(PLAIN, mask=k <= q + Symbol("past", integer=True), sizes=("past",))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, (), (k.shape[2] - q.shape[2],), spec)

    graph = make_fx(model, tracing_mode="symbolic", pre_dispatch=True)(
        torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    )
    x = [torch.randn(1, 2, n, 4) for n in (2, 11, 11)]
    torch.testing.assert_close(graph(*x), reference(spec, *x, sizes=(9,)))


@pytest.mark.parametrize("spec", [CAUSAL, CAPPED, replace(CAPPED, dropout=0.5)], ids=str)
def test_the_ops_keep_the_rules_of_torch(spec: SoftmaxSpec) -> None:
    x, seed = inputs(), torch.tensor(3)
    text, wanted = spec.to_json(), [True, False, True]
    checks = ("test_schema", "test_faketensor")
    if not spec.dropout:  # two runs differ on purpose
        torch.library.opcheck(OP, (*x, [], [], text, "auto"), test_utils=checks)
    grad = torch.randn(2, 4, 6, 8)
    torch.library.opcheck(
        torch.ops.rewriter.attention_seeded.default,
        (*x, [], [], text, "auto", seed),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.rewriter.attention_backward.default,
        (grad, *x, [], [], text, seed, wanted),
        test_utils=checks,
    )


def test_compiled_training_gives_the_same_gradients() -> None:
    """AOT autograd traces the recomputing backward as one op too."""
    tensors = reads()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, tensors, (), BIASED)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = inputs(grad=True)
    found = torch.autograd.grad(compiled(*x).sum(), x)
    expected = torch.autograd.grad(model(*x).sum(), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# --- mistakes -------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named() -> None:
    q_, k_, v_ = inputs()
    with pytest.raises(ShapeError, match=r"q, k and v are \[B, H, L, D\], got \(4, 6, 8\)"):
        attention(q_[0], k_[0], v_[0], (), (), PLAIN)
    with pytest.raises(ShapeError, match="q, k and v do not fit each other"):
        attention(q_, k_, v_[:, :, :5], (), (), PLAIN)
    with pytest.raises(ShapeError, match="the spec reads slope, pad, got 1 tensors"):
        attention(q_, k_, v_, reads()[:1], (), BIASED)
    with pytest.raises(LoweringError, match="3 query heads are not a multiple of 2 key heads"):
        attention(q_[:, :3], k_, v_, (), (), PLAIN)


def test_queries_and_keys_have_one_dtype_and_values_may_have_another() -> None:
    q_, k_, v_ = inputs()
    with pytest.raises(ShapeError, match=r"q is torch\.float32 and k is torch\.float64;"):
        attention(q_, k_.double(), v_, (), (), PLAIN)
    assert attention(q_, k_, v_.double(), (), (), PLAIN).dtype == torch.float64


@pytest.mark.parametrize("grad", [False, True])
def test_sizes_are_those_of_the_spec(grad: bool) -> None:
    x = inputs(grad=grad)
    with pytest.raises(ShapeError, match="the spec uses no sizes, got 2"):
        attention(*x, (), (1, 2), PLAIN)
    sized = replace(PLAIN, mask=k <= q + PAST, sizes=("past",))
    with pytest.raises(ShapeError, match="the spec uses the sizes past, got 0"):
        attention(*x, (), (), sized)


def test_what_draws_dropout_keeps_to_its_target() -> None:
    spec, seed = replace(CAPPED, dropout=0.5).to_json(), torch.tensor(3)
    with pytest.raises(LoweringError, match=r"'torch\.sdpa' does not take"):
        torch.ops.rewriter.attention_seeded(*inputs(), [], [], spec, "torch.sdpa", seed)


def test_a_device_without_the_target_is_an_error_that_says_so() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        pytest.skip("Triton can run here")
    with pytest.raises(LoweringError, match="triton: Triton kernels need a GPU"):
        attention(*inputs(), (), (), CAUSAL, "triton")


TRITON = """
import torch
from sympy import tanh
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import k, q, s

torch.manual_seed(0)
spec = SoftmaxSpec(score=20 * tanh(s / 20), mask=k <= q)
x = [torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3)]
out = attention(*x, (), (), spec, "triton")
expected = reference(spec, *x)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
grads = torch.autograd.grad(out.sum(), x)
for one, other in zip(grads, torch.autograd.grad(expected.sum(), x)):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
"""


def test_a_triton_forward_has_the_gradients_of_recomputed_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
