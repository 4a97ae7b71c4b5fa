"""Tensors that a spec reads and a model does not have: their programs, on random inputs.

What a pass adds to a spec is computed beside the attention from taps and new parameters
(`rewriter.stages.Source`). Here the taps are drawn, and so are the parameters, around their initial
values, so that a gate that starts at one number is not one number.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rewriter.additions import initial_value
from rewriter.stages import Parameter, Source, Tap

__all__ = ["HIDDEN", "LABELS", "computed"]

HIDDEN = 24
"""Width of the hidden states of every site."""
LABELS = 4
"""Labels that a user gives of keys are 0 to this, exclusive."""
_SPREAD = 0.3


def computed(
    source: Source,
    qkv: tuple[Tensor, Tensor, Tensor],
    generator: Generator,
    *,
    untrained: bool = False,
) -> Tensor:
    """What the program gives for these operands, without a gradient; a tensor of the keys of a
    prompt goes on with what later keys have."""
    q, k, v = qkv
    taps = [_tap(tap, q, k, v, generator) for tap in source.taps]
    spread = 0.0 if untrained else _SPREAD
    parameters = [_parameter(p, generator, spread) for p in source.parameters]
    with torch.no_grad():
        found: Tensor = source.compute(*taps, *parameters, **dict(source.options))
        if source.later is None or found.shape[-1] == k.shape[2]:
            return found
        more = (*found.shape[:-1], k.shape[2] - found.shape[-1])
        later: Tensor = found.new_full(more, source.later)
        return torch.cat([found, later], dim=-1)


def _tap(tap: Tap, q: Tensor, k: Tensor, v: Tensor, generator: Generator) -> Tensor:
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    match tap:
        case "q":
            return q
        case "k":
            return k
        case "v":
            return v
        case "labels":
            return torch.randint(LABELS, (batch, kv_len), generator=generator)
        case "patch":
            return torch.randn(batch, heads, q_len, v.shape[3], generator=generator).to(v.dtype)
    return torch.randn(batch, q_len, HIDDEN, generator=generator).to(q.dtype)


def _parameter(parameter: Parameter, generator: Generator, spread: float) -> Tensor:
    start = initial_value(parameter, generator)
    if not parameter.trained or parameter.initial == "kaiming":  # which is random as it is
        return start
    return start + spread * torch.randn(parameter.shape, generator=generator)
