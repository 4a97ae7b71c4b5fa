"""Softmax attention that leaves out the rows of heads that are off (`torch.compact`).

Where the factor of the heads is often exactly 0 (mixture of heads, arXiv 2410.11842; ablated
heads), the factor is evaluated first, and the rows (head, query) that are on are packed densely
(`torch_compact_rows`). A tile of 64 rows that is skipped only if all are off would save nothing.

Under a causal mask alone, packed rows go through the fused kernel (`torch_compact_causal`); else
chunks of them go through a softmax in blocks (`torch_compact_chunks`, `torch_compact_blocks`), with
formulas evaluated at the packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels.torch_compact_blocks import Chunked
from rewriter.kernels.torch_compact_causal import causal, causal_offset_of, is_causal
from rewriter.kernels.torch_compact_rows import Packed
from rewriter.kernels.torch_plan import Plan, plan_of
from rewriter.kernels.torch_softmax import blocked_supports
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["compact_forward", "compact_supports"]

MOST_ACTIVE = 0.8
"""The largest share of heads that is on for which packing pays: gathering rows, and products that
are smaller than those of the dense form, cost some 10 % of the dense time. With 75 % of the heads
on, 2048 tokens take 0.82 to 0.87 of it; with 50 %, 0.52 to 0.67 (one core, float32)."""
FEWEST_SCORES = 2**21
"""Scores of the dense form below which the Python of packing takes longer than what it saves. With
8 heads of which 4 are on, 512 tokens take 0.9 of the dense time, and 256 tokens 1.4."""
MOST_CAUSAL = 0.55
FEWEST_CAUSAL = 2**23
"""The same two where the dense form is one fused causal call. With 4 of 8 heads on, 1024 tokens
take 0.87 of its time, 2048 take 0.7, and 4096 take 0.55; with 6 on, 2048 take 0.95."""


# --- what it takes --------------------------------------------------------------------------------


def compact_supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    """None if leaving out heads that are off computes the spec, and pays; else the reason."""
    if spec.active is None:
        return "how many heads are off is not known"
    if shapes.device != "cpu":
        return f"it is measured on CPUs only, not on {shapes.device}"
    reason = blocked_supports(spec, shapes)
    if reason is not None:
        return reason
    if spec.edit is not None:
        return "the weights are edited by groups of keys"
    if spec.dropout:
        return "its dropout would not be the one of the backward"
    if spec.masked == "nan" and spec.sink is None and not _always_sees(spec):
        return "rows without a key would be NaN in heads that are off, too"
    plan = plan_of(spec.to_json())
    is_fused = is_causal(plan)
    if shapes.grad and (is_fused or _is_bare(plan)):
        return "the gradients of all heads are computed, and faster by what autograd records"
    most, fewest = (MOST_CAUSAL, FEWEST_CAUSAL) if is_fused else (MOST_ACTIVE, FEWEST_SCORES)
    if spec.active > most * shapes.heads:
        return f"{spec.active} of {shapes.heads} heads may be on, too many for packing to pay"
    if shapes.batch * shapes.heads * shapes.q_len * shapes.kv_len < fewest:
        return "there are too few scores for packing to pay"
    return None


def _is_bare(plan: Plan) -> bool:
    """The weights are the softmax of the scaled product over all keys."""
    return (
        plan.code.is_linear and plan.code.bias is None and not plan.terms and plan.code.sink is None
    )


def _always_sees(spec: SoftmaxSpec) -> bool:
    """The mask is `k <= q` or nothing, so that each query sees a key."""
    return spec.mask in (sympy.true, sym.k <= sym.q)


def compact_forward(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """The attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of v.

    Takes what `compact_supports` takes, however few heads are off. Rows of heads that are off are
    0, whatever they would have been; the work for them is left out, that for keys and values is
    not.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
    """
    with torch.no_grad():
        call = Packed(spec, q, k, v, tensors, sizes)
        offset = causal_offset_of(call)
        if offset is not None:
            return causal(call, offset)
        one_call = _is_bare(call.plan) and call.value_dim == q.shape[-1]
        return Chunked(call, one_call=one_call).run()
