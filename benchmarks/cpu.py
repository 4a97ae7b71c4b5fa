"""Attention on a CPU: what `optimize` chooses beside eager, SDPA, FlexAttention and torch.compile.

    python benchmarks/cpu.py                              forward; writes nothing
    python benchmarks/cpu.py --grad                       forward and backward
    python benchmarks/cpu.py --memory 8192                what a training step needs, soft-capped
    python benchmarks/cpu.py --json FILE                  the rows, with versions and threads

Eager is what a model does: scores, bias and mask (both ready before the clock starts, as models
share them between layers), softmax, product. SDPA gets bias and mask as one tensor, also ready.
FlexAttention is compiled; it has no backward on a CPU. `x 3.0` means three times as fast as eager.
All columns of a row are timed in turns, so that what else the machine does hits all alike; each
shows its fastest run. The last row of a case is a step of decoding, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sympy
import torch
from sympy import Float, Ne, Symbol, tanh
from torch import Tensor

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
    score_mod: Callable[..., Tensor] | None = None
    """The score as FlexAttention has it, given the tensors: `score_mod(tensors)`."""
    mask_mod: Callable[..., Tensor] | None = None
    is_flex: bool = True
    """FlexAttention has such attention: it has no sinks."""


def _read(name: str, *index: sympy.Expr) -> sympy.Expr:
    return Read(Symbol(name), *index)


def _spec(score: sympy.Expr = s, mask: sympy.Basic = sympy.true, **more: object) -> SoftmaxSpec:
    return SoftmaxSpec(scale=Float(DIM**-0.5), score=score, mask=mask, **more)  # type: ignore[arg-type]


def _pad(n: int) -> Tensor:
    pad = torch.ones(1, n, dtype=torch.bool)
    pad[:, n - n // 8 :] = False
    return pad


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


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
    Case("causal", _spec(mask=_CAUSAL), mask_mod=lambda _: _causal),
    Case(
        "key padding",
        _spec(mask=_SEEN, tensors=(_PAD,)),
        lambda n: [_pad(n)],
        mask_mod=lambda t: lambda b, h, q, k: t[0][b, k],
    ),
    Case(
        "causal, padding, GQA 8/2",
        _spec(mask=_CAUSAL & _SEEN, tensors=(_PAD,)),
        lambda n: [_pad(n)],
        2,
        mask_mod=lambda t: lambda b, h, q, k: (k <= q) & t[0][b, k],
    ),
    Case(
        "causal, soft cap",
        _spec(50 * tanh(s / 50), _CAUSAL),
        score_mod=lambda _: lambda s, b, h, q, k: 50.0 * torch.tanh(s / 50.0),
        mask_mod=lambda _: _causal,
    ),
    Case(
        "causal, ALiBi",
        _spec(s + _read("slope", h) * (k - q), _CAUSAL, tensors=(_SLOPE,)),
        lambda n: [_SLOPES],
        score_mod=lambda t: lambda s, b, h, q, k: s + t[0][h] * (k - q),
        mask_mod=lambda _: _causal,
    ),
    Case(
        "relative table, padding",
        _spec(s + _read("table", _DISTANCE, h), _SEEN, tensors=(_TABLE, _PAD)),
        lambda n: [torch.randn(256, HEADS), _pad(n)],
        score_mod=lambda t: lambda s, b, h, q, k: s + t[0][(k - q).clamp(-128, 127) + 128, h],
        mask_mod=lambda t: lambda b, h, q, k: t[1][b, k],
    ),
    Case(
        "window 256",
        _spec(mask=_CAUSAL & (k > q - 256)),
        mask_mod=lambda _: lambda b, h, q, k: (k <= q) & (k > q - 256),
    ),
    Case(
        "window 256, sink",
        _spec(mask=_CAUSAL & (k > q - 256), sink=_read("sinks", h), tensors=(_SINKS,)),
        lambda n: [torch.zeros(HEADS)],
        is_flex=False,
    ),
)


# --- the columns ----------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor, Tensor]


def eager(case: Case, inputs: Inputs, tensors: list[Tensor]) -> Callable[[], Tensor]:
    """The attention as a model writes it, bias and mask computed beforehand."""
    spec, (q_, k_, v_) = case.spec, inputs
    batch, heads, length, _ = q_.shape
    additive, sink = _additive(case, inputs, tensors)
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


def _additive(case: Case, inputs: Inputs, tensors: list[Tensor]) -> tuple[Tensor | None, object]:
    """Bias and mask as one tensor that is added, and the sink."""
    spec, (q_, k_, _) = case.spec, inputs
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, *q_.shape[:3], k_.shape[2], (), q_.device)
    mask = evaluate(spec.mask, values, named, q_.dtype)
    bias = evaluate(spec.score - s, values, named, q_.dtype) if spec.bias is not None else None
    sink = None if spec.sink is None else evaluate(spec.sink, values, named, q_.dtype)
    additive = bias if isinstance(bias, Tensor) else None
    lowest = torch.finfo(q_.dtype).min
    if isinstance(mask, Tensor):
        hidden = torch.zeros(mask.shape, dtype=q_.dtype).masked_fill(~mask, lowest)
        additive = hidden if additive is None else (additive + hidden).clamp(min=lowest)
    return additive, sink


def compiled(case: Case, inputs: Inputs, tensors: list[Tensor]) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    return torch.compile(eager(case, inputs, tensors))  # type: ignore[no-any-return]


def sdpa(case: Case, inputs: Inputs, tensors: list[Tensor]) -> Callable[[], Tensor] | None:
    """None where SDPA cannot compute it."""
    additive, sink = _additive(case, inputs, tensors)
    if sink is not None or case.spec.bias is None:
        return None
    causal = case.spec.mask == _CAUSAL and case.spec.is_plain_score
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = None if causal or additive is None else additive
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    if causal and inputs[0].shape[2] != inputs[1].shape[2]:
        causal, mask = False, additive
    return partial(attend, *inputs, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def flex(case: Case, inputs: Inputs, tensors: list[Tensor]) -> Callable[[], Tensor] | None:
    """None where FlexAttention cannot compute it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q_, k_, v_ = inputs
    if not case.is_flex or q_.requires_grad or q_.shape[2] == 1:
        return None
    torch._dynamo.reset()
    mask = None
    if case.mask_mod is not None:
        sizes = (1, None, q_.shape[2], k_.shape[2])
        mask = create_block_mask(case.mask_mod(tensors), *sizes, device="cpu")
    score_mod = None if case.score_mod is None else case.score_mod(tensors)
    return partial(
        torch.compile(flex_attention),
        q_,
        k_,
        v_,
        score_mod,
        mask,
        enable_gqa=case.kv_heads != HEADS,
    )


def ours(case: Case, inputs: Inputs, tensors: list[Tensor]) -> Callable[[], Tensor]:
    return partial(attention, *inputs, tensors, (), case.spec)


COLUMNS = {"eager": eager, "ours": ours, "sdpa": sdpa, "flex": flex, "compiled": compiled}


# --- the clock ------------------------------------------------------------------------------------


def best_s(functions: dict[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    """The fastest run of each, in turns, within a budget of time for each."""
    best = dict.fromkeys(functions, math.inf)
    end = time.perf_counter() + budget_s * len(functions)
    while time.perf_counter() < end or math.inf in best.values():
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(
    case: Case, q_len: int, kv_len: int, dtype: torch.dtype, grad: bool, budget_s: float
) -> dict[str, object]:
    """One row: seconds by column, the time of the first call by column, the error of ours."""
    torch.manual_seed(0)
    heads = (HEADS, case.kv_heads, case.kv_heads)
    inputs = tuple(
        torch.randn(1, n, length, DIM, dtype=dtype, requires_grad=grad)
        for n, length in zip(heads, (q_len, kv_len, kv_len), strict=True)
    )
    tensors, ready, first = case.tensors(kv_len), {}, {}
    wanted: Tensor | None = None
    for name, build in COLUMNS.items():
        function = build(case, inputs, tensors)  # type: ignore[arg-type]
        if function is None:
            continue
        timed = partial(_step, function, inputs, grad)
        start = time.perf_counter()
        result = timed()
        first[name] = time.perf_counter() - start
        ready[name] = timed
        wanted = result if wanted is None else wanted
        error = float((result - wanted).abs().max())
        assert error < 0.05, f"{name} differs from eager by {error}"
    seconds = best_s(ready, budget_s)
    row = {"case": case.name, "q_len": q_len, "kv_len": kv_len}
    return row | {"seconds": seconds, "first_call_s": first}


def _step(function: Callable[[], Tensor], inputs: Inputs, grad: bool) -> Tensor:
    if not grad:
        with torch.no_grad():
            return function()
    return torch.autograd.grad(function().sum(), inputs)[0]


# --- memory ---------------------------------------------------------------------------------------


def peak_mib(column: str, length: int) -> float:
    """What forward and backward of the soft-capped case add to the memory of a process."""
    command = [sys.executable, __file__, "--peak", column, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak(column: str, length: int) -> float:
    case = next(c for c in CASES if c.name == "causal, soft cap")
    inputs = tuple(torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3))
    small = tuple(torch.randn(1, HEADS, 64, DIM, requires_grad=True) for _ in range(3))
    _step(COLUMNS[column](case, small, []), small, True)  # type: ignore[arg-type, misc]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 1024
    _step(COLUMNS[column](case, inputs, []), inputs, True)  # type: ignore[arg-type, misc]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# --- printing -------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.peak:
        print(_peak(options.peak[0], int(options.peak[1])))
        return
    dtype, rows = getattr(torch, options.dtype), []
    lengths = [(int(n), int(n)) for n in options.lengths.split(",")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype},")
    print(f"{HEADS} heads, head dim {DIM}, {'forward + backward' if options.grad else 'forward'}")
    print(f"{'case':26s}{'L x M':>13s}" + "".join(f"{n:>11s}" for n in COLUMNS))
    for case in (c for c in CASES if options.only in c.name):
        for q_len, kv_len in lengths if options.grad else [*lengths, (1, 1024)]:
            row = measure(case, q_len, kv_len, dtype, options.grad, options.budget)
            rows.append(row)
            print(_line(row), flush=True)
    found: dict[str, object] = {"rows": rows, "dtype": options.dtype, "grad": options.grad}
    if options.memory:
        length = options.memory
        found["memory_mib"] = {n: peak_mib(n, length) for n in ("ours", "eager")}
        print(f"forward and backward of {length} soft-capped tokens, MiB: {found['memory_mib']}")
    if options.json:
        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        found["command"] = " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]])
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="128,512,2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--grad", action="store_true", help="forward and backward")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds a cell")
    parser.add_argument("--memory", type=int, default=0, help="tokens of the memory test")
    parser.add_argument("--json", default="")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _line(row: dict[str, object]) -> str:
    seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
    cells = []
    for name in COLUMNS:
        if name not in seconds:
            cells.append("-")
        elif name == "eager" or row["q_len"] == 1:
            cells.append(f"{1e6 * seconds[name]:.0f} us")
        else:
            cells.append(f"x {seconds['eager'] / seconds[name]:.1f}")
    size = f"{row['q_len']} x {row['kv_len']}"
    return f"{row['case']:26s}{size:>13s}" + "".join(f"{c:>11s}" for c in cells)


if __name__ == "__main__":
    main()
