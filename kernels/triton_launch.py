"""Runs generated kernels: says what they can do, checks the tensors and starts the grid.

The forward; `triton_backward` has the gradients.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import LoweringError, ShapeError
from rewriter.kernels.triton_codegen import KERNEL, Dtype, KernelSpec, codegen
from rewriter.kernels.triton_decode import decode
from rewriter.kernels.triton_source import Source, launch
from rewriter.kernels.triton_tables import filled, tabulate
from rewriter.kernels.triton_tiles import tile_for
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = [
    "DTYPES",
    "MIN_CAPABILITY",
    "READABLE",
    "capability_of",
    "check_call",
    "check_reads",
    "device_reason",
    "drawn",
    "forward",
    "forward_with_lse",
    "shape_reason",
    "source_of",
    "supports",
]

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
READABLE = {"bool", "int8", "uint8", "int16", "int32", "int64", *DTYPES.values()}
"""Dtypes of tensors that formulas may read; float64 would lose bits."""
_MAX_DIM = 256
MIN_CAPABILITY = 80


# --- the guard ------------------------------------------------------------------------------------


def supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    """None if a kernel can be generated for the spec and run on such tensors, else the reason."""
    return (
        device_reason(shapes.device)
        or shape_reason(shapes)
        or _spec_reason(spec, shapes.head_dim, shapes.value_dim, shapes.dtype)
    )


def device_reason(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if not device.startswith("cuda"):
        return f"Triton kernels need a GPU, and the tensors are on {device}"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    if capability_of(device) < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability_of(device) / 10}, the kernels need 8.0"
    return None


def shape_reason(shapes: Shapes) -> str | None:
    if shapes.dtype not in DTYPES:
        name = str(shapes.dtype).removeprefix("torch.")
        return f"{name} has no kernel; float16, bfloat16 and float32 have"
    if shapes.dtype is torch.bfloat16 and _interpreted():
        return "Triton's interpreter cannot multiply bfloat16"
    if max(shapes.head_dim, shapes.value_dim) > _MAX_DIM:
        return f"head dim {max(shapes.head_dim, shapes.value_dim)} is above {_MAX_DIM}"
    if shapes.kv_len == 0:
        return "there are no keys"
    return None


@lru_cache(maxsize=4096)
def _spec_reason(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: torch.dtype
) -> str | None:
    for tensor in spec.tensors:
        if tensor.dtype not in READABLE:
            return f"{tensor.name} is {tensor.dtype}, which the kernels do not read"
    try:
        codegen(_kernel_spec(spec, head_dim, value_dim, dtype, 1, MIN_CAPABILITY, False))
    except LoweringError as reason:
        return str(reason)
    return None


@lru_cache(maxsize=4096)
def _kernel_spec(
    spec: SoftmaxSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    q_len: int,
    capability: int,
    lse: bool,
) -> KernelSpec:
    name = DTYPES[dtype]
    tile = tile_for(tabulate(spec)[0], head_dim, value_dim, name, q_len, capability)
    return KernelSpec(spec, head_dim, value_dim, name, tile, lse)


@lru_cache(maxsize=16)
def capability_of(device: str) -> int:
    """Compute capability of the GPU times ten; in the interpreter the lowest that we take."""
    if not device.startswith("cuda"):
        return MIN_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def source_of(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: torch.dtype, capability: int
) -> Source:
    """The file that a long call runs."""
    return codegen(_kernel_spec(spec, head_dim, value_dim, dtype, 1024, capability, False))


# --- the call -------------------------------------------------------------------------------------


def forward(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    seed: int | None = None,
) -> Tensor:
    """The attention that the spec describes, by a generated kernel.

    Args:
        spec: what to compute.
        q: queries `[B, Hq, L, D]`, any strides.
        k: keys `[B, Hkv, M, D]`, dtype of q; `Hq` is a multiple of `Hkv`.
        v: values `[B, Hkv, M, Dv]`, dtype of q.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        seed: of the dropout; drawn from torch's default generator if it is not given.

    Returns:
        `[B, Hq, L, Dv]` in the dtype of q, contiguous.

    Raises:
        ShapeError: if the tensors do not fit the spec or each other.
    """
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    _launch(spec, {"q": q, "k": k, "v": v, "o": out}, tensors, sizes, seed)
    return out


def forward_with_lse(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward`, and the natural logarithm of each row's denominator.

    Returns:
        The output, and `[B, Hq, L]` in float32: over visible keys and the sink; -inf where there
        are neither.
    """
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _launch(spec, {"q": q, "k": k, "v": v, "o": out, "lse": lse}, tensors, sizes, seed)
    return out, lse


def _launch(
    spec: SoftmaxSpec,
    named: dict[str, Tensor],
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    seed: int | None,
) -> None:
    """Fills `o` (and `lse`)."""
    q, k, v = named["q"], named["k"], named["v"]
    check_call(q, k, v)
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, value_dim) = q.shape, v.shape
    numbers = dict(zip(spec.sizes, (int(n) for n in sizes), strict=True))
    numbers |= {"B": batch, "H": heads, "L": q_len, "M": kv_len}
    if named["o"].numel() == 0:
        return
    check_reads(spec, tensors, numbers, q.device)
    kernel = _kernel_spec(
        spec, head_dim, value_dim, q.dtype, q_len, capability_of(str(q.device)), "lse" in named
    )
    tables = kernel.lowered[1]
    used = tuple((n, x) for n, x in numbers.items() if n not in "LM")
    named |= {f"t:{t.name}": x for t, x in zip(spec.tensors, tensors, strict=True)}
    named |= {f"t:{t.name}": filled(t, q_len, kv_len, used, q.device) for t in tables}
    numbers["G"] = heads // kv_heads
    if spec.dropout:
        numbers["seed"] = drawn() if seed is None else seed
    if decode(kernel, named, numbers):
        return
    programs = batch * heads * -(-q_len // kernel.tile.queries)
    launch(codegen(kernel), KERNEL, programs, named, numbers)


def drawn() -> int:
    """A seed for the dropout, from torch's default generator."""
    return int(torch.randint(2**62, ()))


def check_call(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ShapeError where q, k and v do not fit each other."""
    for name, x, letters in (
        ("q", q, "[B, Hq, L, D]"),
        ("k", k, "[B, Hkv, M, D]"),
        ("v", v, "[B, Hkv, M, Dv]"),
    ):
        if x.dim() != 4:
            raise ShapeError(f"expected {name} of shape {letters}, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ShapeError(
                f"{name} is {x.dtype} on {x.device}, and q is {q.dtype} on {q.device}; "
                "they have to agree"
            )
    if q.dtype not in DTYPES:
        raise ShapeError(f"expected q in float16, bfloat16 or float32, got {q.dtype}")
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % k.shape[1]
    ):
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
        )


def check_reads(
    spec: SoftmaxSpec, tensors: Sequence[Tensor], numbers: Mapping[str, int], device: torch.device
) -> None:
    """Raises ShapeError where a tensor is not what the formulas read."""
    if len(tensors) != len(spec.tensors):
        raise ShapeError(f"the spec reads {len(spec.tensors)} tensors, got {len(tensors)}")
    named = {t.name: x for t, x in zip(spec.tensors, tensors, strict=True)}
    for arg in spec.tensors:
        x = named[arg.name]
        if (
            x.dim() != arg.rank
            or x.is_floating_point() != ("float" in arg.dtype)
            or x.device != device
        ):
            raise ShapeError(
                f"{arg.name}: expected {arg.dtype} of rank {arg.rank} on {device}, "
                f"got {x.dtype} of rank {x.dim()} on {x.device}"
            )
        if x.numel() == 0:
            raise ShapeError(f"{arg.name} of shape {tuple(x.shape)} has nothing to read")
    for name, dim, size in _index_sizes(spec):
        if named[name].shape[dim] < numbers[size]:
            shape = tuple(named[name].shape)
            raise ShapeError(
                f"{name} of shape {shape} is read at {numbers[size]} places of dimension {dim}"
            )


@lru_cache(maxsize=1024)
def _index_sizes(spec: SoftmaxSpec) -> tuple[tuple[str, int, str], ...]:
    """Tensor, dimension and the size that it has to cover, for indices that are symbols."""
    sizes = {sym.b: "B", sym.h: "H", sym.q: "L", sym.k: "M"}
    reads = {r for f in spec.formulas for r in sym.reads(f)}
    found = {
        (r.tensor, dim, sizes[i]) for r in reads for dim, i in enumerate(r.index) if i in sizes
    }
    return tuple(sorted(found))
