"""An edit whose groups are a few ranges of keys: a fused call or two for each of them.

A range of keys is seen whole by the rows behind it, and by the rows within it under a causal mask
of their own. Where the first keys are removed, say, that is one call for the rest, and as fast as
the attention without the edit; in blocks (`torch_blocked`) it takes twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewriter.kernels.torch_edit_fused import FusedEdit
from rewriter.kernels.torch_flash import join

__all__ = ["edited_in_spans"]

MOST_SPANS = 8
"""Ranges of keys of one batch: each is a part that has to be joined to others."""

Part = tuple[Tensor, Tensor]
"""Attention to some keys `[1, H, L, Dv]`, and its logsumexp `[1, H, L]`; 0 and minus infinity for
rows that see none of them."""


def edited_in_spans(call: FusedEdit) -> Tensor | None:
    """The edited attention, `[B, Hq, L, Dv]`; None if there are too many ranges."""
    assert call.groups is not None
    spans = [_spans_of(row) for row in call.groups]
    if max(map(len, spans)) > MOST_SPANS:
        return None
    found = [_one_batch(call, b, x) for b, x in enumerate(spans)]
    return call.finished(torch.cat(found) if len(found) > 1 else found[0])


def _spans_of(groups: Tensor) -> list[tuple[int, int, int]]:
    """Group, first key and end of each range of keys of one group."""
    ends = (groups.diff() != 0).nonzero().flatten() + 1
    edges = [0, *ends.tolist(), len(groups)]
    numbers = groups[edges[:-1]].tolist()
    return list(zip(numbers, edges[:-1], edges[1:], strict=True))


def _one_batch(call: FusedEdit, b: int, spans: list[tuple[int, int, int]]) -> Tensor:
    parts: dict[int, Part] = {}
    for group, start, stop in spans:
        for rows, part in _calls(call, b, start, stop):
            if group not in parts:
                parts[group] = _nothing(call)
            out, lse = parts[group]
            join(out[:, :, rows], lse[:, :, rows], *part)
    lse = torch.logsumexp(torch.stack([x for _, x in parts.values()]), 0)
    x = call.block({**call.everything, "b": (b, b + 1)})
    lse = call.with_sink(lse, x)
    shares = {g: (part[1] - lse).exp_()[..., None] for g, part in parts.items()}
    none = lse.new_zeros(1)
    masses = [shares.get(g, none) for g in range(len(call.edit.factors))]
    found = torch.zeros_like(call.q[b : b + 1], memory_format=torch.contiguous_format)
    for g, (out, _) in parts.items():
        found.addcmul_(out, call.factor(x, g, masses) * shares[g])
    return found


def _calls(call: FusedEdit, b: int, start: int, stop: int) -> Iterator[tuple[slice, Part]]:
    """Rows, and their attention to the keys from `start` to `stop - 1`."""
    at = slice(b, b + 1)
    q, k, v = call.q[at], call.k[at, :, start:stop], call.v[at, :, start:stop]
    if not call.is_causal:
        yield slice(None), call.fused(q, k, v)
        return
    within = slice(start, min(stop, call.q_len))
    count = within.stop - within.start
    if count > 0:
        yield within, call.fused(q[:, :, within], k[:, :, :count], v[:, :, :count], is_causal=True)
    if stop < call.q_len:
        behind = slice(stop, call.q_len)
        yield behind, call.fused(q[:, :, behind], k, v)


def _nothing(call: FusedEdit) -> Part:
    out = torch.zeros_like(call.q[:1], memory_format=torch.contiguous_format)
    return out, out.new_full(out.shape[:3], -torch.inf)
