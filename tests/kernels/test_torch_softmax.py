"""The torch lowerings against the reference: numbers, gradients, memory, and what SDPA refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import And, Expr, Ne, Or, Symbol, tanh
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import LoweringError, ShapeError
from rewriter.kernels import torch_blocked, torch_softmax
from rewriter.kernels.torch_backward import backward
from rewriter.kernels.torch_blocked import Call, blocked
from rewriter.kernels.torch_code import compiled, source
from rewriter.kernels.torch_softmax import sdpa_forward, sdpa_supports
from rewriter.lowering import Shapes
from rewriter.reference import reference
from rewriter.spec import MASKED, SoftmaxSpec, TensorArg
from rewriter.symbols import L, M, Maximum, Minimum, Read, Where, b, h, k, q, s

PAST = sym.size_symbol("past")


def read(name: str, *index: Expr) -> Expr:
    return Read(Symbol(name), *index)


@dataclass(frozen=True)
class Dims:
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    q_len: int = 7
    kv_len: int = 9
    dim: int = 4
    value_dim: int = 5


TENSORS: dict[str, tuple[str, int, Callable[[Dims], Tensor]]] = {
    "pad": ("bool", 2, lambda n: torch.arange(n.kv_len) >= torch.tensor([[2], [0]])[: n.batch]),
    "pad_right": (
        "int64",
        2,
        lambda n: (torch.arange(n.kv_len) < torch.tensor([[n.kv_len], [3]])[: n.batch]).long(),
    ),
    "nothing": ("bool", 2, lambda n: torch.zeros(n.batch, n.kv_len, dtype=torch.bool)),
    "slope": ("float64", 1, lambda n: torch.rand(n.heads, dtype=torch.float64)),
    "position": ("int64", 2, lambda n: torch.arange(n.kv_len).expand(n.batch, -1) - 2),
    "table": ("float64", 2, lambda n: torch.randn(8, n.heads, dtype=torch.float64)),
    "sinks": ("float64", 1, lambda n: torch.randn(n.heads, dtype=torch.float64)),
    "row_sinks": ("float64", 2, lambda n: torch.randn(n.heads, n.q_len, dtype=torch.float64)),
    "gate": ("float64", 3, lambda n: torch.rand(n.batch, n.q_len, n.heads, dtype=torch.float64)),
    "opaque": (
        "float64",
        4,
        lambda n: torch.randn(n.batch, 1, n.q_len, n.kv_len, dtype=torch.float64),
    ),
    "rows": (
        "float64",
        4,
        lambda n: torch.randn(n.batch, n.heads, n.q_len, 9, dtype=torch.float64),
    ),
}

CAUSAL = k <= q
PAD = Ne(read("pad", b, k), 0)
WINDOW = And(CAUSAL, k > q - 3)
BUCKET = Minimum(Maximum(k - q + 4, 0), 7)


@dataclass(frozen=True)
class Case:
    """Parts of a spec, and the tensors it reads in order."""

    score: Expr = s
    mask: sympy.Basic = sympy.true
    reads: tuple[str, ...] = ()
    scale: Expr = sympy.S.Half
    sink: Expr | None = None
    heads: Expr = field(default_factory=lambda: sympy.Integer(1))
    sizes: tuple[str, ...] = ()

    def spec(self, **changes: object) -> SoftmaxSpec:
        tensors = tuple(TensorArg(n, TENSORS[n][0], TENSORS[n][1]) for n in self.reads)
        made = SoftmaxSpec(
            scale=self.scale,
            score=self.score,
            mask=self.mask,  # type: ignore[arg-type]
            sink=self.sink,
            heads=self.heads,
            tensors=tensors,
            sizes=self.sizes,
        )
        return replace(made, **changes)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "plain": Case(),
    "causal": Case(mask=CAUSAL),
    "causal with a cache": Case(mask=k <= q + M - L),
    "causal from a named size": Case(mask=k <= q + PAST, sizes=("past",)),
    "soft cap": Case(50 * tanh(s / 50), CAUSAL),
    "soft cap, then bias": Case(5 * tanh(s / 5) + read("slope", h) * (k - q), CAUSAL, ("slope",)),
    "alibi, left padding": Case(s + read("slope", h) * (k - q), And(CAUSAL, PAD), ("slope", "pad")),
    "alibi by position": Case(
        s + read("slope", h) * read("position", b, k), CAUSAL, ("slope", "position")
    ),
    "table by distance": Case(
        s + read("table", BUCKET, h),
        Ne(read("pad_right", b, k), 0),
        ("table", "pad_right"),
    ),
    "table, window and first keys": Case(
        s + read("table", BUCKET, h), And(CAUSAL, Or(k > q - 3, k < 1)), ("table",)
    ),
    "window": Case(mask=WINDOW),
    "window, padding": Case(mask=And(WINDOW, PAD), reads=("pad",)),
    "window and first keys, padding": Case(
        mask=And(CAUSAL, Or(k > q - 3, k < 2), PAD), reads=("pad",)
    ),
    "sink a head": Case(mask=WINDOW, reads=("sinks",), sink=read("sinks", h)),
    "sink a row, padding": Case(
        mask=And(CAUSAL, PAD), reads=("pad", "row_sinks"), sink=read("row_sinks", h, q)
    ),
    "constant sink": Case(mask=PAD, reads=("pad",), sink=sympy.Integer(0)),
    "additive tensor": Case(s + read("opaque", b, 0, q, k), reads=("opaque",)),
    "decomposed bias": Case(s + read("rows", b, h, q, sym.IDiv(k, 4)), reads=("rows",)),
    "tensor times score": Case(
        s * read("opaque", b, 0, q, k) + read("opaque", 0, 0, q, k), reads=("opaque",)
    ),
    "soft mask": Case(Where(CAUSAL, s, sympy.Float(-3.0))),
    "clamped score": Case(Maximum(s, sympy.Float(-0.5)), CAUSAL),
    "score without s": Case(read("table", BUCKET, h), CAUSAL, ("table",)),
    "scale a head": Case(scale=read("slope", h), reads=("slope",)),
    "gate": Case(mask=CAUSAL, reads=("gate",), heads=read("gate", b, q, h)),
    "head 1 ablated": Case(mask=CAUSAL, heads=Where(sympy.Eq(h, 1), 0, 1)),
    "heads of two kinds": Case(mask=And(CAUSAL, Or(h < 2, k > q - 2))),
    "no key at all": Case(mask=Ne(read("nothing", b, k), 0), reads=("nothing",)),
    "no key by formula": Case(mask=k > q + 20),
}


def values(case: Case, n: Dims, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the tensors of a case."""
    torch.manual_seed(1)
    shapes = (
        (n.batch, n.heads, n.q_len, n.dim),
        (n.batch, n.kv_heads, n.kv_len, n.dim),
        (n.batch, n.kv_heads, n.kv_len, n.value_dim),
    )
    made = [torch.randn(x, dtype=torch.float64) for x in shapes]
    made += [TENSORS[name][2](n) for name in case.reads]
    return [x.to(dtype) if x.is_floating_point() else x for x in made]


def sizes_of(case: Case, n: Dims) -> list[int]:
    return [n.kv_len - n.q_len for _ in case.sizes]


@pytest.fixture(params=["one block", "many blocks"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Many: two rows, one batch and one group of heads a block."""
    if request.param == "many blocks":
        _small_blocks(monkeypatch)
    return str(request.param)


def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_blocked, "SCORES", {"cpu": (8, 8, 16)})
    monkeypatch.setattr(torch_blocked, "_FEWEST_ROWS", 2)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    out = function(*leaves)
    found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


# --- blocked: numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("tiles")
def test_blocks_equal_the_reference(name: str, masked: str) -> None:
    case, n = CASES[name], Dims()
    spec = case.spec(masked=masked)
    x, sizes = values(case, n), sizes_of(case, n)
    expected = reference(spec, *x[:3], x[3:], sizes)
    close(blocked(spec, *x[:3], x[3:], sizes), expected)


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("tiles")
def test_gradients_of_blocks_equal_those_of_the_reference(name: str, masked: str) -> None:
    case, n = CASES[name], Dims()
    spec = case.spec(masked=masked)
    x, sizes = values(case, n), sizes_of(case, n)
    grad = torch.randn(n.batch, n.heads, n.q_len, n.value_dim, dtype=torch.float64)
    expected = gradients(lambda q, k, v, *t: reference(spec, q, k, v, t, sizes), x, grad)
    wanted = [y.is_floating_point() for y in x]
    found = backward(spec, grad, *x[:3], x[3:], sizes, wanted)
    for one, other in zip((g for g in found if g is not None), expected, strict=True):
        close(one, other)


@pytest.mark.parametrize(
    "dims",
    [
        Dims(heads=3, kv_heads=3),
        Dims(heads=3, kv_heads=1),
        Dims(heads=8, kv_heads=1),
        Dims(q_len=1),
        Dims(q_len=1, kv_len=1),
        Dims(batch=1, heads=1, kv_heads=1, q_len=33, kv_len=31),
        Dims(q_len=9, kv_len=4),
        Dims(dim=1, value_dim=1),
        Dims(kv_len=0),
        Dims(q_len=0),
        Dims(batch=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["causal", "soft cap", "alibi, left padding", "sink a head"])
@pytest.mark.usefixtures("tiles")
def test_blocks_equal_the_reference_at_odd_shapes(name: str, dims: Dims) -> None:
    case = CASES[name]
    for masked in ("zero", "mean"):
        spec = case.spec(masked=masked)
        x = values(case, dims)
        expected = reference(spec, *x[:3], x[3:]) if dims.kv_len else torch.zeros(0)
        found = blocked(spec, *x[:3], x[3:], ())
        if dims.kv_len:
            close(found, expected)
        else:
            assert found.shape == (dims.batch, dims.heads, dims.q_len, dims.value_dim)
            assert not found.any()


@pytest.mark.parametrize("layout", ["BLHD", "transposed", "expanded", "strided"])
@pytest.mark.usefixtures("tiles")
def test_strides_do_not_matter(layout: str) -> None:
    case, n = CASES["alibi, left padding"], Dims(heads=2, kv_heads=2, value_dim=4)
    spec = case.spec()
    x = values(case, n)

    def laid_out(y: Tensor) -> Tensor:
        if layout == "BLHD":
            return y.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "transposed":
            return y.mT.contiguous().mT
        if layout == "expanded":
            return y[:, :1].expand_as(y)
        return torch.stack([y, y], -1).flatten(-2)[..., ::2]

    x[:3] = [laid_out(y) for y in x[:3]]
    assert not all(y.is_contiguous() for y in x[:3])
    plain = [y.contiguous() for y in x]
    close(blocked(spec, *x[:3], x[3:], ()), reference(spec, *plain[:3], plain[3:]))
    grad = torch.randn(2, 2, n.q_len, 4, dtype=torch.float64).transpose(0, 1)
    found = backward(spec, grad, *x[:3], x[3:], (), [True, True, True, False, False])
    expected = backward(spec, grad, *plain[:3], plain[3:], (), [True, True, True, False, False])
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert one is not None
        assert other is not None
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n != "no key at all"])
def test_errors_are_at_most_twice_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """The rule of the project: error against float64, compared with that of the dtype itself."""
    case, n = CASES[name], Dims(q_len=33, kv_len=35, dim=16, value_dim=16)
    spec = case.spec()
    x, sizes = values(case, n, dtype), sizes_of(case, n)
    exact = [y.double() if y.is_floating_point() else y for y in x]
    gold = reference(spec, *exact[:3], exact[3:], sizes)
    own = (reference(spec, *x[:3], x[3:], sizes).double() - gold).abs().max()
    found = blocked(spec, *x[:3], x[3:], sizes)
    assert found.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps * gold.abs().max()
    assert (found.double() - gold).abs().max() <= 2 * own + floor


def test_values_of_another_dtype_decide_the_dtype_of_the_output() -> None:
    x = values(CASES["causal"], Dims())
    spec = CASES["causal"].spec()
    found = blocked(spec, x[0].float(), x[1].float(), x[2].bfloat16(), (), ())
    assert found.dtype == torch.bfloat16
    exact = reference(spec, *x[:3])
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [1, 7, 33, 1024, 4099])
def test_softmax_may_overwrite_its_input(width: int) -> None:
    """`Call` relies on it; torch does not promise it."""
    x = torch.randn(3, 5, width)
    expected = x.softmax(-1)
    assert torch.equal(torch.softmax(x, -1, out=x), expected)


def test_query_heads_have_to_be_a_multiple_of_the_key_heads() -> None:
    x = values(CASES["plain"], Dims(heads=3, kv_heads=2))
    with pytest.raises(ShapeError, match="3 query heads are not a multiple of 2 key heads"):
        blocked(CASES["plain"].spec(), *x[:3], (), ())


# --- blocked: what is computed --------------------------------------------------------------------


def test_keys_that_no_query_of_a_block_sees_are_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN in a key or value would reach the output of every row that touches it."""
    _small_blocks(monkeypatch)
    x = values(CASES["window and first keys, padding"], Dims(batch=1, q_len=12, kv_len=12))
    spec = Case(mask=And(CAUSAL, Or(k > q - 3, k < 2))).spec()
    expected = blocked(spec, *x[:3], (), ())
    x[1][:, :, 4:6] = torch.nan
    x[2][:, :, 4:6] = torch.nan
    found = blocked(spec, *x[:3], (), ())
    assert found[:, :, 4:9].isnan().any()
    assert torch.equal(found[:, :, :4], expected[:, :, :4])
    assert torch.equal(found[:, :, 10:], expected[:, :, 10:])


def test_masks_are_applied_only_where_they_can_hide_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled = []
    fill = torch_blocked._fill
    monkeypatch.setattr(
        torch_blocked,
        "_fill",
        lambda s, hidden, value: (filled.append(s.shape[-1]), fill(s, hidden, value)),
    )
    monkeypatch.setattr(torch_blocked, "SCORES", {"cpu": (64, 64, 2**20)})
    monkeypatch.setattr(torch_blocked, "_FEWEST_ROWS", 8)
    x = values(CASES["causal"], Dims(q_len=32, kv_len=32))
    blocked(CASES["causal"].spec(), *x[:3], (), ())
    assert filled == [7, 7, 7, 7]


def test_a_table_of_distances_is_read_once_a_diagonal() -> None:
    spec = CASES["table by distance"].spec()
    assert "def diagonal_0(x, d):" in source(spec)
    sizes = []
    code = compiled(spec.to_json())
    n = Dims(q_len=6, kv_len=8)
    x = values(CASES["table by distance"], n)
    block = torch_blocked.Block(
        {"b": (0, 2), "h": (0, 6), "q": (0, 6)},
        ((0, 8),),
        {"B": 2, "H": 6, "L": 6, "M": 8},
        x[3:],
        torch.float64,
        torch.device("cpu"),
    )
    take = block._read
    block._read = lambda *a: (found := take(*a), sizes.append(found.numel()))[0]  # type: ignore[method-assign]
    assert code.bias is not None
    bias = code.bias(block)
    assert isinstance(bias, Tensor)
    assert bias.shape[-2:] == (6, 8)
    assert sizes == [6 * (6 + 8 - 1)]


def test_a_soft_cap_is_three_operations_in_place() -> None:
    text = source(CASES["soft cap"].spec())
    body = text[text.index("def score_(x, s):") : text.index("def hidden_0")]
    assert body.strip() == "def score_(x, s):\n    s.tanh_()\n    s.mul_(50)\n    return s"
    assert compiled(CASES["soft cap"].spec().to_json()).scale == 0.5 / 50


# --- blocked: gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["soft cap, then bias", "table by distance", "sink a row, padding", "gate", "scale a head"],
)
@pytest.mark.usefixtures("tiles")
def test_gradients_pass_gradcheck(name: str) -> None:
    case, n = CASES[name], Dims(batch=1, heads=2, kv_heads=1, q_len=4, kv_len=5, dim=2, value_dim=2)
    spec = case.spec(masked="add")
    x = [y.requires_grad_() if y.is_floating_point() else y for y in values(case, n)]
    assert torch.autograd.gradcheck(_Recorded(spec), tuple(x))


class _Recorded:
    """`blocked` with its backward, as a function of tensors alone."""

    def __init__(self, spec: SoftmaxSpec, seed: int | None = None) -> None:
        self.spec, self.seed = spec, seed

    def __call__(self, *inputs: Tensor) -> Tensor:
        spec, seed = self.spec, self.seed

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *x):  # type: ignore[no-untyped-def]
                ctx.save_for_backward(*x)
                return blocked(spec, *x[:3], x[3:], (), seed=seed)

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                x = ctx.saved_tensors
                need = ctx.needs_input_grad
                return tuple(backward(spec, grad, *x[:3], x[3:], (), need, seed=seed))

        return Function.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    case = CASES["sink a head"]
    x = values(case, Dims())
    grad = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    full = backward(case.spec(), grad, *x[:3], x[3:], (), [True] * 4)
    for i in range(4):
        wanted = [n == i for n in range(4)]
        found = backward(case.spec(), grad, *x[:3], x[3:], (), wanted)
        assert [g is not None for g in found] == wanted
        close(found[i], full[i])  # type: ignore[arg-type]


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiles")
def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    spec = SoftmaxSpec(dropout=0.25)
    q_, k_ = torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40, 4)
    v = torch.eye(40).expand(1, 2, 40, 40)
    weights = 40 * blocked(spec, q_, k_, v, (), ())
    dropped = weights == 0
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / 0.75))
    assert 0.2 < dropped.float().mean() < 0.3


def test_dropout_follows_the_seed_of_torch() -> None:
    spec = CASES["causal"].spec(dropout=0.5)
    x = values(CASES["causal"], Dims())
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(blocked(spec, *x[:3], (), ()))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", ["soft cap", "sink a row, padding", "gate"])
@pytest.mark.usefixtures("tiles")
def test_the_backward_drops_what_the_forward_dropped(name: str) -> None:
    case, n = CASES[name], Dims(batch=1, heads=2, kv_heads=1, q_len=4, kv_len=5, dim=2, value_dim=2)
    x = [y.requires_grad_() if y.is_floating_point() else y for y in values(case, n)]
    assert torch.autograd.gradcheck(_Recorded(case.spec(dropout=0.4), seed=5), tuple(x))


# --- any spec -------------------------------------------------------------------------------------

TERMS = st.sampled_from((CAUSAL, k <= q + M - L, k > q - 3, PAD, Or(k < 2, k >= q), h < 4, k < 6))
BIASES = st.sampled_from(
    (
        sympy.Integer(0),
        read("slope", h) * (k - q),
        read("table", BUCKET, h),
        read("opaque", b, 0, q, k),
        read("table", sym.IMod(k, 8), h),
    )
)
READS = ("pad", "slope", "table", "opaque", "sinks")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(TERMS, max_size=3),
    BIASES,
    st.booleans(),
    st.booleans(),
    st.sampled_from(MASKED),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_combination_equals_the_reference(
    terms: list[sympy.Basic],
    bias: Expr,
    capped: bool,
    sunk: bool,
    masked: str,
    q_len: int,
    kv_len: int,
) -> None:
    score = (3 * tanh(s / 3) if capped else s) + bias
    sink = read("sinks", h) if sunk else None
    case = Case(score, And(*terms), READS, sink=sink)
    spec, n = case.spec(masked=masked), Dims(q_len=q_len, kv_len=kv_len)
    x = values(case, n)
    grad = torch.randn(n.batch, n.heads, q_len, n.value_dim, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        _small_blocks(patch)
        close(blocked(spec, *x[:3], x[3:], ()), reference(spec, *x[:3], x[3:]))
        wanted = [y.is_floating_point() for y in x]
        found = backward(spec, grad, *x[:3], x[3:], (), wanted)
    expected = gradients(lambda q, k, v, *t: reference(spec, q, k, v, t), x, grad)
    for one, other in zip((g for g in found if g is not None), expected, strict=True):
        close(one, other)


# --- scaled_dot_product_attention -----------------------------------------------------------------


def shapes(n: Dims, *, grad: bool = False, sizes: tuple[int, ...] = ()) -> Shapes:
    dims = (n.batch, n.heads, n.kv_heads, n.q_len, n.kv_len, n.dim, n.value_dim)
    return Shapes("cpu", torch.float64, *dims, grad=grad, sizes=sizes)


EVEN = Dims(kv_len=7, value_dim=4)
ONE_ROW = Dims(q_len=1, kv_len=9, value_dim=4)
TAKEN: dict[str, tuple[Case, Dims]] = {
    "plain": (CASES["plain"], EVEN),
    "causal": (CASES["causal"], EVEN),
    "causal, more keys": (CASES["causal"], replace(EVEN, kv_len=11)),
    "causal, fewer keys": (CASES["causal"], replace(EVEN, kv_len=4)),
    "causal, one row": (CASES["causal"], ONE_ROW),
    "causal with a cache, L = M": (CASES["causal with a cache"], EVEN),
    "causal with a cache, one row": (CASES["causal with a cache"], ONE_ROW),
    "causal from a named size, one row": (CASES["causal from a named size"], ONE_ROW),
    "window wider than the sequence": (Case(mask=And(CAUSAL, k > q - 7)), EVEN),
    "window from a named size, one row": (
        Case(mask=And(k <= q + PAST, k > q + PAST - 3), sizes=("past",)),
        ONE_ROW,
    ),
    "key mask": (Case(mask=PAD, reads=("pad",)), EVEN),
    "key mask that hides all": (CASES["no key at all"], EVEN),
    "key bias and mask": (
        Case(s + read("slope", h) * read("position", b, k), PAD, ("slope", "position", "pad")),
        EVEN,
    ),
    "alibi and padding, one row": (
        Case(
            s + read("slope", h) * (k - q - M + L),
            And(k <= q + M - L, PAD),
            ("slope", "pad"),
        ),
        ONE_ROW,
    ),
    "table, one row": (CASES["table by distance"], ONE_ROW),
    "gate": (CASES["gate"], EVEN),
    "GQA 8/1": (CASES["causal"], replace(EVEN, heads=8, kv_heads=1)),
}


@pytest.mark.parametrize("masked", ["zero", "mean", "add"])
@pytest.mark.parametrize("name", TAKEN)
def test_sdpa_equals_the_reference_and_stays_fused(
    name: str, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, n = TAKEN[name]
    spec = case.spec(masked=masked)
    x, sizes = values(case, n), sizes_of(case, n)
    assert sdpa_supports(spec, shapes(n, sizes=tuple(sizes))) is None
    original = torch_softmax.scaled_dot_product_attention
    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append(torch._fused_sdp_choice(q, k, v, **options))  # type: ignore[arg-type]
        return original(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_softmax, "scaled_dot_product_attention", spy)
    found = sdpa_forward(spec, *x[:3], x[3:], sizes)
    close(found, reference(spec, *x[:3], x[3:], sizes))
    flash = 1
    assert calls == [flash]


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("name", TAKEN)
def test_gradients_of_sdpa_equal_those_of_the_reference(name: str, masked: str) -> None:
    case, n = TAKEN[name]
    spec = case.spec(masked=masked)
    x, sizes = values(case, n), sizes_of(case, n)
    if sdpa_supports(spec, shapes(n, grad=True, sizes=tuple(sizes))) is not None:
        floats = any(name in ("slope", "table") for name in case.reads)
        assert floats or masked != "zero"
        return
    grad = torch.randn(n.batch, n.heads, n.q_len, n.value_dim, dtype=torch.float64)
    found = gradients(lambda q, k, v, *t: sdpa_forward(spec, q, k, v, t, sizes), x, grad)
    expected = gradients(lambda q, k, v, *t: reference(spec, q, k, v, t, sizes), x, grad)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", ["causal", "key mask", "key bias and mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_is_as_exact_as_the_reference(name: str, dtype: torch.dtype) -> None:
    case, n = TAKEN[name]
    x = values(case, n, dtype)
    exact = [y.double() if y.is_floating_point() else y for y in x]
    gold = reference(case.spec(), *exact[:3], exact[3:])
    own = (reference(case.spec(), *x[:3], x[3:]).double() - gold).abs().max()
    found = sdpa_forward(case.spec(), *x[:3], x[3:], ())
    floor = 4 * torch.finfo(dtype).eps * gold.abs().max()
    assert (found.double() - gold).abs().max() <= 2 * own + floor


REFUSED: dict[str, tuple[SoftmaxSpec, Shapes]] = {
    "the score is not the scaled product plus a bias": (CASES["soft cap"].spec(), shapes(EVEN)),
    "the softmax has a sink": (CASES["sink a head"].spec(), shapes(EVEN)),
    "dropout would make it keep an L x M tensor": (SoftmaxSpec(dropout=0.1), shapes(EVEN)),
    "the bias varies with the query": (
        CASES["alibi, left padding"].spec(),
        shapes(EVEN),
    ),
    "the mask varies with query and key": (CASES["window"].spec(), shapes(EVEN)),
    "a causal mask and a mask or bias of the keys would make an L x M tensor": (
        Case(mask=And(CAUSAL, PAD), reads=("pad",)).spec(),
        shapes(EVEN),
    ),
    "keys have dim 4 and values 5": (SoftmaxSpec(), shapes(replace(EVEN, value_dim=5))),
    "3 query heads are not a multiple of 2 key heads": (
        SoftmaxSpec(),
        shapes(replace(EVEN, heads=3)),
    ),
    "a row without a key would give 0, not NaN": (
        TAKEN["key mask"][0].spec(masked="nan"),
        shapes(EVEN),
    ),
    "rows without a key would get another gradient": (
        TAKEN["key mask"][0].spec(masked="mean"),
        shapes(EVEN, grad=True),
    ),
    "the bias may want a gradient": (
        TAKEN["key bias and mask"][0].spec(),
        shapes(EVEN, grad=True),
    ),
    "the mask depends on past, known when the graph runs": (
        CASES["causal from a named size"].spec(),
        shapes(ONE_ROW),
    ),
    "rows without a key are the mean of all keys, most of which no query sees": (
        Case(mask=And(k > 6, PAD), reads=("pad",)).spec(masked="mean"),
        shapes(ONE_ROW),
    ),
    "no query sees a key": (CASES["no key by formula"].spec(), shapes(EVEN)),
    "there are no queries or no keys": (SoftmaxSpec(), shapes(replace(EVEN, kv_len=0))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_sdpa_says_why_it_refuses(reason: str) -> None:
    spec, n = REFUSED[reason]
    assert sdpa_supports(spec, n) == reason


def test_sdpa_called_all_the_same_raises_the_reason() -> None:
    x = values(CASES["soft cap"], EVEN)
    with pytest.raises(LoweringError, match=r"torch\.sdpa: the score is not the scaled product"):
        sdpa_forward(CASES["soft cap"].spec(), *x[:3], (), ())


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import pathlib, re, sys, torch
from sympy import tanh
from rewriter.op import attention
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import k, q, s

spec = SoftmaxSpec(score=50 * tanh(s / 50), mask=k <= q)
grad, length = sys.argv[1] == "grad", int(sys.argv[2])

def inputs(n):
    return [torch.randn(1, 8, n, 64, requires_grad=grad) for _ in range(3)]

def run(x):
    out = attention(*x, (), (), spec, sys.argv[3])
    if grad:
        out.sum().backward()

def peak():  # of this process alone: ru_maxrss begins with that of the parent
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

run(inputs(64))
x = inputs(length)
rest = [torch.ones_like(y) for y in (*x, x[0])]  # as much as the gradients and the output
before = peak()
del rest
run(x)
print(peak() - before)
"""


def _extra_memory(mode: str, length: int, target: str) -> int:
    """Bytes at the peak of one call, besides inputs, output and gradients."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, mode, str(length), target],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@linux
@pytest.mark.parametrize(("mode", "length"), [("forward", 8192), ("grad", 4096)])
def test_a_soft_capped_call_stays_far_below_its_scores(mode: str, length: int) -> None:
    assert _extra_memory(mode, length, "auto") < 8 * length * length * 4 / 8


@linux
def test_the_measure_of_memory_sees_a_tensor_of_all_scores() -> None:
    assert _extra_memory("forward", 1024, "reference") > 8 * 1024 * 1024 * 4


def test_a_call_keeps_no_tensor_of_all_scores() -> None:
    """Neither in the forward of many blocks nor in the workspaces."""
    x = values(CASES["causal"], Dims(batch=1, heads=8, kv_heads=8, q_len=1024, kv_len=1024))
    call = Call(CASES["causal"].spec(), *x[:3], (), ())
    call.forward()
    assert max(w.numel() for w in call.workspaces.values()) <= 8 * 128 * 1024
