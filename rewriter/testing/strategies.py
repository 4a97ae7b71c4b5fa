"""Random honest specs with the shapes, dtypes and memory layouts to run them at, for Hypothesis.

`specs()` draws cases of the conformance suite (`rewriter.testing.cases.Case`) whose spec is put
together from parts that mean something: masks, biases, caps, sinks, gates. What is drawn is always
a fair question to every implementation that says it takes the spec. `modules()`, which writes
attention as torch code, stands in `rewriter.testing.modules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import sympy
import torch
from hypothesis import strategies as st
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.reference import mask_of
from rewriter.spec import MASKED, SoftmaxSpec, TensorArg
from rewriter.symbols import H, IDiv, IMod, L, M, Maximum, Minimum, Read, Where, b, h, k, q
from rewriter.testing.cases import LAYOUTS, Case, Dims, Hidden
from rewriter.testing.modules import Drawn, modules
from rewriter.testing.operands import operands

__all__ = ["Drawn", "features", "modules", "specs"]

_HIDDEN: tuple[Hidden, ...] = ("right", "left", "all")
_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LENGTHS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 65, 70)


@dataclass
class _Reads:
    """The tensors that the parts drawn so far read."""

    names: dict[str, TensorArg] = field(default_factory=dict)
    sizes: set[str] = field(default_factory=set)

    def __call__(self, name: str, *index: Any, dtype: str = "float32") -> Expr:
        self.names.setdefault(name, TensorArg(name, dtype, len(index)))
        return cast(Expr, Read(Symbol(name), *index))

    def past(self) -> Symbol:
        self.sizes.add("past")
        return sym.size_symbol("past")


Mask = Callable[[_Reads, int], Boolean]
Bias = Callable[[_Reads, int], Expr]
Value = Callable[[_Reads], Expr]

place = q + M - L
"""Where a query stands on the axis of the keys, if the last query sees the last key."""

MASKS: dict[str, Mask] = {
    "causal": lambda r, n: place >= k,
    "causal from the start": lambda r, n: k <= q,
    "causal behind a cache": lambda r, n: k <= q + r.past(),
    "anti-causal": lambda r, n: k >= place,
    "strictly causal": lambda r, n: k < place,
    "window": lambda r, n: place - k < n,
    "two-sided window": lambda r, n: sympy.Abs(k - place) <= n,
    "padding": lambda r, n: sympy.Ne(r("pad", b, k, dtype="bool"), 0),
    "not padding": lambda r, n: sympy.Eq(r("pad", b, k, dtype="bool"), 0),
    "prefix": lambda r, n: (place >= k) | (k < n),
    "prefix of each sequence": lambda r, n: (place >= k) | (k < r("first", b, dtype="int64")),
    "window and first keys": lambda r, n: (place - k < n) | (k < 2),
    "documents": lambda r, n: sympy.Eq(
        r("document", b, Minimum(Maximum(place, 0), M - 1), dtype="int64"),
        r("document", b, k, dtype="int64"),
    ),
    "chunks": lambda r, n: sympy.Eq(IDiv(k, n), IDiv(q, n)),
    "dilated": lambda r, n: sympy.Eq(IMod(q - k, 2), 0),
    "one head sees all": lambda r, n: (k <= q) | (h >= H - 1),
    "every second head": lambda r, n: (place >= k) | sympy.Eq(IMod(h, 2), 0),
    "first keys hidden": lambda r, n: k >= n,
    "last keys hidden": lambda r, n: k < M - n,
    "rows hidden": lambda r, n: q >= n,
}

BIASES: dict[str, Bias] = {
    "alibi": lambda r, n: r("slope", h) * (k - place),
    "symmetric alibi": lambda r, n: -r("slope", h) * sympy.Abs(k - place) / 8,
    "number alibi": lambda r, n: Float(2.0) ** (-h - 1) * (k - q),
    "table": lambda r, n: r("table", Minimum(Maximum(k - q, -15), 15) + 15, h),
    "table from the end": lambda r, n: r("wrapped", Minimum(Maximum(k - q, -4), 4), h),
    "two tables": lambda r, n: r("row_table", IDiv(q, n), h) + r("column_table", IMod(k, n), h),
    "bias of the key": lambda r, n: r("keys", b, k),
    "bias of the row": lambda r, n: r("queries", b, h, q),
    "whole bias": lambda r, n: r("bias", 0, h, q, k),
    "bias of key blocks": lambda r, n: r("blocks", b, h, q, IDiv(k, n)),
    "soft mask": lambda r, n: Where(k <= q, 0, -10000.0),
    "distance": lambda r, n: -sympy.log(1 + sympy.Abs(k - q)),
    "sine": lambda r, n: sympy.sin((k - q) / Integer(n)) * r("slope", h),
    "product of reads": lambda r, n: r("slope", h) * r("keys", b, k),
}

SCALES: dict[str, Value] = {
    "of the dim": lambda r: Integer(1),
    "of each head": lambda r: r("temperature", h),
    "of each sequence": lambda r: 1 + r("warm", b) ** 2 / 8,
    "of the length": lambda r: 8 / (M + 7),
    "exponential": lambda r: sympy.exp(r("log_scale", h) / 4),
    "half": lambda r: Float(0.5),
    "negative": lambda r: Integer(-1),
}
SINKS: dict[str, Value] = {
    "of each head": lambda r: r("sink", h),
    "of each row": lambda r: r("row_sink", b, h, q),
    "one more": lambda r: Integer(0),
    "number": lambda r: Float(1.5),
}
HEADS: dict[str, Value] = {
    "gate": lambda r: r("gate", b, h, q),
    "factor": lambda r: r("factor", h),
    "number": lambda r: Float(0.5),
    "one head off": lambda r: Where(h > 0, 1, 0),
}
SCORES: dict[str, Callable[[_Reads, Expr], Expr]] = {
    "as it is": lambda r, x: x,
    "soft cap": lambda r, x: 5 * sympy.tanh(x / 5),
    "large soft cap": lambda r, x: 50 * sympy.tanh(x / 50),
    "cap of each head": lambda r, x: (1 + r("cap", h) ** 2) * sympy.tanh(x),
    "clamped": lambda r, x: Minimum(Maximum(x, -2), 2),
    "squared": lambda r, x: Minimum(x**2 / 4, 20),
    "bounded": lambda r, x: 4 / (1 + sympy.exp(-Minimum(Maximum(x, -20), 20))),
    "longer rows sharper": lambda r, x: x * sympy.log(q + 2),
}


@st.composite
def specs(draw: st.DrawFn) -> Case:
    """One spec and how to call it; `features` says what was drawn."""

    def part(table: dict[str, Any], often: int) -> tuple[str, Any] | None:
        """One of a table, or nothing in `often` of `often + 1` draws or so."""
        if draw(st.integers(0, often)):
            return None
        name = draw(st.sampled_from(sorted(table)))
        return name, table[name]

    reads, said = _Reads(), list[str]()
    width = draw(st.sampled_from((1, 2, 3, 4, 7, 16)))
    dims = draw(_dims())
    scale = SoftmaxSpec().scale * Float(dims.head_dim**-0.5)
    if (found := part(SCALES, 1)) is not None:
        said.append(f"scale: {found[0]}")
        scale = scale * found[1](reads)

    score: Expr = sym.s
    before, shape, after = part(BIASES, 4), part(SCORES, 1), part(BIASES, 1)
    if before is not None:
        said.append(f"bias: {before[0]}")
        score = score + before[1](reads, width)
    if shape is not None:
        said.append(f"score: {shape[0]}")
        score = shape[1](reads, score)
    if after is not None and after != before:
        said.append(f"bias: {after[0]}")
        score = score + after[1](reads, width)

    mask: Boolean = sympy.true
    for name in draw(st.lists(st.sampled_from(sorted(MASKS)), max_size=3, unique=True)):
        said.append(f"mask: {name}")
        mask = cast(Boolean, sympy.And(mask, MASKS[name](reads, width)))
    sink, gate = part(SINKS, 3), part(HEADS, 3)
    said += [f"sink: {sink[0]}"] if sink else []
    said += [f"heads: {gate[0]}"] if gate else []
    masked = draw(st.sampled_from(MASKED))
    spec = SoftmaxSpec(
        scale=scale,
        score=score,
        mask=mask,
        masked=masked if sink is None else "zero",
        sink=sink[1](reads) if sink else None,
        heads=gate[1](reads) if gate else Integer(1),
        tensors=tuple(reads.names.values()),
        sizes=tuple(reads.sizes),
    ).without_unused()
    logits = draw(st.sampled_from((0.1, 1.0, 1.0, 1.0, 8.0, 1e4)))
    if sym.reads(scale) or any("of each head" in x for x in said if "score" in x):
        logits = min(logits, 1.0)  # a factor's gradient is a sum of terms as large as the scores
    case = Case(
        "; ".join(said) or "plain",
        spec,
        dims,
        dtype=draw(st.sampled_from(_DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        hidden=draw(st.sampled_from(_HIDDEN)),
        logits=logits,
        seed=draw(st.integers(0, 2**16)),
    )
    if spec.masked == "nan" and not _sees_a_key(case):
        return replace(case, spec=replace(spec, masked="mean"))  # NaN alone compares with nothing
    return case


def _sees_a_key(case: Case) -> bool:
    """Some query sees a key."""
    d, x = case.dims, operands(case)
    sizes: dict[str, Any] = {"q_len": d.q_len, "kv_len": d.kv_len}
    seen = mask_of(
        case.softmax, batch=d.batch, heads=d.heads, tensors=x.tensors, sizes=x.sizes, **sizes
    )
    return bool(seen.any())


@st.composite
def _dims(draw: st.DrawFn) -> Dims:
    def one_of(*values: int) -> int:
        return draw(st.sampled_from(values))

    kv_heads = one_of(1, 1, 2, 3)
    q_len = one_of(*_LENGTHS)
    shape: Literal["same", "cache", "free"] = draw(st.sampled_from(("same", "cache", "free")))
    kv_len = {"same": q_len, "cache": q_len + one_of(1, 3, 20), "free": one_of(*_LENGTHS)}[shape]
    head_dim = one_of(1, 2, 4, 8, 16, 24)
    value_dim = one_of(head_dim, head_dim, 3, 12)
    group = one_of(1, 1, 2, 3, 8) if kv_heads < 3 else one_of(1, 2)
    return Dims(one_of(1, 2, 3), kv_heads * group, kv_heads, q_len, kv_len, head_dim, value_dim)


def features(case: Case) -> list[str]:
    """What a case has, in words: for counting that many different things are drawn."""
    spec, d = case.softmax, case.dims
    lengths = "=" if d.q_len == d.kv_len else "<" if d.q_len < d.kv_len else ">"
    found = [*case.name.split("; "), f"dtype: {str(case.dtype).removeprefix('torch.')}"]
    found += [
        f"layout: {case.layout}",
        f"group: {d.heads // d.kv_heads}",
        f"lengths: L {lengths} M",
    ]
    found += [f"masks: {case.name.count('mask: ')}", f"scores of ±{case.logits:g}"]
    found += [f"masked: {spec.masked}"] if not spec.is_unmasked else []
    found += ["one query"] if d.q_len == 1 else []
    found += ["values of another dim"] if d.value_dim != d.head_dim else []
    found += ["reads a whole L x M tensor"] if spec.opaque_reads() else []
    return found
