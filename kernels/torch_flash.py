"""The fused softmax attention of torch on a CPU, with the logsumexp that joins partial results.

`scaled_dot_product_attention` calls the same kernel and keeps its logsumexp to itself. Attention to
one set of keys and to another one, joined by `join`, is attention to both.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

__all__ = ["dense", "flash", "join"]


def dense(x: Tensor) -> Tensor:
    """The tensor, copied where its last dimension is not contiguous: the kernel takes it as that,
    whatever its stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, L, D]` and the natural logsumexp `[B, H, L]`, in float32 at least.

    Every row has to see a key: another one gives what the kernel of this version of torch likes.

    Args:
        q: queries `[B, H, L, D]`; k, v: `[B, H, M, D]`.
        scale: multiplies the product.
        is_causal: key k is seen by query q if `k <= q`.
        mask: added to the scaled product, broadcastable to `[B, H, L, M]`.
    """
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        dense(q), dense(k), dense(v), 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return cast(tuple[Tensor, Tensor], found)


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Adds attention to further keys to `out` `[..., D]` and `lse` `[...]`, in place."""
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)
