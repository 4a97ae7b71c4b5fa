"""Causal linear attention as one operator of ONNX Runtime, `com.microsoft::LinearAttention`.

The operator keeps a state `S_t = e^g_t S_{t-1} + k_t v_t` and gives `q_t S_t`: it decays before it
adds, as `LinearSpec` does. It runs in files of any opset, in float32.

It is taken wherever it fits because it was never slower. Measured against the form by chunks in
ONNX Runtime 1.32 (one thread, one row, 8 heads of 64 values, decay), how many times as fast it is:

    tokens          16     64    256    512   1024   2048
    64 features    9.7    2.4    1.5    1.6    2.0    1.3
    16 features     13    4.7    2.6    3.2    3.6    2.3

Without decay it is 1.07 times as fast at 2048 tokens and 64 features, and 1.3 to 9 elsewhere.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from rewriter.kernels.onnx_site import SiteWriter

__all__ = ["by_operator"]

aten = torch.ops.aten


def by_operator(
    site: SiteWriter,
    queries: Node,
    keys: Node,
    values: Node,
    seen: Node | None,
    decay: Node | None,
    past: Node | None = None,
) -> tuple[Node, Node]:
    """The sums over the keys up to each query `[B, Hq, N, Dv]`, and the state after the last key
    `[B, H, P, Dv]`.

    Args:
        site: where this is written.
        queries: `[B, Hq, N, P]`.
        keys: `[B, H, N, P]`, 0 where a key does not take part; `Hq` is a multiple of H.
        values: `[B, H, N, Dv]`.
        seen: which keys take part and so make the state decay, `[., ., 1, N]`; None: all do.
        decay: logarithm of the factor of each key, `[H, 1, 1]` or one number; None: 1.
        past: the state before the first key; None: 0.
    """
    write = site.write
    heads, kv_heads = (int(write.value(x).shape[1]) for x in (queries, keys))
    gate = None if decay is None else _gate(site, keys, seen, decay)
    batch, _, length, size = (write.size(queries, i) for i in range(4))
    width = write.size(values, 3)
    inputs = [*(_packed(site, x) for x in (queries, keys, values)), past, gate]
    shapes = [[batch, length, heads * width], [batch, kv_heads, size, width]]
    rule = "linear" if gate is None else "gated"
    both = _operator(site, inputs, shapes, q_num_heads=heads, kv_num_heads=kv_heads, rule=rule)
    out, state = (write(operator.getitem, both, i) for i in range(2))
    out = write(aten.reshape.default, out, [batch, length, heads, width])
    return write(aten.transpose.int, out, 1, 2), state


def _packed(site: SiteWriter, x: Node) -> Node:
    """`[B, N, H F]` from `[B, H, N, F]`."""
    write = site.write
    batch, heads, length, width = (write.size(x, i) for i in range(4))
    return write(
        aten.reshape.default, write(aten.transpose.int, x, 1, 2), [batch, length, heads * width]
    )


def _gate(site: SiteWriter, keys: Node, seen: Node | None, decay: Node) -> Node:
    """The logarithm of the factor that each key brings, `[B, N, H]`."""
    write = site.write
    batch, heads, length = (write.size(keys, i) for i in range(3))
    gate = site.full_rank(decay)
    if seen is not None:
        gate = site.where(site.of_rows(seen), gate, 0.0)
    gate = write(aten.expand.default, gate, [batch, heads, length, 1])
    return write(aten.transpose.int, write(aten.squeeze.dim, gate, -1), 1, 2)


def _operator(
    site: SiteWriter, inputs: list[Node | None], shapes: list[list[Any]], *, rule: str, **heads: int
) -> Node:
    """The node, with its attributes as `torch.onnx.ops.symbolic_multi_out` writes them."""
    import torch.onnx.ops  # registers it

    names = [*heads, "scale", "update_rule"]
    float32 = 1  # of ONNX
    target: Any = torch.ops.onnx_symbolic._symbolic_multi_out.default
    return site.write(
        target,
        inputs,
        "LinearAttention",
        [float32, float32],
        shapes=shapes,
        attr_keys=names,
        attr_types=["i", "i", "f", "s"],
        attr_pos=[[0, 1], [1, 2], [0, 1], [0, 1]],
        attr_ints=list(heads.values()),
        attr_floats=[1.0],
        attr_strs=[rule],
        metadata_props_keys=[],
        metadata_props_values=[],
        domain="com.microsoft",
        version=1,
    )
