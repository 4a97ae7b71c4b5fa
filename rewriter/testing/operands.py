"""The tensors of a case, drawn from a seed.

Floating ones lie in memory between NaNs, so that whatever reads beside them shows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.evaluate import evaluate, index_values
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec, TensorArg
from rewriter.testing.cases import Case, Hidden, Layout
from rewriter.testing.sources import computed

__all__ = ["Operands", "operands", "seen_keys", "shuffled"]


@dataclass(frozen=True)
class Operands:
    """What a lowering is called with, after the spec."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()

    def rows(self, spec: Spec, first: int, stop: int) -> Operands:
        """A step of decoding: queries `first` to `stop - 1`, and the keys that there were then."""
        keys = self.k.shape[2] - self.q.shape[2] + stop
        parts = {sym.q: slice(first, stop), sym.k: slice(0, keys)}
        found = {r.tensor: r.index for f in spec.formulas for r in sym.reads(f)}
        if spec.patch is not None:
            found[spec.patch.tensor] = (sym.b, sym.h, sym.q)
        tensors = [
            x[tuple(parts.get(i, slice(None)) for i in found[t.name])] if t.name in found else x
            for t, x in zip(spec.tensors, self.tensors, strict=True)
        ]
        sizes = [
            keys - (stop - first) if name == "past" else n
            for name, n in zip(spec.sizes, self.sizes, strict=True)
        ]
        q, k, v = self.q[:, :, first:stop], self.k[:, :, :keys], self.v[:, :, :keys]
        return Operands(q, k, v, tuple(tensors), tuple(sizes))

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The same with every floating tensor changed."""
        q, k, v, *rest = (
            change(x) if x.is_floating_point() else x
            for x in (self.q, self.k, self.v, *self.tensors)
        )
        return Operands(q, k, v, tuple(rest), self.sizes)


def operands(case: Case) -> Operands:
    """The tensors of a case; the same for every call."""
    generator = torch.Generator().manual_seed(case.seed)
    d = case.dims
    x = [
        torch.randn(d.batch, heads, length, dim, generator=generator)
        for heads, length, dim in (
            (d.heads, d.q_len, d.head_dim),
            (d.kv_heads, d.kv_len, d.head_dim),
            (d.kv_heads, d.kv_len, d.value_dim),
        )
    ]
    x[0] = x[0] * case.logits
    q, k, v = (_laid_out(y.to(case.dtype), case.layout, case.device) for y in x)
    return Operands(q, k, v, _tensors(case, q, k, v), case.sizes)


def _laid_out(x: Tensor, layout: Layout, device: str) -> Tensor:
    match layout:
        case "BLHD":
            return _between_nans(x.transpose(1, 2), device).transpose(1, 2)
        case "BHDL":
            return _between_nans(x.mT, device).mT
        case "gaps":
            pairs = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)
            return _between_nans(pairs, device)[..., 0]
        case "expanded":
            return _between_nans(x[:1], device).expand(x.shape[0], -1, -1, -1)
    return _between_nans(x, device)


_MARGIN = 256  # elements on each side


def _between_nans(x: Tensor, device: str) -> Tensor:
    """A contiguous copy with NaNs in front of it and behind it."""
    x = x.to(device)
    if not x.is_floating_point():
        return x.contiguous()
    whole = torch.full((x.numel() + 2 * _MARGIN,), torch.nan, dtype=x.dtype, device=device)
    inside = whole[_MARGIN : _MARGIN + x.numel()].view(x.shape)
    return inside.copy_(x)


def _tensors(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the same name have the same values, whatever else a spec reads."""
    made: dict[str, Tensor] = {}
    for arg in case.spec.tensors:
        generator = torch.Generator().manual_seed(case.seed + zlib.crc32(arg.name.encode()))
        known = _KNOWN.get(arg.name)
        if arg.source is not None:
            x = computed(
                arg.source, (q.cpu(), k.cpu(), v.cpu()), generator, untrained=case.untrained
            )
        elif known is not None:
            x = known(case, generator)
        else:
            found = _whole(case, arg, generator)
            x = _fitting(case, arg, made, generator) if found is None else found
        made[arg.name] = x.to(getattr(torch, arg.dtype))
    return tuple(_between_nans(x, case.device) for x in made.values())


_KNOWN: dict[str, Callable[[Case, torch.Generator], Tensor]] = {
    "pad": lambda c, g: seen_keys(c.dims.batch, c.dims.kv_len, c.hidden),
    "document": lambda c, g: (torch.arange(c.dims.kv_len) // 20).expand(c.dims.batch, -1),
    "slope": lambda c, g: -torch.rand(c.dims.heads, generator=g),
    "reach": lambda c, g: 3 + 4 * torch.arange(c.dims.heads),
    "temperature": lambda c, g: 0.5 + torch.rand(c.dims.heads, generator=g),
    "gate": lambda c, g: torch.rand(c.dims.batch, c.dims.heads, c.dims.q_len, generator=g),
    "table": lambda c, g: torch.randn(32, c.dims.heads, generator=g),
    "decay": lambda c, g: -0.3 * torch.rand(c.dims.heads, generator=g),
    "rows": lambda c, g: torch.rand(c.dims.batch, c.dims.q_len, generator=g) < 0.4,
    "query_gate": lambda c, g: torch.rand(c.dims.batch, c.dims.heads, c.dims.q_len, generator=g),
    "key_gate": lambda c, g: torch.rand(c.dims.batch, c.dims.heads, c.dims.kv_len, generator=g),
}


def seen_keys(batch: int, kv_len: int, hidden: Hidden) -> Tensor:
    """`[B, M]`, False where the last sequence has padding."""
    seen = torch.ones(batch, kv_len, dtype=torch.bool)
    count = max(1, kv_len // 3)
    if hidden == "all":
        seen[-1] = False
    else:
        seen[-1, slice(0, count) if hidden == "left" else slice(kv_len - count, None)] = False
    return seen


def _whole(case: Case, arg: TensorArg, generator: torch.Generator) -> Tensor | None:
    """Random values for a tensor that is used as it is; None if it is not."""
    spec, d, name = case.spec, case.dims, arg.name
    shape: tuple[int, ...] = ()
    if spec.patch is not None and name == spec.patch.tensor:
        shape = (d.batch, d.heads, d.q_len, d.value_dim)
    elif isinstance(spec, SoftmaxSpec) and spec.local is not None and name in spec.whole:
        channels = d.heads * d.value_dim
        shape = (channels, 1, 3, 3) if name == spec.local.weight else (channels,)
    elif isinstance(spec, LinearSpec) and name in spec.whole:
        heads = d.heads if name in spec.q_map.tensors else d.kv_heads
        inside = (d.head_dim,) if name in (spec.q_map.weight, spec.k_map.weight) else ()
        shape = (heads, *inside, _FEATURES)
    if not shape:
        return None
    x = torch.randn(shape, generator=generator)
    return x * shape[1] ** -0.5 if len(shape) == 3 else x


_FEATURES = 6


def _on(gates: Tensor, active: int, generator: torch.Generator) -> Tensor:
    """Gates `[B, H, L]` of which at most `active` heads a token are not 0; of some tokens none."""
    batch, heads, length = gates.shape
    rank = torch.rand(batch, heads, length, generator=generator).argsort(1).argsort(1)
    most = torch.randint(active + 1, (batch, 1, length), generator=generator)
    return torch.where(rank < most, gates, 0.0)


def _groups(case: Case) -> dict[str, int]:
    """How many groups there are, by the tensors that a group is read from as it is."""
    edit = case.spec.edit if isinstance(case.spec, SoftmaxSpec) else None
    if edit is None or not isinstance(edit.group, sym.Read):
        return {}
    return {edit.group.tensor: len(edit.factors)}


def _fitting(
    case: Case, arg: TensorArg, made: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Random values for a tensor of which only the reads are known, as large as they need it."""
    d, extent = case.dims, [1] * arg.rank
    device = torch.device("cpu")
    values = index_values(case.spec, d.batch, d.heads, d.q_len, d.kv_len, case.sizes, device)
    for read in (r for f in case.spec.formulas for r in sym.reads(f) if r.tensor == arg.name):
        for axis, index in enumerate(read.index):
            at = evaluate(index, values, dict(made), torch.float64)
            last = int(at.max()) if isinstance(at, Tensor) else int(at)
            extent[axis] = max(extent[axis], last + 1)
    if arg.name in _groups(case):
        return torch.randint(_groups(case)[arg.name], extent, generator=generator)
    if "float" not in arg.dtype:
        return torch.ones(extent, dtype=torch.int64)
    x = torch.randn(extent, generator=generator)
    active = case.spec.active
    gated = active is not None and arg.rank == 3 and arg.name in _read_by(case.spec.heads)
    return _on(x, active or 0, generator) if gated else x


def _read_by(formula: sym.Formula) -> set[str]:
    return {r.tensor for r in sym.reads(formula)}


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation that moves something, if there is something to move."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randperm(count, generator=generator)
    return found if not torch.equal(found, torch.arange(count)) else found.roll(1)
