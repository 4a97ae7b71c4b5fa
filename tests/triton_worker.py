"""Runs generated kernels in a process of its own, and prints what came out as JSON.

Triton decides at its import whether it interprets or compiles, so neither fits into the process of
the tests.

    python tests/triton_worker.py interpret      numbers of every case, against the reference
    python tests/triton_worker.py compile        registers, spills and shared memory of every kernel
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from rewriter.kernels.triton_codegen import KERNEL, KernelSpec, codegen
from rewriter.kernels.triton_decode_code import COMBINE, DECODE, DecodeSpec, decode_source
from rewriter.kernels.triton_tiles import tile_for
from rewriter.reference import reference, reference_weights
from rewriter.spec import SoftmaxSpec
from triton_mends import multiply_bfloat16, patch_core_once
from triton_specs import MERGED, SPECS, padding, tensors_for

# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of a kernel."""

    spec: str
    shape: tuple[int, int, int, int, int, int, int] = (2, 2, 2, 33, 33, 16, 16)
    """B, Hq, Hkv, L, M, D, Dv."""
    dtype: str = "float32"
    layout: str = "BHLD"
    """How q, k and v lie in memory: `BHLD`, `BLHD`, `BHDL`, `padded` (gaps between elements),
    `expanded` (one batch)."""
    masked: str = ""
    hidden: str = "right"
    """Which keys of the last sequence are padding."""
    bias: str = ""
    """`"holes"` puts minus infinity into the bias, in one row everywhere."""

    @property
    def name(self) -> str:
        shape = "-".join(
            f"{k}{n}" for k, n in zip(("B", "H", "K", "L", "M", "D", "E"), self.shape, strict=True)
        )
        extra = [self.layout if self.layout != "BHLD" else "", self.masked, self.bias]
        extra += [f"hidden-{self.hidden}" if self.hidden != "right" else ""]
        return "-".join([self.spec, shape, self.dtype, *(x for x in extra if x)])


_ONE = (1, 2, 2, 33, 33, 16, 16)
"""One sequence, where nothing is read of each."""


def _plain(L: int, M: int, **kwargs: Any) -> Case:
    return Case("plain", (2, 2, 2, L, M, 16, 16), **kwargs)


CASES = (
    # sizes
    *(_plain(n, n) for n in (1, 2, 63, 65)),
    _plain(65, 65, dtype="bfloat16"),
    _plain(65, 17),
    Case("causal", (1, 2, 2, 129, 129, 16, 16), "bfloat16"),
    Case("causal", (2, 2, 2, 1, 65, 16, 16)),
    Case("causal", (1, 2, 2, 20, 65, 16, 16)),
    Case("causal", (1, 2, 2, 65, 20, 16, 16)),
    # head dims
    *(
        Case("causal", (1, 2, 2, 17, 17, d, e))
        for d, e in ((60, 60), (64, 16), (128, 60), (60, 128), (1, 3))
    ),
    Case("causal", (1, 1, 1, 33, 33, 256, 256), "float16"),
    # groups of heads
    *(
        Case("causal", (1, heads, kv_heads, 17, 17, 16, 16))
        for heads, kv_heads in ((3, 1), (6, 2), (8, 1))
    ),
    # dtypes
    *(Case("soft-cap", _ONE, d) for d in ("bfloat16", "float16")),
    *(Case(s, dtype=d) for s in ("alibi", "causal-padding") for d in ("bfloat16", "float16")),
    # strides
    *(Case("causal", layout=layout) for layout in ("BLHD", "BHDL", "padded", "expanded")),
    Case("grid-bias", (2, 4, 2, 20, 33, 16, 16), layout="BLHD"),
    # scores
    Case("soft-cap", _ONE),
    Case("alibi"),
    Case("alibi", (2, 4, 2, 1, 40, 16, 16)),
    Case("relative-bias", (1, 2, 2, 40, 35, 16, 16)),
    Case("counted-from-the-end", (2, 2, 2, 15, 15, 16, 16)),
    Case("buckets", (2, 2, 2, 40, 65, 16, 16)),
    Case("buckets", (2, 2, 2, 1, 65, 16, 16)),
    Case("disentangled", masked="mean"),
    Case("opaque-bias", _ONE),
    Case("opaque-bias", _ONE, bias="holes"),
    Case("rounding", _ONE),
    Case("powers"),
    Case("head-scales"),
    Case("clamped-twice-masked"),
    Case("clamped-twice-masked", hidden="all"),
    # masks
    Case("window-sinks", (1, 2, 2, 100, 100, 16, 16)),
    Case("window-sinks", (1, 2, 1, 1, 129, 16, 16)),
    Case("two-sided-window", (1, 2, 2, 100, 100, 16, 16)),
    # one key of a tile is seen, at the high and at the low end of what is visited
    Case("causal", (1, 2, 2, 40, 73, 16, 16)),
    Case("neighbours", (1, 2, 2, 65, 65, 16, 16)),
    Case("two-sided-window", (1, 2, 2, 65, 20, 16, 16), masked="mean"),
    Case("padding"),
    Case("padding", hidden="left"),
    Case("documents", (2, 2, 2, 40, 40, 16, 16)),
    Case("chunks", (2, 2, 2, 40, 40, 16, 16)),
    Case("sizes", (1, 2, 2, 20, 65, 16, 16)),
    Case("one-head-sees-all", _ONE),
    # sinks
    Case("learned-sink"),
    Case("learned-sink", (2, 4, 2, 1, 65, 16, 16), "bfloat16"),
    Case("row-sink"),
    Case("learned-sink", (1, 2, 2, 65, 20, 16, 16), masked="mean"),
    Case("learned-sink", (1, 2, 2, 65, 20, 16, 16), masked="nan"),
    # rows that see no key: all rows; and the first ones, where tiles of keys are passed over
    *(Case("padding", hidden="all", masked=m) for m in ("zero", "mean", "add", "nan")),
    *(
        Case(name, (1, 2, 1, 40, 40, 16, 20), hidden="left", masked=m)
        for name in ("causal-padding", "redirect")
        for m in ("zero", "mean", "add", "nan")
    ),
    *(
        Case("causal-padding", hidden="left", masked="mean", dtype=d)
        for d in ("bfloat16", "float16")
    ),
    Case("opaque-bias", (1, 2, 2, 65, 20, 16, 16), bias="holes", masked="zero"),
    *(Case(name, (1, 2, 2, 40, 20, 16, 16)) for name in ("remove", "four-sums", "shares")),
    # weights edited by groups of keys
    *(Case(name) for name in ("redirect", "redistribute", "shares", "rows-of-a-head")),
    *(Case(name, _ONE) for name in ("remove", "normalise", "four-sums")),
    *(Case(name, _ONE, "float16") for name in ("remove-heavy", "redistribute", "shares")),
    *(Case(name, _ONE, "bfloat16") for name in ("redistribute", "shares")),
    Case("edit-everything", (2, 4, 2, 20, 65, 16, 20)),
    Case("edit-everything", (1, 4, 2, 1, 65, 16, 16), "float16"),
)


_SPECS_SEEN: set[str] = set()


def run(case: Case) -> dict[str, Any]:
    """Errors of the kernel and of the reference in the same dtype, against float64."""
    from rewriter.kernels.triton_launch import forward, forward_with_lse

    spec, q, k, v, tensors, sizes = _operands(case)
    rest = (tensors, sizes)
    gold = reference(spec, q.double(), k.double(), v.double(), *rest)
    out, lse = forward_with_lse(spec, q, k, v, *rest)
    if case.spec not in _SPECS_SEEN:  # once a spec: the lines of lse are the same at all shapes
        _SPECS_SEEN.add(case.spec)
        assert out.equal(forward(spec, q, k, v, *rest)), "with and without lse"
    gold_lse = _lse(spec, q.double(), k.double(), *rest)
    lse = torch.where(
        lse < -1e30, -torch.inf, lse
    )  # scores of finfo.min: nothing beside a logit of 0
    # In a half the reference rounds the factors of an edit too, and 1e-12 to 0.
    alone = spec.edit is not None and q.dtype is not torch.float32
    return {
        "error": _distance(out, gold),
        "reference_error": 0.0 if alone else _distance(reference(spec, q, k, v, *rest), gold),
        "floor": torch.finfo(q.dtype).eps * float(gold.nan_to_num().abs().max()),
        "lse_error": _distance(lse, gold_lse),
        "nans": [int(out.isnan().sum()), int(gold.isnan().sum())],
    }


def gradients(case: Case) -> dict[str, Any]:
    """Errors and sizes of the gradients of the op with this target, by the name of the input; and
    why the kernels for gradients refuse, if they do."""
    from rewriter.op import attention

    spec, *qkv, tensors, sizes = _operands(case)
    is_float = [x.is_floating_point() for x in tensors]
    refused = _refusal(spec, *qkv, is_float)
    names = ["q", "k", "v", *(t.name for t in spec.tensors if "float" in t.dtype)]

    def found(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype, copy=True) if x.is_floating_point() else x for x in (*qkv, *tensors)]
        leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
        out = function(*given[:3], given[3:], sizes)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return list(torch.autograd.grad(out, leaves, weights))

    own = getattr(torch, case.dtype)
    gold = found(lambda *x: reference(spec, *x), torch.float64)
    if own is torch.bfloat16:  # which the guard refuses here: the interpreter is mended above
        new = _by_kernels(spec, qkv, tensors, sizes)
    else:
        new = found(lambda *x: attention(*x, spec, "triton"), own)
    old = gold if own is torch.float32 else found(lambda *x: reference(spec, *x), own)
    errors = {
        name: {
            "error": _distance(x, z),
            "reference_error": _distance(y, z),
            "size": float(z.nan_to_num().abs().max()),
            "nans": [int(x.isnan().sum()), int(z.isnan().sum())],
        }
        for name, x, y, z in zip(names, new, old, gold, strict=True)
    }
    return {"refused": refused, "errors": errors}


def _by_kernels(
    spec: SoftmaxSpec, qkv: list[Tensor], tensors: list[Tensor], sizes: list[int]
) -> list[Tensor]:
    from rewriter.kernels.triton_backward import backward
    from rewriter.kernels.triton_launch import forward_with_lse

    tensors = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in tensors]
    out, lse = forward_with_lse(spec, *qkv, tensors, sizes)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [True] * 3 + [x.is_floating_point() for x in tensors]
    got = backward(spec, grad, out, lse, *qkv, tensors, sizes, wanted)
    return [x for x in got if x is not None]


def _refusal(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, wanted: list[bool]) -> str | None:
    from rewriter.kernels.triton_backward import refusal
    from rewriter.lowering import Shapes

    batch, heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, value_dim = v.shape
    dims = (batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
    return refusal(spec, Shapes("cpu", q.dtype, *dims, grad=True), wanted)


def _operands(case: Case) -> tuple[SoftmaxSpec, Tensor, Tensor, Tensor, list[Tensor], list[int]]:
    """The spec of a case, q, k and v, the tensors and the sizes."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, _, q_len, kv_len, _, _ = case.shape
    spec = replace(SPECS[case.spec], masked=case.masked) if case.masked else SPECS[case.spec]  # type: ignore[arg-type]
    q, k, v = _inputs(case, generator)
    tensors = tensors_for(spec, batch, heads, q_len, kv_len, generator)
    tensors = [padding(batch, kv_len, case.hidden) if x.dtype == torch.bool else x for x in tensors]
    if case.bias:
        tensors[0][..., ::3] = -torch.inf
        tensors[0][:, :, q_len // 2] = -torch.inf
    sizes = {"past": kv_len - q_len, "first": 3}
    return spec, q, k, v, tensors, [sizes[n] for n in spec.sizes]


def _inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    """q, k and v of a case in its layout."""
    batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim = case.shape
    sizes = [(heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, value_dim)]
    made = []
    for n, length, dim in sizes:
        x = torch.randn(batch, n, length, dim, generator=generator).to(getattr(torch, case.dtype))
        match case.layout:
            case "BLHD":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            case "BHDL":
                x = x.mT.contiguous().mT
            case "padded":
                x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
            case "expanded":
                x = x[:1].expand(batch, -1, -1, -1)
        made.append(x)
    return made


def _lse(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, tensors: list[Tensor], sizes: list[int]
) -> Tensor:
    """The logarithm of the denominators, from what a sink of logit 0 leaves to the keys."""
    plain = replace(spec, sink=sympy.Integer(0), edit=None)
    seen = reference_weights(plain, q, k, tensors, sizes).sum(-1)
    lse = seen.log() - torch.log1p(-seen)
    if spec.sink is None:
        return lse
    sink = next(x for t, x in zip(spec.tensors, tensors, strict=True) if "sink" in t.name).double()
    return torch.logaddexp(lse, sink if sink.dim() == 3 else sink[:, None])


def _distance(x: Tensor, gold: Tensor) -> float:
    """The largest difference; infinite where one is NaN or infinite and the other not."""
    same = (x == gold) | (x.isnan() & gold.isnan())
    return float(torch.where(same, 0.0, (x - gold).abs()).nan_to_num(torch.inf).max())


_GROUPED = (2, 4, 2, 20, 33, 16, 16)
_PAIRS = ("relative-bias", "buckets", "grid-bias", "disentangled", "opaque-bias")
_ROWS = (
    "alibi", "learned-sink", "row-sink", "head-scales", "normalise", "shares", "rows-of-a-head",
    "edit-everything",
)  # fmt: skip
"""Specs that read what wants a gradient: at pairs of positions, and elsewhere."""

GRADIENTS = (
    # what is read at pairs is in the next tuple: it is added up by atomics
    *(Case(n, _GROUPED) for n in SPECS if n not in (*_PAIRS, "counted-from-the-end", "rounding")),
    # shapes
    *(Case("causal", (1, 8, h, 65, 65, 16, 16)) for h in (1, 8)),
    Case("causal", (1, 2, 2, 1, 40, 16, 16)),
    Case("causal", (1, 2, 2, 65, 20, 60, 36)),
    Case("causal", (1, 2, 1, 20, 65, 16, 16), layout="BLHD"),
    Case("soft-cap", (2, 2, 2, 17, 17, 16, 16), layout="expanded"),
    Case("window-sinks", (1, 2, 2, 129, 129, 16, 16)),
    Case("two-blocks", (1, 2, 2, 100, 100, 16, 16)),
    # halves
    *(Case("causal", (1, 2, 2, 65, 65, 64, 64), d) for d in ("float16", "bfloat16")),
    *(Case("remove", _GROUPED, d) for d in ("float16", "bfloat16")),
    Case("remove-heavy", _GROUPED, "float16"),
    Case("alibi", _GROUPED, "bfloat16"),
    # rows that see no key
    *(
        Case(name, (2, 4, 2, 33, 33, 16, 16), hidden=hidden, masked=m)
        for name, hidden in (("padding", "all"), ("causal-padding", "left"), ("redirect", "left"))
        for m in ("zero", "mean", "add", "nan")
    ),
    Case("learned-sink", (1, 2, 2, 40, 20, 16, 16), masked="mean"),
    *(Case(name, (1, 2, 2, 40, 20, 16, 16)) for name in ("remove", "four-sums", "shares")),
)
"""Cases whose gradients are compared with those of the reference in float64."""

PAIRED = tuple(Case(n, (1, 4, 2, 20, 33, 16, 16)) for n in _PAIRS)
"""The same for gradients that are added up in no fixed order, which torch must allow."""


# --- decoding -------------------------------------------------------------------------------------

_STEP = (2, 4, 2, 2, 80, 16, 20)
DECODES = (
    *(Case(n, _STEP) for n in SPECS if n != "counted-from-the-end"),
    Case("causal", (1, 8, 1, 1, 100, 16, 16)),
    Case("causal", (2, 2, 2, 1, 65, 60, 16)),
    Case("causal", (1, 12, 4, 5, 129, 16, 16), layout="BLHD"),
    Case("alibi", (1, 12, 1, 3, 70, 16, 16), "float16"),
    Case("learned-sink", (2, 4, 2, 1, 96, 64, 64), "bfloat16"),
    *(
        Case(name, (2, 4, 2, 2, 80, 16, 16), hidden="all", masked=m)
        for name in ("padding", "redirect")
        for m in ("zero", "mean", "nan")
    ),
    Case("opaque-bias", (1, 4, 2, 3, 80, 16, 16), bias="holes"),
    Case("opaque-bias", (1, 4, 2, 3, 80, 16, 16), bias="holes", masked="mean"),
)
"""Calls with few queries, several heads to a head of keys, and runs of few keys."""


def decode(case: Case) -> dict[str, Any]:
    """What `run` says of the output, and which kernels ran."""
    from rewriter.kernels import triton_decode
    from rewriter.kernels.triton_launch import forward

    spec, q, k, v, tensors, sizes = _operands(case)
    rest = (tensors, sizes)
    gold = reference(spec, q.double(), k.double(), v.double(), *rest)
    ran, launch, least = [], triton_decode.launch, triton_decode._LEAST_KEYS

    def launched(source: Any, name: str, *args: Any) -> None:
        ran.append(name)
        launch(source, name, *args)

    triton_decode.launch, triton_decode._LEAST_KEYS = launched, 16
    try:
        out = forward(spec, q, k, v, *rest)
    finally:
        triton_decode.launch, triton_decode._LEAST_KEYS = launch, least
    alone = spec.edit is not None and q.dtype is not torch.float32
    return {
        "ran": ran,
        "error": _distance(out, gold),
        "reference_error": 0.0 if alone else _distance(reference(spec, q, k, v, *rest), gold),
        "floor": torch.finfo(q.dtype).eps * float(gold.nan_to_num().abs().max()),
        "nans": [int(out.isnan().sum()), int(gold.isnan().sum())],
    }


# --- dropout --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropoutCase:
    """A spec whose weights are dropped, with as many keys as values have columns."""

    spec: str
    masked: str = "zero"
    name = property(lambda self: f"dropout-{self.spec}-{self.masked}")


DROPOUT = (
    *(DropoutCase(n) for n in ("plain", "causal", "alibi", "remove", "edit-everything")),
    DropoutCase("causal-padding", "mean"),
    DropoutCase("redirect", "mean"),
)
RATE = 0.3


def dropout(case: DropoutCase) -> dict[str, Any]:
    """Which weights are kept, read off with values that are the unit matrix; and the errors of the
    output and the gradients, given those."""
    from rewriter.kernels.triton_backward import backward
    from rewriter.kernels.triton_launch import forward, forward_with_lse

    at = Case(case.spec, (2, 4, 2, 40, 16, 16, 16), masked=case.masked, hidden="left")
    spec, q, k, v, tensors, sizes = _operands(at)
    spec = replace(spec, dropout=RATE)
    unit = torch.eye(16).expand(2, 2, 16, 16)

    def weights(seed: int) -> Tensor:
        return forward(spec, q, k, unit, tensors, sizes, seed)

    gold = [x.double().requires_grad_() for x in (q, k, v)]
    p = reference_weights(replace(spec, heads=sympy.Integer(1)), *gold[:2], tensors, sizes)
    kept, seen = weights(7) != 0, p > 1e-4
    wanted_out = (p * kept / (1 - RATE)) @ gold[2].repeat_interleave(2, 1)
    plain = replace(spec, heads=sympy.Integer(1))
    out, lse = forward_with_lse(plain, q, k, v, tensors, sizes, 7)
    result: dict[str, Any] = {
        "kept": float(kept[seen].double().mean()),
        "same": weights(7).equal(weights(7)),
        "other": float((weights(8) != 0)[seen].ne(kept[seen]).double().mean()),
        "heads": float(kept[:, 0].ne(kept[:, 1])[seen[:, 0] & seen[:, 1]].double().mean()),
        "rows": float(kept[:, :, 1:].ne(kept[:, :, :-1])[seen[:, :, 1:]].double().mean()),
        "error": _distance(out, wanted_out.detach()),
    }
    if case.masked == "mean":
        return result
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
    want = torch.autograd.grad(wanted_out, gold, grad.double())
    rest = (tensors, sizes, [True] * 3 + [False] * len(tensors), 7)
    got = backward(plain, grad, out, lse, q, k, v, *rest)
    result["by the op"] = _by_the_op(plain, (q, k, v), tensors, sizes, grad)
    return result | {"gradients": [_distance(x, y) for x, y in zip(got, want, strict=False)]}


def _by_the_op(
    spec: SoftmaxSpec,
    qkv: tuple[Tensor, ...],
    tensors: list[Tensor],
    sizes: list[int],
    grad: Tensor,
) -> bool:
    """The op draws its seed from torch's generator, and its backward draws the same."""
    from rewriter.kernels.triton_backward import backward
    from rewriter.kernels.triton_launch import drawn, forward_with_lse
    from rewriter.op import attention

    torch.manual_seed(3)
    seed = drawn()
    out, lse = forward_with_lse(spec, *qkv, tensors, sizes, seed)
    wanted = [True] * 3 + [False] * len(tensors)
    want = backward(spec, grad, out, lse, *qkv, tensors, sizes, wanted, seed)
    leaves = [x.clone().requires_grad_() for x in qkv]
    torch.manual_seed(3)
    mine = attention(*leaves, tensors, sizes, spec, "triton")
    found = torch.autograd.grad(mine, leaves, grad)
    return mine.equal(out) and all(x.equal(y) for x, y in zip(found, want, strict=False))


# --- resources ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """One kernel for one GPU."""

    spec: str
    dim: int
    capability: int
    dtype: str = "bfloat16"
    q_len: int = 1024
    lse: bool = False
    decode: bool = False
    """The kernels of a step of decoding with four heads to a head of keys, keys in runs."""

    @property
    def name(self) -> str:
        extra = ["few"] if self.q_len == 1 else []
        extra += ["lse"] if self.lse else []
        extra += ["decode"] if self.decode else []
        return "-".join([self.spec, f"D{self.dim}", f"sm{self.capability}", self.dtype, *extra])


BUILDS = (
    # each tile for each GPU, with the spec that takes most registers in it
    *(Build("causal-padding", 64, cap) for cap in (80, 90)),
    *(Build("alibi", 64, cap) for cap in (80, 90)),
    *(Build("grid-bias", dim, cap) for cap in (80, 90) for dim in (64, 128, 256)),
    Build("learned-sink", 128, 80),
    Build("causal-padding", 128, 90),
    Build("alibi", 128, 90),
    *(Build("four-sums", 64, cap) for cap in (80, 90)),
    *(Build("redirect", dim, 80) for dim in (64, 128, 256)),
    *(Build("four-sums", dim, 90) for dim in (128, 256)),
    Build("soft-cap", 64, 80, "float32"),
    Build("four-sums", 64, 90, "float32"),
    Build("causal", 128, 90, q_len=1),
    Build("four-sums", 128, 80, "float16", q_len=1),
    # further lines
    Build("plain", 64, 90),
    Build("causal", 128, 80, lse=True),
    Build("head-scales", 64, 80),
    *(Build("redistribute", 64, cap) for cap in (80, 90)),
    Build("edit-everything", 64, 80),
    Build("edit-everything", 128, 80),
    Build("shares", 64, 90),
    *(Build(name, 64, 90) for name in MERGED),
    # decoding
    *(Build("causal", 128, cap, q_len=1, decode=True) for cap in (80, 90)),
    *(
        Build("edit-everything", 128, 90, dtype, q_len=1, decode=True)
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Build(name, 64, 90, q_len=1, decode=True)
        for name in ("grid-bias", "head-scales", "opaque-bias")
    ),
    Build("causal", 256, 80, q_len=1, decode=True),
    Build("causal", 64, 90, "float32", q_len=1, decode=True),
)


def build(case: Build) -> dict[str, Any]:
    """What the kernel takes."""
    from rewriter.kernels.triton_source import compile_function

    spec: SoftmaxSpec = (SPECS | MERGED)[case.spec]
    tile = tile_for(spec, case.dim, case.dim, case.dtype, case.q_len, case.capability)  # type: ignore[arg-type]
    kernel = KernelSpec(spec, case.dim, case.dim, case.dtype, tile, case.lse)  # type: ignore[arg-type]
    dtypes = dict.fromkeys("qkvo", case.dtype) | {"lse": "float32"}
    dtypes |= {f"t:{t.name}": t.dtype for t in kernel.lowered[0].tensors}
    if case.decode:
        source = decode_source(DecodeSpec(kernel, split=True))
        dtypes |= dict.fromkeys(("maxima", "sums", "parts"), "float32")
        compile_function(source, COMBINE, dtypes, case.capability)
        return vars(compile_function(source, DECODE, dtypes, case.capability))
    return vars(compile_function(codegen(kernel), KERNEL, dtypes, case.capability))


@dataclass(frozen=True)
class GradientsBuild:
    """The kernels for the gradients of one call, with gradients of all that is read, for one
    GPU."""

    spec: str
    dim: int
    capability: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return "-".join([self.spec, f"D{self.dim}", f"sm{self.capability}", self.dtype])


GRADIENTS_BUILDS = (
    *(
        GradientsBuild(spec, dim, cap)
        for cap in (80, 90)
        for dim, specs in ((64, ("soft-cap", "edit-everything", "grid-bias")), (128, ("causal",)))
        for spec in specs
    ),
    *(GradientsBuild("edit-everything", dim, 80) for dim in (128, 256)),
    *(GradientsBuild("grid-bias", dim, 90) for dim in (128, 256)),
    GradientsBuild("causal", 256, 90),
    GradientsBuild("edit-everything", 64, 90, "float16"),
    *(GradientsBuild("causal", dim, 80, "float32") for dim in (64, 128)),
    # lines that only the interpreter takes would be found here
    *(GradientsBuild(spec, 64, 90) for spec in ("relative-bias", "head-scales", *MERGED)),
)


def build_gradients(case: GradientsBuild) -> dict[str, Any]:
    """What each of the kernels takes."""
    from rewriter.kernels.triton_backward_code import BackwardSpec, backward_source
    from rewriter.kernels.triton_source import compile_function
    from rewriter.kernels.triton_tiles import backward_tiles_for

    spec: SoftmaxSpec = (SPECS | MERGED)[case.spec]
    dtype: Any = case.dtype
    wanted = frozenset(t.name for t in spec.tensors if "float" in t.dtype)
    tiles = backward_tiles_for(spec, case.dim, case.dim, dtype, case.capability)
    kernel = BackwardSpec(spec, case.dim, case.dim, dtype, tiles, wanted)
    source = backward_source(kernel)
    dtypes = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), dtype)
    rows = ("lse", "delta", "masses", "totals", "factors", "offsets")
    dtypes |= dict.fromkeys((*rows, *(f"g:{n}" for n in range(16))), "float32")
    dtypes |= {f"t:{t.name}": t.dtype for t in kernel.lowered[0].tensors}
    return {
        f.name: vars(compile_function(source, f.name, dtypes, case.capability))
        for f in source.functions
    }


# --- both -----------------------------------------------------------------------------------------


def collect(mode: str, folder: Path, script: str = __file__) -> dict[str, Any]:
    """The results of a worker process, by the name of the case; an error is `{"failed": text}`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "REWRITER_CACHE": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",  # a tenth of the time; the code is the same
        "OMP_NUM_THREADS": "1",
    }
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, script, mode],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the worker failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _in_any_order(case: Case) -> dict[str, Any]:
    torch.use_deterministic_algorithms(False)
    try:
        return gradients(case)
    finally:
        torch.use_deterministic_algorithms(True)


def _attempt(function: Callable[[Any], dict[str, Any]], case: Any) -> dict[str, Any]:
    try:
        return function(case)
    except Exception:
        return {"failed": traceback.format_exc()}


def main(mode: str) -> None:
    # What torch.empty gives is NaN from here on: what a kernel does not write cannot pass.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (mode == "interpret")
    if mode == "interpret":
        multiply_bfloat16()
        patch_core_once()
    work: list[tuple[Callable[[Any], dict[str, Any]], Any]] = (
        [
            *((run, c) for c in CASES),
            *((decode, c) for c in DECODES),
            *((dropout, c) for c in DROPOUT),
            *((gradients, c) for c in GRADIENTS),
            *((_in_any_order, c) for c in PAIRED),
        ]
        if mode == "interpret"
        else [*((build, c) for c in BUILDS), *((build_gradients, c) for c in GRADIENTS_BUILDS)]
    )
    print(json.dumps({_key(f, c): _attempt(f, c) for f, c in work}))


def _key(function: Callable[..., Any], case: Any) -> str:
    if function is decode:
        return f"decode-{case.name}"
    own = function in (gradients, _in_any_order, build_gradients)
    return f"gradients-{case.name}" if own else str(case.name)


if __name__ == "__main__":
    main(sys.argv[1])
