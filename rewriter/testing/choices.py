"""How one attention is spelled as torch code, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Choices"]


@dataclass(frozen=True)
class Choices:
    """How an attention is spelled. The defaults are the plainest one."""

    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    value_dim: int = 4
    batch: int = 2
    q_len: int = 6
    kv_len: int = 6
    dtype: str = "float32"
    cross: bool = False
    """Keys and values come from `memory`."""
    projection: str = "separate"
    """separate, chunk, unbind, shared (values are keys)"""
    layout: str = "transpose"
    """transpose, permute, rearranged: how heads get before rows"""
    product: str = "matmul"
    """matmul, bmm, baddbmm, einsum, keys first, sdpa"""
    repeat: str = "interleave"
    """interleave, expand, index, tile, gqa, five dims: how key heads meet query heads"""
    scale: str = "product"
    """none, product, divide, q, divide q, k, both, tensor, learned"""
    norm: str = "no"
    """no, l2: of queries and keys"""
    masks: tuple[str, ...] = ()
    """causal, window, padding, prefix, documents; rows: queries of the padding see nothing"""
    hiding: str = "fill lowest"
    """bool (sdpa), add lowest, add inf, fill lowest, fill inf, where, subtract"""
    how_often: str = "once"
    """once: one mask that is a conjunction; each: one after the other"""
    causal: str = "positions"
    """tril, triu, positions, buffer"""
    bias: str = "none"
    """none, table, alibi, per head, positions, grid"""
    bias_last: bool = False
    """The bias is added after keys were hidden."""
    cap: bool = False
    softmax: str = "functional"
    """functional, method, dim, less maximum, special"""
    cast: str = "no"
    """no, argument, before: softmax in float32"""
    dropout: bool = False
    """A dropout module on the weights, inactive while evaluating."""
    sink: str = "none"
    """none, last, first: a learned column beside the keys; data: one that is computed"""
    values: str = "matmul"
    """matmul, bmm, einsum, left"""
    merge: str = "transpose"
    """transpose, permute, einsum: how heads get back behind rows"""
    is_causal: bool = False
    """The argument of `scaled_dot_product_attention`."""
    near_miss: str = ""
    seed: int = 0

    @property
    def width(self) -> int:
        return 8

    @property
    def is_flat(self) -> bool:
        """Heads are counted with the batch."""
        return self.product in ("bmm", "baddbmm")
