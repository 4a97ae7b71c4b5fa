"""The edit stage in blocks: weights times a factor of the key's group, and its gradient.

A row has as many masses as there are groups, from one product of its weights with the one-hot of
the groups. The factors of a row are then gathered by group and multiplied in place: a factor of 1
leaves a row bit for bit as it was, and a factor that is infinite for a group without keys does no
harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.torch_block import Block, Value
from rewriter.kernels.torch_code import EditCode

__all__ = ["EditedBlock", "groups_of"]


class EditedBlock:
    """The groups of a block's keys, and the masses and factors of its rows.

    Only the range of keys from the first to the last one that the edit concerns is touched: whose
    group has a factor other than 1, or a mass that is read.
    """

    def __init__(self, code: EditCode, x: Block, p: Tensor, share: Tensor | None) -> None:
        """Args:
        p: the weights before the edit, `[B, H, rows, K]`.
        share: what the keys together get beside a sink, `[B, H, rows, 1]`, if that is not in p.
        """
        self.code, self.x, self.count = code, x, len(code.factors)
        groups = groups_of(x, code)
        self.keys = _concerned(groups, code.concerned)
        self.groups = groups[..., self.keys]
        self.masses: tuple[Tensor, ...] = ()
        if code.reads_masses:
            sums = self.sums(p[..., self.keys])
            sums = sums if share is None else sums * share
            self.masses = tuple(torch.split(sums, 1, -1))

    @property
    def width(self) -> int:
        """How many keys the edit touches."""
        return self.groups.shape[3]

    def sums(self, w: Tensor) -> Tensor:
        """The sum of w `[B, H, rows, keys]` over each group, `[B, H, rows, groups]`. Of groups that
        the edit does not concern it may be a part."""
        numbers = torch.arange(self.count, device=w.device).view(-1, 1)
        member = (self.groups == numbers).to(w.dtype)  # [B or 1, H or 1, groups, keys]
        if member.shape[:2] == (1, 1):  # two dimensions: one product for all heads
            return w @ member[0, 0].mT
        return w @ member.mT

    def factors(self) -> list[Tensor]:
        """The factor of each group, broadcastable to `[B, H, rows, 1]`."""
        return [self._tensor(factor(self.x, self.masses)) for factor in self.code.factors]

    def through_masses(self, t: Tensor) -> list[Tensor] | None:
        """`b_g`, the sum over groups g' of `d a_g' / d m_g` times `t_g'`; None if that is 0.

        Args:
            t: the sum over the keys of each group of weight times gradient, `[B, H, rows, groups]`.
        """
        found: dict[int, Tensor] = {}
        for factor, mass, slope in self.code.slopes:
            term = self._tensor(slope(self.x, self.masses)) * t[..., factor : factor + 1]
            found[mass] = found[mass] + term if mass in found else term
        zero = self.x.value(0.0)
        return [found.get(g, zero) for g in range(self.count)] if found else None

    def spread(self, values: Sequence[Tensor], out: Tensor) -> Tensor:
        """The value of each key's group, `[B, H, rows, keys]`, in `out`; 0 for no group."""
        shape = (*out.shape[:3], 1)
        columns = [v.detach().expand(shape) for v in (*values, self.x.value(0.0))]
        return torch.gather(torch.cat(columns, dim=-1), -1, self.groups.expand(out.shape), out=out)

    def _tensor(self, value: Value) -> Tensor:
        return (value if isinstance(value, Tensor) else self.x.value(value)).to(self.x.dtype)


def groups_of(x: Block, code: EditCode) -> Tensor:
    """The group of each key of the block, `[B or 1, H or 1, 1, K]`; as many as there are groups for
    a number that is none."""
    value, count = code.group(x), len(code.factors)
    found = value if isinstance(value, Tensor) else x.value(value)
    outside = (found < 0) | (found >= count) | (found != found.to(torch.int64))
    found = found.to(torch.int64).masked_fill(outside, count)
    found = found[(None,) * (4 - found.dim())]
    return found.expand(*found.shape[:3], x.shape[3])


def _concerned(groups: Tensor, concerned: Sequence[bool]) -> slice:
    """The range from the first to the last key of such a group; a key without a group is one."""
    if all(concerned):
        return slice(0, groups.shape[3])
    table = torch.tensor((*concerned, True), device=groups.device)
    keys = table[groups].flatten(0, 2).any(0).nonzero()
    return slice(int(keys[0]), int(keys[-1]) + 1) if keys.numel() else slice(0, 0)
