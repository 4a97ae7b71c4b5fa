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
from rewriter.errors import LoweringError, ShapeError
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
from rewriter.kernels.triton_lines import padded
from rewriter.kernels.triton_source import Source, launch
from rewriter.linear import EPS_RMS, EPS_SUM, Features, LinearSpec
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
"""Features that a tile holds; a matrix may map to more."""
_PART = 128
"""So many of them at a time then: they are float32, and more of those would spill."""


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


def source_of(
    spec: LinearSpec, head_dim: int, value_dim: int, dtype: torch.dtype, capability: int
) -> Source:
    """The file that a call runs."""
    return linear_source(_kernel(spec, head_dim, value_dim, dtype, capability))


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
        value_dim: Dv, at most 256, and one more where sums of weights stand beside v.
        dtype: of v.
        capability: compute capability times ten.
    """
    warps = 4 if width <= 64 else 8
    columns = min(64, padded(value_dim))
    few = min(32, columns)
    is_heavy = width > 128 or spec.k_map.map == "exp" or spec.seen != sympy.true
    if dtype == "float32":
        is_heavy |= width > 64
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
    if not (q.shape[:3].numel() and v.shape[3]):
        return v.new_empty((*q.shape[:3], v.shape[3]))
    numbers = dict(zip(spec.sizes, (int(n) for n in sizes), strict=True))
    rows, keys = (_projected(x, phi, call.named) for x, phi in ((q, spec.q_map), (k, spec.k_map)))
    if rows.shape[3] != keys.shape[3]:
        raise ShapeError(
            f"the maps give {rows.shape[3]} features of a query and {keys.shape[3]} of a key; "
            "they have to agree"
        )
    run = _run_by_parts if rows.shape[3] > _WIDE else _run
    out, state = run(spec, call, (rows, keys, v), numbers)
    if beside is not None and call.takes_all:
        torch_linear.keep(beside, call, state.clone())  # a view would hold every span's
    if spec.norm == "rms":
        out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + EPS_RMS)
    if spec.norm == "rms" or rows.shape[3] > _WIDE:
        out = _times_heads(call, out)
    return out.to(v.dtype)


def _run_by_parts(
    spec: LinearSpec, call: Call, qkv: tuple[Tensor, Tensor, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """`_run` for more features than a tile holds, some of them at a time: the outputs are added up,
    and a column of ones beside v gives the sums of the weights. The factor of the heads is left
    out."""
    maps, v = (spec.q_map, spec.k_map), qkv[2]
    q, k = (features(x, Features(phi.map), {}) for x, phi in zip(qkv, maps, strict=False))
    if spec.norm == "sum":
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=3)
    plain = [replace(phi, map="identity") for phi in maps]
    part = replace(spec, q_map=plain[0], k_map=plain[1], norm="rms")  # no norm in the kernels
    count = -(-q.shape[3] // _PART)
    pieces = zip(q.chunk(count, dim=3), k.chunk(count, dim=3), strict=True)
    out, states = torch.zeros((), device=q.device), []
    for piece in pieces:
        found, state = _run(part, call, (*piece, v), sizes)
        out = out + found
        states.append(state.clone())
    if spec.norm == "sum":
        out = out[..., :-1] / (out[..., -1:] + EPS_SUM)
    return out, torch.cat(states, dim=3)


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


def _run(
    spec: LinearSpec, call: Call, qkv: tuple[Tensor, Tensor, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """The three kernels, the second one a second time for the sums.

    Args:
        spec: what they compute, its matrices left out.
        qkv: queries and keys after the matrices, and values.

    Returns:
        The output, in float32 and before the factor of the heads if `norm="rms"`, else in the dtype
        of v; and the state of all keys.
    """
    q, k, v = qkv
    kernel = _kernel(spec, q.shape[3], v.shape[3], v.dtype, capability_of(str(q.device)))
    dtype = torch.float32 if spec.norm == "rms" else v.dtype
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
    named = {"q": q, "k": k, "v": v, "o": out, **_states(kernel, call)}
    named |= {f"t:{n}": x for n, x in call.named.items()}
    source, tile = linear_source(kernel), kernel.tile
    heads, spans = named["s"].shape[1], named["s"].shape[2] - 1
    numbers = {**sizes, "B": call.batch, "L": call.q_len, "M": call.kv_len}
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
    return out, _last_state(call, named)


def _times_heads(call: Call, out: Tensor) -> Tensor:
    """The output times the factor of its head."""
    factor = call.vectors(call.named).get("heads")
    return out if factor is None else out * factor.flatten(1, 2)


def _last_state(call: Call, named: Mapping[str, Tensor]) -> Tensor:
    """The state of all keys, `[B, Hkv, 1 or G, P, Dv]` with a column more for the sums."""
    state = named["s"][:, :, -1]
    if "z" in named:
        state = torch.cat([state, named["z"][:, :, -1, :, None]], dim=-1)
    return state.reshape(call.batch, call.kv_heads, -1, *state.shape[2:])
