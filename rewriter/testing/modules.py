"""Random attention modules as real torch code, for Hypothesis.

`modules()` draws how one attention is spelled: products, layout, where the scale stands, how keys
are hidden, biases, casts, grouped heads, sinks. `modules(near_misses=...)` changes something on the
way so that it only looks like attention, or is one that cannot be fused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.testing.choices import Choices
from rewriter.testing.near_misses import NEAR_MISSES
from rewriter.testing.spellings import Attention

__all__ = ["Drawn", "choices", "modules"]

_SDPA_MASKS = ("bool", "add lowest", "add inf", "fill lowest", "fill inf", "where")
_MASKS = ("causal", "window", "padding", "prefix", "rows", "documents")
_PRODUCTS = ("matmul", "matmul", "bmm", "baddbmm", "einsum", "keys first")
_SCALES = ("none", "product", "divide", "q", "divide q", "k", "both", "tensor", "learned")
_BIASES = ("none", "none", "table", "alibi", "per head", "positions", "grid")


@dataclass(frozen=True)
class Drawn:
    """A module, what to call it with, and how it was drawn."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    choices: Choices

    @staticmethod
    def of(c: Choices) -> Drawn:
        """The module of these choices, in evaluation mode; equal choices give equal numbers."""
        dtype = getattr(torch, c.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            module = Attention(c).to(dtype).eval()
            x = torch.randn(c.batch, c.q_len, c.width, dtype=dtype)
            memory = torch.randn(c.batch, c.kv_len, c.width, dtype=dtype)
        pad = torch.ones(c.batch, c.kv_len, dtype=torch.bool)
        hidden = max(1, c.kv_len // 3)
        pad[-1, slice(0, hidden) if c.seed % 2 else slice(c.kv_len - hidden, None)] = False
        return Drawn(module, (x, memory, pad), c)

    def __repr__(self) -> str:
        plain = Choices()
        said = {f.name: getattr(self.choices, f.name) for f in fields(plain)}
        other = [f"{n}={x!r}" for n, x in said.items() if x != getattr(plain, n)]
        return f"Drawn.of(Choices({', '.join(other)}))"


@st.composite
def choices(draw: st.DrawFn, *, near_misses: bool = False) -> Choices:
    """How one attention is spelled; what cannot stand together is never drawn together.

    Args:
        near_misses: change something on the way; else the attention is an honest one.
    """

    def one_of(*values: str) -> str:
        return draw(st.sampled_from(values))

    def number(*values: int) -> int:
        return draw(st.sampled_from(values))

    product = one_of(*_PRODUCTS, *(() if near_misses else ("sdpa", "sdpa")))
    flat = product in ("bmm", "baddbmm")
    kv_heads = number(1, 2, 2, 4)
    heads = number(*(n for n in (1, 2, 4, 6) if n % kv_heads == 0))
    cross = draw(st.booleans())
    q_len = number(1, 3, 5, 6, 9)
    kv_len = number(2, 5, 7, 9) if cross else q_len
    grouped = heads != kv_heads
    repeat = one_of("interleave", "expand", "tile", "index")
    if grouped and product == "sdpa":
        repeat = one_of(repeat, "gqa")
    if grouped and product in ("matmul", "keys first") and not near_misses:
        repeat = one_of(repeat, "five dims")
    masks = tuple(sorted(draw(st.sets(st.sampled_from(_MASKS), max_size=2))))
    c = Choices(
        heads=heads,
        kv_heads=kv_heads,
        dim=number(2, 3, 4, 8),
        value_dim=number(4, 5),
        batch=number(1, 2, 3),
        q_len=q_len,
        kv_len=kv_len,
        dtype=one_of("float32", "float32", "float32", "bfloat16"),
        cross=cross,
        projection="separate" if cross else one_of("separate", "chunk", "unbind", "shared"),
        layout=one_of("transpose", "permute", "rearranged"),
        product=product,
        repeat=repeat,
        scale=one_of(
            "none", "product", "divide", "q", "divide q", "k", "both", "tensor", "learned"
        ),
        norm=one_of("no", "no", "no", "l2"),
        masks=masks,
        hiding=one_of(*_SDPA_MASKS),
        how_often=one_of("once", "once", "each"),
        causal=one_of("tril", "triu", "positions", "buffer"),
        bias=one_of(*_BIASES),
        bias_last=draw(st.booleans()),
        softmax=one_of("functional", "method", "dim", "less maximum", "special"),
        cast=one_of("no", "no", "argument", "before"),
        dropout=draw(st.booleans()),
        values=one_of("matmul", "matmul", "einsum", "left")
        if not flat
        else one_of("bmm", "matmul"),
        merge=one_of("transpose", "permute", "einsum"),
        seed=draw(st.integers(0, 999)),
    )
    if product == "sdpa":
        scale = one_of("none", "product", "learned")
        only = one_of("no", "no", "is_causal")
        c = replace(c, scale=scale, value_dim=c.dim, softmax="functional", cast="no", dropout=False)
        c = replace(c, is_causal=only == "is_causal", cap=False, sink="none")
        if c.is_causal:
            c = replace(c, masks=(), bias="none")
        if c.bias != "none" and c.hiding == "bool":
            c = replace(c, hiding="fill lowest")
    else:
        hiding = c.hiding if c.hiding != "bool" else "subtract"
        sink = one_of("none", "none", "last", "first", "data")
        c = replace(c, hiding=hiding, cap=draw(st.booleans()), sink="none" if near_misses else sink)
    if near_misses:
        kinds = [n for n, x in NEAR_MISSES.items() if x.fits(c)]
        c = replace(c, near_miss=draw(st.sampled_from(kinds)))
    return c


def modules(*, near_misses: bool = False) -> st.SearchStrategy[Drawn]:
    """Random attention modules with their inputs `(x, memory, pad)`; see `choices`."""
    return choices(near_misses=near_misses).map(Drawn.of)
