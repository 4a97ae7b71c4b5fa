"""Eager attention beside the torch lowerings on a CPU, as ratios within one run.

    python benchmarks/cpu_attention.py [--lengths 128,512,2048] [--grad] [--dtype bfloat16]

Eager is what a model does: scores, bias and mask (both ready before the clock starts, as models
share them between layers), softmax, product. `x 3.0` means three times as fast as eager. The last
lines are decoding: the time of one call with a single query row, in microseconds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import sympy
import torch
from sympy import Float, Ne, Symbol, tanh
from torch import Tensor

from rewriter.errors import LoweringError
from rewriter.evaluate import evaluate, index_values
from rewriter.op import attention
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import Maximum, Minimum, Read, b, h, k, q, s

HEADS, DIM = 8, 64


@dataclass(frozen=True)
class Case:
    """A named spec, and the tensors that it reads."""

    name: str
    spec: SoftmaxSpec
    tensors: Callable[[int], list[Tensor]] = lambda n: []
    kv_heads: int = HEADS


def _read(name: str, *index: sympy.Expr) -> sympy.Expr:
    return Read(Symbol(name), *index)


def _spec(score: sympy.Expr = s, mask: sympy.Basic = sympy.true, **more: object) -> SoftmaxSpec:
    return SoftmaxSpec(scale=Float(DIM**-0.5), score=score, mask=mask, **more)  # type: ignore[arg-type]


def _pad(n: int) -> Tensor:
    pad = torch.ones(1, n, dtype=torch.bool)
    pad[:, n - n // 8 :] = False
    return pad


_SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
_PAD = TensorArg("pad", "bool", 2)
_SLOPE = TensorArg("slope", "float32", 1)
_TABLE = TensorArg("table", "float32", 2)
_SINKS = TensorArg("sinks", "float32", 1)
_CAUSAL = k <= q
_SEEN = Ne(_read("pad", b, k), 0)
_DISTANCE = Minimum(Maximum(k - q, -128), 127) + 128

CASES = (
    Case("plain", _spec()),
    Case("causal", _spec(mask=_CAUSAL)),
    Case("key padding", _spec(mask=_SEEN, tensors=(_PAD,)), lambda n: [_pad(n)]),
    Case(
        "causal, padding, GQA 8/2",
        _spec(mask=_CAUSAL & _SEEN, tensors=(_PAD,)),
        lambda n: [_pad(n)],
        2,
    ),
    Case("causal, soft cap", _spec(50 * tanh(s / 50), _CAUSAL)),
    Case(
        "causal, ALiBi",
        _spec(s + _read("slope", h) * (k - q), _CAUSAL, tensors=(_SLOPE,)),
        lambda n: [_SLOPES],
    ),
    Case(
        "relative table, padding",
        _spec(s + _read("table", _DISTANCE, h), _SEEN, tensors=(_TABLE, _PAD)),
        lambda n: [torch.randn(256, HEADS), _pad(n)],
    ),
    Case("window 256", _spec(mask=_CAUSAL & (k > q - 256))),
    Case(
        "window 256, sink",
        _spec(mask=_CAUSAL & (k > q - 256), sink=_read("sinks", h), tensors=(_SINKS,)),
        lambda n: [torch.zeros(HEADS)],
    ),
)


def eager(
    case: Case, q_: Tensor, k_: Tensor, v_: Tensor, tensors: list[Tensor]
) -> Callable[[], Tensor]:
    """The attention as a model writes it, bias and mask computed beforehand."""
    spec = case.spec
    (batch, heads, length, _), keys = q_.shape, k_.shape[2]
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, length, keys, (), q_.device)
    mask = evaluate(spec.mask, values, named, q_.dtype)
    bias = evaluate(spec.score - s, values, named, q_.dtype) if spec.bias is not None else None
    sink = None if spec.sink is None else evaluate(spec.sink, values, named, q_.dtype)
    additive = bias if isinstance(bias, Tensor) else None
    lowest = torch.finfo(q_.dtype).min
    if isinstance(mask, Tensor):
        hidden = torch.zeros(mask.shape, dtype=q_.dtype).masked_fill(~mask, lowest)
        additive = hidden if additive is None else (additive + hidden).clamp(min=lowest)
    scale, capped = float(spec.scale), spec.bias is None
    groups = heads // k_.shape[1]

    def run() -> Tensor:
        keys, values = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k_, v_))
        scores = torch.matmul(q_, keys.mT) * scale
        if capped:
            scores = 50.0 * torch.tanh(scores / 50.0)
        if additive is not None:
            scores = scores + additive
        if isinstance(sink, Tensor):
            column = sink.to(q_.dtype).expand(batch, heads, length, 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return weights @ values

    return run


def best_us(function: Callable[[], object], budget_s: float = 0.6) -> float:
    """The fastest run in microseconds, within a budget of time.

    With one thread the clock counts the time of this process, so that other work on the machine
    matters less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    best, end = math.inf, time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = clock()
        function()
        best = min(best, clock() - start)
    return best * 1e6


def measure(case: Case, q_len: int, kv_len: int, dtype: torch.dtype, grad: bool) -> list[str]:
    """One line of the table: eager in microseconds, and the lowerings as ratios to it."""
    torch.manual_seed(0)
    heads = (HEADS, case.kv_heads, case.kv_heads)
    q_, k_, v_ = (
        torch.randn(1, n, length, DIM, dtype=dtype, requires_grad=grad)
        for n, length in zip(heads, (q_len, kv_len, kv_len), strict=True)
    )
    tensors = case.tensors(kv_len)

    def timed(function: Callable[[], Tensor]) -> float:
        if not grad:
            with torch.no_grad():
                return best_us(function)
        return best_us(lambda: torch.autograd.grad(function().sum(), (q_, k_, v_)))

    base = timed(eager(case, q_, k_, v_, tensors))
    found = [case.name, f"{q_len} x {kv_len}", f"{base:.0f}"]
    for target in ("torch.blocked", "torch.sdpa"):
        run = partial(attention, q_, k_, v_, tensors, (), case.spec, target)
        try:
            time_us = timed(run)
        except LoweringError:
            found.append("declines")
            continue
        found.append(f"{time_us:.0f} us" if q_len == 1 else f"x {base / time_us:.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="128,512,2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--grad", action="store_true", help="forward and backward")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    lengths = [(int(n), int(n)) for n in options.lengths.split(",")]
    shapes = lengths if options.grad else [*lengths, (1, 1024)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype},")
    print(f"{HEADS} heads, head dim {DIM}, {'forward + backward' if options.grad else 'forward'}")
    print(f"{'case':26s}{'L x M':>13s}{'eager us':>11s}{'blocked':>11s}{'sdpa':>11s}")
    for case in CASES:
        if options.only not in case.name:
            continue
        for q_len, kv_len in shapes:
            line = measure(case, q_len, kv_len, dtype, options.grad)
            print(f"{line[0]:26s}{line[1]:>13s}{line[2]:>11s}{line[3]:>11s}{line[4]:>11s}")


if __name__ == "__main__":
    main()
