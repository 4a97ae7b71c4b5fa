"""The specs of linear attention with which `families_worker` runs the generated kernels, the calls
that it compares with the reference, and the kernels that it compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Float, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.linear import Features, LinearSpec, Map
from rewriter.passes.decay import RULES, decay_of
from rewriter.reference import reference
from rewriter.spec import TensorArg
from rewriter.symbols import L, M, Read, b, h, k, q

POSITION = q + M - L
SEEN = sympy.Ne(Read(Symbol("pad"), b, k), 0)
PAD = (TensorArg("pad", "bool", 2),)
HEADS = 2


def both(map: Map, **more: Any) -> LinearSpec:
    return LinearSpec(Features(map), Features(map), **{"position": POSITION, **more})


def floats(**ranks: int) -> tuple[TensorArg, ...]:
    return tuple(TensorArg(name, "float32", rank) for name, rank in ranks.items())


SPECS: dict[str, LinearSpec] = {
    "plain": both("identity"),
    **{f"rule-{rule}": both("silu", decay=decay_of(rule, HEADS, 1, 4)) for rule in RULES},
    "lightning": both("silu", decay=decay_of("retnet", HEADS, None, 0), norm="rms"),
    "decay-read": both(
        "silu", decay=-Read(Symbol("d"), h), norm="rms", heads=Read(Symbol("gate"), b, h, q),
        tensors=floats(d=1, gate=3),
    ),
    **{f"map-{map}": both(map, norm="sum") for map in ("relu", "elu", "exp")},  # type: ignore[arg-type]
    "matrices": LinearSpec(
        Features("exp", "wq"), Features("exp", "wk", "bk"), POSITION, norm="sum",
        tensors=floats(wq=3, wk=3, bk=2),
    ),
    "everything": LinearSpec(
        Features("elu"), Features("relu"), POSITION, SEEN, decay_of("paper", HEADS, 0, 2),
        query_weight=Read(Symbol("a"), b, h, q), key_weight=Read(Symbol("c"), b, h, k),
        norm="sum", heads=1 + h, tensors=(*PAD, *floats(a=3, c=3)),
    ),
    "shared-padding": both("elu", seen=SEEN, decay=Float(-0.2), norm="sum", tensors=PAD),
    "cross": both("elu", position=None, norm="sum"),
    "cross-halves": both("exp", position=None, seen=SEEN, norm="sum", tensors=PAD),
    "early": both("identity", position=q + sym.size_symbol("first"), decay=Float(-0.1),
                  sizes=("first",)),
}  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of the kernels, in tiles of 16 and spans of 32."""

    spec: str
    shape: tuple[int, int, int, int, int]
    """L, M, D, Dv, and the heads of the keys."""
    dtype: str = "float32"
    hidden: str = "left"
    first: int = 0
    strided: bool = False

    @property
    def name(self) -> str:
        shape = "-".join(f"{n}{x}" for n, x in zip("LMDEK", self.shape, strict=True))
        extra = [self.hidden, f"at{self.first}", "BLHD" if self.strided else ""]
        return "-".join([self.spec, shape, self.dtype, *(x for x in extra if x)])


SHORT = (35, 35, 16, 16, 1)
"""Three tiles, and a span and a bit. There is no bfloat16 among the cases: the interpreter cuts it
off where a GPU rounds."""

CASES = (
    *(Case(f"rule-{rule}", SHORT) for rule in RULES),
    *(Case(f"map-{map}", SHORT) for map in ("relu", "elu")),
    Case("map-exp", (33, 33, 12, 20, 2)),
    *(Case("plain", (n, n, 16, 16, 2)) for n in (1, 32)),
    Case("lightning", (40, 40, 16, 40, 1), strided=True),
    Case("decay-read", (40, 40, 24, 16, 2)),
    *(Case(name, SHORT, "float16") for name in ("lightning", "everything")),
    Case("matrices", (40, 40, 24, 16, 2)),
    *(Case("everything", (40, 40, 12, 16, 1), hidden=side) for side in ("middle", "all")),
    Case("shared-padding", SHORT, hidden="right"),
    Case("cross", (17, 40, 16, 16, 1)),
    Case("cross-halves", (40, 37, 16, 12, 2)),
    # queries after older keys, before the first key, behind the last one
    Case("rule-retnet", (20, 70, 16, 16, 1)),
    *(Case("early", (50, 20, 16, 16, 1), first=n) for n in (-20, 7)),
)


def tensors_for(spec: LinearSpec, case: Case, batch: int) -> list[Tensor]:
    """Values for every tensor of a named spec."""
    q_len, kv_len, dim, _, kv_heads = case.shape
    pad = torch.ones(batch, kv_len, dtype=torch.bool)
    third = kv_len // 3
    hidden = {
        "left": slice(0, third), "middle": slice(third, kv_len - third),
        "right": slice(kv_len - third, None), "all": slice(0, None),
    }  # fmt: skip
    pad[-1, hidden[case.hidden]] = False
    made = {
        "pad": pad,
        "d": torch.rand(HEADS) * 0.3,
        "gate": torch.rand(batch, HEADS, q_len),
        "a": torch.rand(batch, HEADS, q_len),
        "c": torch.rand(batch, HEADS, kv_len),
        "wq": torch.randn(HEADS, dim, 20) * 0.3,
        "wk": torch.randn(kv_heads, dim, 20) * 0.3,
        "bk": torch.randn(kv_heads, 20),
    }
    return [made[t.name] for t in spec.tensors]


def run(case: Case) -> dict[str, Any]:
    """Errors of the kernels and of the reference in the same dtype, against float64."""
    from rewriter.kernels import triton_linear
    from rewriter.kernels.triton_linear_kernel import LinearTile

    triton_linear.tile_for = lambda *_: LinearTile(16, 16, 16, 32, 4, 1)
    torch.manual_seed(0)
    batch, spec = 2 if "pad" in str(SPECS[case.spec]) else 1, SPECS[case.spec]
    q_len, kv_len, dim, value_dim, kv_heads = case.shape
    sizes = [(HEADS, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim)]
    x = [torch.randn(batch, *size).to(getattr(torch, case.dtype)) for size in sizes]
    if case.strided:
        x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    rest = (tensors_for(spec, case, batch), [case.first for _ in spec.sizes])
    gold = reference(spec, *(t.double() for t in x), *rest)
    out = triton_linear.forward(spec, *x, *rest)
    own = reference(spec, *x, *rest)
    size = gold.square().mean().sqrt()
    return {
        "error": float((out - gold).abs().max()),
        "rms": float((out - gold).square().mean().sqrt() / size),
        "reference_error": float((own - gold).abs().max()),
        "floor": torch.finfo(x[0].dtype).eps * float(gold.abs().max()),
        "dtype": str(out.dtype),
        "size": float(size),
    }


# --- generation -----------------------------------------------------------------------------------


@torch.no_grad()
def remembered() -> dict[str, Any]:
    """A prompt by the kernels, then one token at a time by torch: how often it worked the state out
    of the keys again, and how far the tokens are from one call over all of them."""
    from rewriter.beside import beside
    from rewriter.kernels import torch_linear, torch_linear_call, triton_linear

    found: dict[str, Any] = {}
    for name in ("shared-padding", "map-exp", "lightning"):
        spec, case = SPECS[name], Case(name, (40, 40, 16, 16, 1))
        torch.manual_seed(0)
        x = [torch.randn(2, heads, 40, 16) for heads in (HEADS, 1, 1)]
        tensors = tensors_for(spec, case, 2)
        whole = reference(spec, *x, tensors, [])
        past: Tensor | None = None
        rows, steps = [], []
        absorbed = torch_linear_call.Call.steps

        def counted(self: Any, done: int = 0, plain: Any = absorbed, to: Any = steps) -> Any:
            to.append(self.kv_len - done)
            return plain(self, done)

        torch_linear_call.Call.steps = counted  # type: ignore[method-assign]
        for start, stop in ((0, 36), (36, 37), (37, 38), (38, 40)):
            full = x[1][:, :, :stop].clone()
            now = [x[0][:, :, start:stop], full, x[2][:, :, :stop]]
            read = [t[..., :stop] if t.dtype == torch.bool else t for t in tensors]
            engine = triton_linear if start == 0 else torch_linear
            rows.append(engine.forward(spec, *now, read, [], beside(full, past, (name,))))
            past = full
        torch_linear_call.Call.steps = absorbed  # type: ignore[method-assign]
        error = float((torch.cat(rows, dim=2) - whole).abs().max())
        found[name] = {"error": error, "keys": steps}
    return found


# --- resources ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """The kernels of one spec for one GPU."""

    spec: str
    dim: int
    capability: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.spec}-D{self.dim}-sm{self.capability}-{self.dtype}"


BUILDS = (
    Build("lightning", 64, 80),
    Build("lightning", 64, 90),
)


def build(case: Build) -> dict[str, Any]:
    """What each kernel takes."""
    from rewriter.kernels.triton_linear import tile_for
    from rewriter.kernels.triton_linear_code import linear_source
    from rewriter.kernels.triton_linear_kernel import LinearKernel
    from rewriter.kernels.triton_source import compile_function

    spec = SPECS[case.spec]
    tile = tile_for(spec, case.dim, case.dim, case.dtype, case.capability)
    kernel = LinearKernel(spec, case.dim, case.dim, case.dtype, tile)  # type: ignore[arg-type]
    source = linear_source(kernel)
    dtypes = {n: kernel.dtype_of(n) for n in "qkvo"}
    dtypes |= {"s": "float32", "z": "float32", "number": "int32"}
    dtypes |= {f"t:{t.name}": t.dtype for t in spec.tensors}
    return {
        f.name: vars(compile_function(source, f.name, dtypes, case.capability))
        for f in source.functions
    }
