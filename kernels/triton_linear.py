"""Linear attention by generated Triton kernels: the guard, the call, what is kept beside a cache.

Forward only: gradients come from `torch_linear.backward`, which computes the states again. Matrices
of feature maps are applied by torch, and so is the norm over all heads, which no kernel of one head
can know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from rewriter.beside import Beside
from rewriter.errors import LoweringError
from rewriter.kernels import torch_linear
from rewriter.kernels.torch_linear_call import Call
from rewriter.kernels.triton_launch import (
    DTYPES,
    MIN_CAPABILITY,
    READABLE,
    capability_of,
    check_call,
    device_reason,
    shape_reason,
)
from rewriter.kernels.triton_linear_code import linear_source
from rewriter.kernels.triton_linear_kernel import LinearKernel, LinearTile, refusal
from rewriter.kernels.triton_linear_state import SCAN
from rewriter.kernels.triton_source import launch
from rewriter.linear import EPS_RMS, Features, LinearSpec
from rewriter.reference_linear import features
from rewriter.spec import Spec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["forward", "supports", "tile_for"]

FEW = 16
"""Up to so many queries go on from a state that is kept."""
SPAN = 256
"""Keys between two states: a state is as large as D keys and values in float32."""
_WIDE = 256


# --- the guard ------------------------------------------------------------------------------------


def supports(spec: Spec, shapes: Shapes) -> str | None:
    """None if kernels can be generated for the spec and run on such tensors, else the reason."""
    assert isinstance(spec, LinearSpec)
    return (
        refusal(spec)
        or device_reason(shapes.device)
        or shape_reason(shapes)
        or _call_reason(spec, shapes)
        or _spec_reason(spec, shapes.head_dim, shapes.value_dim, shapes.dtype)
    )


def _call_reason(spec: LinearSpec, shapes: Shapes) -> str | None:
    if shapes.heads % shapes.kv_heads:
        return f"{shapes.heads} query heads are not a multiple of {shapes.kv_heads} key heads"
    if spec.is_causal and shapes.q_len <= FEW and shapes.q_len < shapes.kv_len:
        return f"up to {FEW} queries go on from a state, which torch.linear keeps"
    return torch_linear.supports(spec, shapes)


@lru_cache(maxsize=4096)
def _spec_reason(spec: LinearSpec, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    for tensor in spec.tensors:
        if tensor.dtype not in READABLE and tensor.name not in spec.whole:
            return f"{tensor.name} is {tensor.dtype}, which the kernels do not read"
    try:
        linear_source(_kernel(spec, head_dim, value_dim, dtype, MIN_CAPABILITY))
    except LoweringError as error:
        return str(error)
    return None


@lru_cache(maxsize=4096)
def _kernel(
    spec: LinearSpec, width: int, value_dim: int, dtype: torch.dtype, capability: int
) -> LinearKernel:
    name = DTYPES[dtype]
    tile = tile_for(spec, width, value_dim, name, capability)
    return LinearKernel(spec, width, value_dim, name, tile)


def tile_for(
    spec: LinearSpec, width: int, value_dim: int, dtype: str, capability: int
) -> LinearTile:
    """The tile for a call, chosen so that nothing spills; no GPU has timed them.

    Args:
        spec: what is computed; maps in two halves and padding take more registers.
        width: columns of q and k as the kernels get them, at most 256.
        value_dim: Dv, at most 256.
        dtype: of v.
        capability: compute capability times ten.
    """
    warps = 4 if width <= 64 else 8
    columns = min(64, max(16, 1 << (value_dim - 1).bit_length()))
    few = min(32, columns)
    is_heavy = width > 128 or spec.k_map.map == "exp" or spec.seen != sympy.true
    if dtype == "float32":
        return LinearTile(16 if is_heavy else 32, 16, 16 if is_heavy else few, SPAN, warps, 1)
    if is_heavy:
        narrow = width > 64 or dtype == "float16"
        return LinearTile(32, 32, few if narrow else columns, SPAN, warps, 1 if narrow else 2)
    if dtype == "float16":
        return LinearTile(64, 32, columns, SPAN, warps, 1)
    return LinearTile(64, 64 if capability >= 90 else 32, columns, SPAN, warps, 2)


# --- the call -------------------------------------------------------------------------------------


@torch.no_grad()
def forward(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    beside: Beside | None = None,
) -> Tensor:
    """The attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of v.

    A matrix that maps to more than 256 features is left to `torch_linear`: no tile holds a row.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        beside: where the state of all keys is left, as `torch_linear` finds it.

    Raises:
        ShapeError: if the tensors do not fit the spec or each other.
    """
    assert isinstance(spec, LinearSpec)
    check_call(q, k, v)
    call = Call(spec, q, k, tensors, sizes)
    rows, keys = (_projected(x, phi, call.named) for x, phi in ((q, spec.q_map), (k, spec.k_map)))
    if rows.shape[3] > _WIDE:
        return torch_linear.forward(spec, q, k, v, tensors, sizes, beside)
    out = torch.empty(
        (*q.shape[:3], v.shape[3]),
        dtype=torch.float32 if spec.norm == "rms" else v.dtype,
        device=q.device,
    )
    kernel = _kernel(spec, rows.shape[3], v.shape[3], v.dtype, capability_of(str(q.device)))
    if out.numel():
        named = {"q": rows, "k": keys, "v": v, "o": out}
        named |= _states(kernel, call) | {f"t:{n}": x for n, x in call.named.items()}
        _run(kernel, call, named, dict(zip(spec.sizes, (int(n) for n in sizes), strict=True)))
        if beside is not None and call.takes_all:
            torch_linear.keep(beside, call, _last_state(kernel, call, named))
    return _normalised(call, out).to(v.dtype) if spec.norm == "rms" else out


def _projected(x: Tensor, phi: Features, named: Mapping[str, Tensor]) -> Tensor:
    """`x W + b` in float32 where the map has a matrix, else x."""
    return features(x, replace(phi, map="identity"), named) if phi.weight else x


def _states(kernel: LinearKernel, call: Call) -> dict[str, Tensor]:
    """The tensors between the kernels, as their header describes them."""
    spans = -(-call.kv_len // kernel.tile.span)
    heads = call.kv_heads if kernel.is_shared else call.heads
    shape = (call.batch, heads, 1 + spans, kernel.halves * kernel.features)
    made = {"s": torch.empty(*shape, kernel.value_dim, device=call.device)}
    if kernel.spec.norm == "sum":
        made["z"] = torch.empty(shape, device=call.device)
    if kernel.is_numbered:
        assert call.numbers is not None
        number = call.numbers.int().flatten(1, 2).squeeze(2)  # [B or 1, Hq or 1, M]
        made["number"] = number.contiguous().expand(call.batch, call.heads, call.kv_len)
    return made


def _run(kernel: LinearKernel, call: Call, named: dict[str, Tensor], sizes: dict[str, int]) -> None:
    """The three kernels; the second one a second time for the sums."""
    source, tile = linear_source(kernel), kernel.tile
    heads, spans = named["s"].shape[1], named["s"].shape[2] - 1
    numbers = sizes | {"B": call.batch, "L": call.q_len, "M": call.kv_len}
    numbers |= {"H": heads, "G": heads // call.kv_heads}
    columns = -(-kernel.value_dim // tile.columns)
    launch(source, "linear_state_kernel", call.batch * heads * spans * columns, named, numbers)
    for name in ("s", "z"):
        if name in named:
            count = named[name][0, 0, 0].numel()
            programs = call.batch * heads * -(-count // SCAN)
            some = {**named, "s": named[name]}
            launch(source, "linear_scan_kernel", programs, some, numbers | {"N": count})
    first = call.offset or 0
    start = first // tile.queries * tile.queries
    numbers |= {"H": call.heads, "G": call.group, "P": first, "T": start}
    tiles = -(-(first + call.q_len - start) // tile.queries)
    launch(source, "linear_out_kernel", call.batch * call.heads * tiles * columns, named, numbers)


def _normalised(call: Call, out: Tensor) -> Tensor:
    """By the root of the mean square over the features of all heads, and the factor of the
    heads."""
    out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + EPS_RMS)
    factor = call.vectors(call.named).get("heads")
    return out if factor is None else out * factor.flatten(1, 2)


def _last_state(kernel: LinearKernel, call: Call, named: Mapping[str, Tensor]) -> Tensor:
    """The state of all keys, `[B, Hkv, 1 or G, P, Dv]` with a column more for the sums."""
    state = named["s"][:, :, -1]
    if "z" in named:
        state = torch.cat([state, named["z"][:, :, -1, :, None]], dim=-1)
    return state.reshape(call.batch, call.kv_heads, -1, *state.shape[2:])
