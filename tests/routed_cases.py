"""The specs of routed attention with which `families_worker` runs the generated kernel, the calls
that it compares with the reference, and the kernels that it compiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy import Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Route
from rewriter.symbols import L, M, Read, b, h, k, q, s

HEADS, KV_HEADS = 2, 1
SCALE = sympy.Float(0.25)
CAUSAL = k <= q + M - L
SEEN = sympy.Ne(Read(Symbol("pad"), b, k), 0)
PAD = (TensorArg("pad", "bool", 2),)
BUCKET = sym.Trunc(sympy.log(1.0 + sympy.Abs(k - q)) * 3)


def moba(topk: int, block: int, **more: Any) -> SoftmaxSpec:
    route = Route("query", topk, block, dense_below=more.pop("dense_below", 0))
    return SoftmaxSpec(**{"scale": SCALE, "mask": CAUSAL, "route": route, **more})


def regions(grid: tuple[int, int], count: int, extra: int, **more: Any) -> SoftmaxSpec:
    dense = more.pop("dense_below", 0)
    route = Route("region", 2, grid=grid, regions=count, extra=extra, dense_below=dense)
    return SoftmaxSpec(scale=SCALE, route=route, **more)


SPECS: dict[str, SoftmaxSpec] = {
    "top-1": moba(1, 5),
    "top-3": moba(3, 8),
    "long-blocks": moba(2, 20, dense_below=12),
    "both-sides": moba(2, 6, mask=sympy.true),
    "padding": moba(2, 6, mask=CAUSAL & SEEN, tensors=PAD),
    "padding-of-a-head": moba(2, 6, mask=CAUSAL & (SEEN | (h < 1)), tensors=PAD),
    "cap-sink-gate": moba(
        2, 8, score=5 * sympy.tanh(s / 5), sink=Read(Symbol("sink"), h), heads=1 + h,
        tensors=(TensorArg("sink", "float32", 1),),
    ),
    "bias": moba(
        2, 8, mask=CAUSAL & SEEN, dense_below=10,
        score=s + Read(Symbol("table"), BUCKET, h) + Read(Symbol("chosen"), h) * (k - q),
        tensors=(*PAD, TensorArg("table", "float32", 2), TensorArg("chosen", "float32", 1)),
    ),
    "grid": regions((6, 6), 3, 1),
    "uneven-grid": regions((5, 7), 2, 0, heads=Read(Symbol("gate"), b, h, q),
                           tensors=(TensorArg("gate", "float32", 3),)),
    "padded-grid": regions((6, 6), 2, 6, mask=SEEN, dense_below=20, tensors=PAD),
}  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of the kernel."""

    spec: str
    q_len: int
    kv_len: int
    dtype: str = "float32"
    masked: str = "zero"
    hidden: str = "left"
    strided: bool = False

    @property
    def name(self) -> str:
        extra = [self.masked, self.hidden, "BLHD" if self.strided else ""]
        sizes = f"L{self.q_len}-M{self.kv_len}"
        return "-".join([self.spec, sizes, self.dtype, *(x for x in extra if x)])


CASES = (
    Case("top-1", 37, 37),
    Case("top-3", 48, 48, "float16", strided=True),
    *(Case("top-3", *sizes) for sizes in ((1, 45), (20, 61))),
    Case("long-blocks", 70, 70),
    Case("both-sides", 20, 33),
    Case("padding", 37, 37, masked="nan"),
    Case("padding", 37, 37, masked="mean", hidden="all"),
    Case("padding-of-a-head", 30, 30, hidden="middle"),
    Case("cap-sink-gate", 30, 40),
    Case("bias", 40, 40, "float16", hidden="right"),
    Case("grid", 37, 37),
    Case("uneven-grid", 35, 35, "float16"),
    Case("padded-grid", 42, 42, hidden="most"),
    Case("padded-grid", 42, 42, masked="mean", hidden="all"),
)


def tensors_for(spec: SoftmaxSpec, case: Case) -> list[Tensor]:
    """Values for every tensor of a named spec; `most` hides so many keys that no block is left
    out, and some of the first sequence."""
    pad = torch.ones(2, case.kv_len, dtype=torch.bool)
    third = case.kv_len // 3
    hidden = {
        "left": slice(0, third), "middle": slice(third, -third), "right": slice(-third, None),
        "all": slice(0, None), "most": slice(0, -15),
    }  # fmt: skip
    pad[1, hidden[case.hidden]] = False
    pad[0, 3:7] = case.hidden != "most"
    made = {
        "pad": pad,
        "sink": torch.randn(HEADS),
        "table": torch.randn(32, HEADS),
        "chosen": torch.rand(HEADS) * 0.1,
        "gate": torch.rand(1, HEADS, case.q_len),
    }
    return [made[t.name] for t in spec.tensors]


def run(case: Case) -> dict[str, Any]:
    """Errors of the kernel and of the reference in the same dtype, against float64; and how much
    the route hides."""
    from rewriter.kernels import triton_routed
    from rewriter.kernels.triton_codegen import Tile

    triton_routed.tile_for = lambda *_: Tile(32, 16, 4, 1)
    triton_routed._PRODUCTS = 400  # the selection goes through more than one part
    torch.manual_seed(0)
    spec = replace(SPECS[case.spec], masked=case.masked)  # type: ignore[arg-type]
    batch = 2 if PAD[0] in spec.tensors else 1
    lengths = ((HEADS, case.q_len), (KV_HEADS, case.kv_len), (KV_HEADS, case.kv_len))
    x = [
        torch.randn(batch, *n, d).to(getattr(torch, case.dtype))
        for n, d in zip(lengths, (16, 16, 12), strict=True)
    ]
    if case.strided:
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    tensors = tensors_for(spec, case)
    gold = reference(spec, *(t.double() for t in x), tensors, [])
    whole = reference(replace(spec, route=None), *(t.double() for t in x), tensors, [])
    out = triton_routed.forward(spec, *x, tensors, [])
    own = reference(spec, *x, tensors, [])
    return {
        "error": _distance(out, gold),
        "reference_error": _distance(own, gold),
        "floor": torch.finfo(x[0].dtype).eps * float(gold.nan_to_num().abs().max()),
        "nans": [int(out.isnan().sum()), int(gold.isnan().sum())],
        "routed": _distance(whole, gold),
    }


def _distance(x: Tensor, gold: Tensor) -> float:
    same = (x == gold) | (x.isnan() & gold.isnan())
    return float(torch.where(same, 0.0, (x - gold).abs()).nan_to_num(torch.inf).max())


def remembered() -> float:
    """A prompt and single tokens with the sums of blocks kept beside the cache: the largest
    distance from one call over all of them."""
    from rewriter.beside import beside
    from rewriter.kernels import triton_routed

    spec, past, rows = SPECS["top-3"], None, []
    x = [torch.randn(1, heads, 45, 16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    with torch.no_grad():
        for start, stop in ((0, 40), (40, 41), (41, 45)):
            full = x[1][:, :, :stop].clone()
            now = [x[0][:, :, start:stop], full, x[2][:, :, :stop]]
            rows.append(triton_routed.forward(spec, *now, [], [], beside(full, past, ("site",))))
            past = full
    return float((torch.cat(rows, dim=2) - reference(spec, *x)).abs().max())


# --- resources ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The kernel of one spec for one GPU."""

    spec: SoftmaxSpec
    title: str
    dim: int
    capability: int

    @property
    def name(self) -> str:
        return f"{self.title}-D{self.dim}-sm{self.capability}"


BUILDS = (
    Build(moba(3, 512), "moba", 64, 80),
    Build(regions((56, 56), 7, 1), "regions", 64, 90),
)


def build(case: Build) -> dict[str, Any]:
    """What the kernel takes, in bfloat16."""
    from rewriter.kernels.triton_routed import _kernel
    from rewriter.kernels.triton_routed_code import KERNEL, routed_source
    from rewriter.kernels.triton_source import compile_function

    kernel = _kernel(case.spec, case.dim, case.dim, torch.bfloat16, 1024, case.capability)
    dtypes = dict.fromkeys("qkvo", "bfloat16") | {"chosen": "uint8"}
    dtypes |= dict.fromkeys(("first", "block", "place", "row"), "int32")
    dtypes |= {f"t:{t.name}": t.dtype for t in kernel.base.lowered[0].tensors}
    return vars(compile_function(routed_source(kernel), KERNEL, dtypes, case.capability))
