"""An edit that concerns few keys: the fused softmax, and a correction over those keys alone.

Where some group of keys has the factor 1 whatever the row (all but sinks and image tokens, say),
the output is that of the attention without the edit, `o`, plus what the other groups change. With
`o_g` the attention to the keys of group g alone, and its mass from the two logsumexps:

    o' = o + Σ_g (a_g - 1) m_g o_g,     m_g = exp(logsumexp_g - logsumexp)

so that fused calls do it. A row whose factors are all 1 is bit for bit the row of the call without
the edit. The error is at most `1 + Σ |a_g - 1| m_g` times the one of `o`: keys of other groups are
not multiplied, so nothing small is made large.

Tried for sinks.var with 576 image tokens of 4096, one core, the fused call without the edit 1.0:
the edit within a softmax in blocks (`torch_blocked`, which keeps every other spec) 2.5; the fused
call, and weights of the few keys by products of matrices 1.5 to 1.6; this 1.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rewriter.kernels.torch_edit_fused import FusedEdit

__all__ = ["edited_at_few_keys"]

MOST_KEYS = 0.5
"""The largest share of the keys that is corrected."""
ROWS = 1024
"""Rows that are corrected together; the fused kernel is fastest with 768 at least."""


def edited_at_few_keys(call: FusedEdit) -> Tensor | None:
    """The edited attention, `[B, Hq, L, Dv]`; None where every group is edited, or too many keys
    are."""
    if all(call.edit.concerned):
        return None
    keys = _concerned(call)
    if max(sum(map(len, x.values())) for x in keys) > MOST_KEYS * call.kv_len:
        return None
    out, lse = call.fused(call.q, call.k, call.v, is_causal=bool(call.is_causal))
    with_sink = call.with_sink(lse, call.block(call.everything))
    if with_sink is not lse:
        out *= torch.exp(lse - with_sink)[..., None]
    for b, groups in enumerate(keys):
        _correct(call, b, groups, out, with_sink)
    return call.finished(out)


def _concerned(call: FusedEdit) -> list[dict[int, Tensor]]:
    """For each batch, the keys of each group that the edit concerns, and last of those without a
    group."""
    assert call.groups is not None
    numbers = [g for g, concerned in enumerate((*call.edit.concerned, True)) if concerned]
    found = [{g: (row == g).nonzero().flatten() for g in numbers} for row in call.groups]
    return [{g: x for g, x in groups.items() if x.numel()} for groups in found]


def _correct(call: FusedEdit, b: int, keys: Mapping[int, Tensor], out: Tensor, lse: Tensor) -> None:
    """Adds what the edit changes to one batch of the output. `keys` are those of each group
    that the edit concerns."""
    groups = {
        g: _Keys(places, *(x[b : b + 1].index_select(2, places) for x in (call.k, call.v)))
        for g, places in keys.items()
    }
    for start in range(0, call.q_len if groups else 0, ROWS):
        rows = slice(start, min(start + ROWS, call.q_len))
        at = slice(b, b + 1), slice(None), rows
        parts = {g: _part(call, call.q[at], rows, x) for g, x in groups.items()}
        _add(call, b, rows, parts, out[at], lse[at])


def _part(call: FusedEdit, q: Tensor, rows: slice, keys: _Keys) -> tuple[Tensor, Tensor] | None:
    """Attention of rows `[1, H, R, D]` to the keys of a group alone, and its logsumexp; None if
    no row sees one of them."""
    if not call.is_causal or keys.last <= rows.start:
        return call.fused(q, keys.k, keys.v)
    if keys.first >= rows.stop:
        return None
    begin = max(rows.start, keys.first)  # rows before it see no key of the group
    count = int((keys.places < rows.stop).sum())
    queries = torch.arange(begin, rows.stop, device=q.device)[:, None]
    mask = q.new_zeros(len(queries), count)
    mask.masked_fill_(keys.places[:count] > queries, -math.inf)
    less = begin - rows.start
    o, lse = call.fused(q[:, :, less:], keys.k[:, :, :count], keys.v[:, :, :count], mask=mask)
    if not less:
        return o, lse
    pad = torch.nn.functional.pad
    return pad(o, (0, 0, less, 0)), pad(lse, (less, 0), value=-math.inf)


def _add(
    call: FusedEdit,
    b: int,
    rows: slice,
    parts: Mapping[int, tuple[Tensor, Tensor] | None],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Adds `(a - 1) m o` of each group to rows of the output, `[1, H, R, Dv]`."""
    spans = {**call.everything, "b": (b, b + 1), "q": (rows.start, rows.stop)}
    x = call.block(spans)
    shares = {g: (p[1] - lse).exp_()[..., None] for g, p in parts.items() if p is not None}
    none = lse.new_zeros(1)
    masses = [shares.get(g, none) for g in range(len(call.edit.factors))]
    for g, part in parts.items():
        if part is None:
            continue
        change = call.factor(x, g, masses) - 1
        if bool(change.any()):
            out.addcmul_(part[0], change * shares[g])


class _Keys:
    """The keys of one group that the edit concerns."""

    def __init__(self, places: Tensor, k: Tensor, v: Tensor) -> None:
        self.places, self.k, self.v = places, k, v
        self.first, self.last = int(places[0]), int(places[-1])
