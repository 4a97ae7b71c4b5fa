"""One attention, spelled in the ways in which people write it.

Every stage of the module `Attention` is written as its `Choices` say. All spellings of a stage mean
the same, up to what a row that sees no key gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.testing.choices import Choices
from rewriter.testing.near_misses import NEAR_MISSES

__all__ = ["Attention"]


class Attention(nn.Module):
    """Attention over x `[B, L, E]`, or from x to memory `[B, M, E]`; pad `[B, M]` is True for real
    keys."""

    tril: Tensor
    slopes: Tensor

    def __init__(self, c: Choices) -> None:
        super().__init__()
        self.c = c
        self.miss = NEAR_MISSES.get(c.near_miss)
        width, q_dim, k_dim = c.width, c.heads * c.dim, c.kv_heads * c.dim
        v_dim = k_dim if c.projection == "shared" else c.kv_heads * c.value_dim
        if c.projection in ("chunk", "unbind"):
            q_dim = k_dim = v_dim = c.heads * c.dim
            self.qkv = nn.Linear(width, 3 * q_dim)
        else:
            self.query, self.key = nn.Linear(width, q_dim), nn.Linear(width, k_dim)
            self.value = nn.Linear(width, v_dim)
        self.out = nn.Linear(v_dim // self.kv_heads * c.heads, width)
        self.drop = nn.Dropout(0.1)
        self.temperature = nn.Parameter(torch.rand(c.heads) + 0.5)
        self.table = nn.Parameter(torch.randn(9, c.heads))
        self.lean = nn.Parameter(torch.randn(c.heads) * 0.3)
        self.sinks = nn.Parameter(torch.randn(c.heads))
        self.mixing = nn.Parameter(torch.randn(c.heads, c.heads))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, c.heads + 1))
        self.register_buffer("tril", torch.ones(16, 16, dtype=torch.bool).tril())

    @property
    def kv_heads(self) -> int:
        """Projections that are cut from one tensor have as many key heads as query heads."""
        return self.c.heads if self.c.projection in ("chunk", "unbind") else self.c.kv_heads

    def forward(self, x: Tensor, memory: Tensor, pad: Tensor) -> Tensor | tuple[Tensor, ...]:
        c = self.c
        q, k, v = self.projected(x, memory if c.cross else x)
        if c.norm == "l2":
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        if c.product == "sdpa":
            return self.merged(self.fused(q, k, v, pad))
        if c.repeat == "five dims" and self.kv_heads != c.heads:
            q = torch.unflatten(q, 1, (self.kv_heads, c.heads // self.kv_heads))
            k, v = k.unsqueeze(2), v.unsqueeze(2)
        else:
            k, v = self.repeated(k), self.repeated(v)
        rows = (q, k, v)
        s = self.scores(q, k, pad)
        if self.miss is not None:
            s = self.miss.scores(self, s, *rows)
        w = self.weights(s)
        if c.dropout:
            w = self.drop(w)
        if self.miss is not None:
            w, v = self.miss.weights(self, w, *rows)
        out = self.mixed(w, v)
        if out.dim() == 5:
            out = out.flatten(1, 2)
        extra: tuple[Tensor, ...] = ()
        if self.miss is not None:
            out, extra = self.miss.output(self, out, s, w, v)
        merged = self.merged(out)
        return (merged, *extra) if extra else merged

    # --- operands ---------------------------------------------------------------------------------

    def projected(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, H, L, D]`."""
        c = self.c
        if c.projection == "unbind":
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, c.heads, -1).permute(2, 0, 3, 1, 4)
            return q, k, v
        if c.projection == "chunk":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k = self.query(x), self.key(memory)
            v = k if c.projection == "shared" else self.value(memory)
        heads = self.kv_heads
        return (
            self.heads_first(q, c.heads),
            self.heads_first(k, heads),
            self.heads_first(v, heads),
        )

    def heads_first(self, x: Tensor, heads: int) -> Tensor:
        match self.c.layout:
            case "transpose":
                return x.view(*x.shape[:2], heads, -1).transpose(1, 2)
            case "permute":
                return torch.unflatten(x, -1, (heads, -1)).permute(0, 2, 1, 3).contiguous()
        return torch.einsum("blhd->bhld", x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads))

    def repeated(self, x: Tensor) -> Tensor:
        groups = self.c.heads // self.kv_heads
        if groups == 1:
            return x
        match self.c.repeat:
            case "expand":
                B, H, M, D = x.shape
                return x[:, :, None].expand(B, H, groups, M, D).reshape(B, H * groups, M, D)
            case "tile":
                return x.repeat(1, groups, 1, 1)
            case "index":
                return x[:, torch.arange(self.c.heads) // groups]
        return x.repeat_interleave(groups, dim=1)

    # --- scores -----------------------------------------------------------------------------------

    @property
    def number(self) -> float:
        """The scale, where it is a number."""
        return 2.0 if self.c.norm == "l2" else 1 / math.sqrt(self.c.dim)

    def per_head(self, x: Tensor, like: Tensor) -> Tensor:
        """`[H]` to what broadcasts with the scores; `like` begins as they do."""
        if self.c.is_flat:
            return x.repeat(like.shape[0] // self.c.heads).view(-1, 1, 1)
        if self.c.repeat == "five dims" and self.c.heads != self.kv_heads:
            return x.view(1, self.kv_heads, -1, 1, 1)
        return x.view(1, -1, 1, 1)

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        """Queries times keys, with the scale where it stands on one of them."""
        c, number = self.c, self.number
        match c.scale:
            case "q":
                q = q * number
            case "divide q":
                q = q / (1 / number)
            case "k":
                k = number * k
            case "both":
                q, k = q * math.sqrt(number), k * math.sqrt(number)
        match c.product:
            case "bmm":
                return torch.bmm(q, k.transpose(1, 2))
            case "baddbmm":
                bias = self.bias(q, k)
                start = q.new_zeros(1, 1, 1) if bias is None else bias
                alpha = number if c.scale == "product" else 1.0
                return torch.baddbmm(start, q, k.mT, beta=1.0, alpha=alpha)
            case "einsum":
                return torch.einsum("bhqd,bhkd->bhqk", q, k)
            case "keys first":
                return (k @ q.transpose(-1, -2)).transpose(-1, -2)
        return q @ k.mT

    def scores(self, q: Tensor, k: Tensor, pad: Tensor) -> Tensor:
        c = self.c
        if c.is_flat:
            q, k = q.flatten(0, 1), k.flatten(0, 1)
        s = self.product(q, k)
        match c.scale:
            case "product" if c.product != "baddbmm":
                s = s * self.number
            case "divide":
                s = s / (1 / self.number)
            case "tensor":
                s = s * torch.tensor(self.number, dtype=s.dtype)
            case "learned":
                s = s * self.per_head(self.temperature, s)
        if c.cap:
            s = torch.tanh(s / 3.0) * 3.0
        bias = self.bias(q, k) if c.product != "baddbmm" else None
        if bias is not None and not c.bias_last:
            s = s + bias
        for seen in self.seen(q, k, pad):
            s = self.hidden(s, seen.unsqueeze(1) if s.dim() == 5 and seen.dim() == 4 else seen)
        return s + bias if bias is not None and c.bias_last else s

    def bias(self, q: Tensor, k: Tensor) -> Tensor | None:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        match self.c.bias:
            case "table":
                found = self.table[(j - i).clamp(-4, 4) + 4].permute(2, 0, 1)
                if self.c.is_flat:
                    return found.repeat(q.shape[0] // self.c.heads, 1, 1)
                if self.c.repeat == "five dims" and self.c.heads != self.kv_heads:
                    found = torch.unflatten(found, 0, (self.kv_heads, -1))
                return found[None]
            case "alibi":
                return self.per_head(self.slopes, q) * (j - i)
            case "per head":
                return self.per_head(self.lean, q) * j
            case "positions":
                return -0.1 * (i - j).abs().to(q.dtype)
            case "grid":
                grid = (0.2 * (j % 3)).to(q.dtype)
                return self.per_head(self.lean, q) * (j // 3 - i // 3) + grid
        return None

    # --- masks ------------------------------------------------------------------------------------

    def seen(self, q: Tensor, k: Tensor, pad: Tensor) -> list[Tensor]:
        """The masks, True where a key is seen, each broadcasting with the scores."""
        found = [self.mask(name, q.shape[-2], k.shape[-2], pad) for name in self.c.masks]
        if self.c.how_often == "once" and len(found) == 2:
            found = [found[0] & found[1]]
        if self.c.is_flat:
            heads = self.c.heads
            found = [
                m if m.dim() == 2 else m.expand(-1, heads, -1, -1).flatten(0, 1) for m in found
            ]
        return found

    def mask(self, name: str, rows: int, keys: int, pad: Tensor) -> Tensor:
        i, j = torch.arange(rows)[:, None], torch.arange(keys)
        match name:
            case "padding":
                return pad[:, None, None, :]
            case "rows":
                return (pad[:, :1] & pad[:, -1:])[:, None, :, None] | (i < 1)
            case "window":
                return (i - j).abs() < 3
            case "prefix":
                return (j <= i) | (j < 2)
            case "documents":
                place = pad.long().cumsum(-1)
                return (place[:, None, None, :] // 2) <= (i // 2)
        match self.c.causal:
            case "tril":
                return torch.ones(rows, keys, dtype=torch.bool).tril()
            case "triu":
                return ~torch.ones(rows, keys).triu(1).bool()
            case "buffer":
                return self.tril[:rows, :keys]
        return j <= i

    def hidden(self, s: Tensor, seen: Tensor) -> Tensor:
        lowest = torch.finfo(s.dtype).min
        match self.c.hiding:
            case "add lowest":
                return s + torch.zeros_like(seen, dtype=s.dtype).masked_fill(~seen, lowest)
            case "add inf":
                return s + torch.where(seen, 0.0, -math.inf).to(s.dtype)
            case "fill inf":
                return s.masked_fill(~seen, -math.inf)
            case "where":
                return torch.where(seen, s, lowest)
            case "subtract":
                return s - (~seen).to(s.dtype) * 1e4
        return s.masked_fill(seen == 0, lowest)

    # --- weights and values -----------------------------------------------------------------------

    def weights(self, s: Tensor) -> Tensor:
        c, dtype, columns = self.c, s.dtype, s.shape[-1]
        if c.sink != "none":
            sink = self.per_head(self.sinks, s)
            if c.sink == "data":
                sink = sink * torch.arange(s.shape[-2])[:, None]
            column = sink.expand(*s.shape[:-1], 1).to(dtype)
            s = torch.cat([column, s] if c.sink == "first" else [s, column], dim=-1)
        if c.softmax == "less maximum":
            s = s - s.amax(-1, keepdim=True)
        wide = torch.float32 if c.cast == "argument" else None
        if c.cast == "before":
            s = s.float()
        softmax: dict[str, Callable[[], Tensor]] = {
            "method": lambda: s.softmax(-1, dtype=wide),
            "dim": lambda: functional.softmax(s, dim=s.dim() - 1, dtype=wide),
            "special": lambda: torch.special.softmax(s, -1, dtype=wide),
        }
        w = softmax.get(c.softmax, lambda: functional.softmax(s, dim=-1, dtype=wide))().to(dtype)
        if c.sink == "none":
            return w
        return w[..., 1:] if c.sink == "first" else w[..., :columns]

    def mixed(self, w: Tensor, v: Tensor) -> Tensor:
        """Weights times values `[B, H, L, D]`."""
        if self.c.is_flat:
            flat = v.flatten(0, 1)
            out = torch.bmm(w, flat) if self.c.values == "bmm" else w @ flat
            return out.view(*v.shape[:2], *out.shape[-2:])
        if w.dim() == 4 and self.c.values == "einsum":
            return torch.einsum("bhqk,bhkd->bqhd", w, v).transpose(1, 2)
        if self.c.values == "left":
            return (v.mT @ w.mT).mT
        return w @ v

    def merged(self, x: Tensor) -> Tensor:
        match self.c.merge:
            case "transpose":
                flat = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)
            case "permute":
                flat = x.permute(0, 2, 1, 3).flatten(2)
            case _:
                flat = torch.einsum("bhld->blhd", x).flatten(-2)
        return cast(Tensor, self.out(flat))

    # --- scaled_dot_product_attention -------------------------------------------------------------

    def fused(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        c = self.c
        grouped = c.repeat == "gqa"
        if not grouped:
            k, v = self.repeated(k), self.repeated(v)
        scale = None if c.scale == "none" else self.number
        if c.scale == "learned":
            q, scale = q * self.per_head(self.temperature, q), 1.0
        mask, bias = None, self.bias(q, k)
        seen = self.seen(q, k, pad)
        if c.hiding == "bool" and seen:
            mask = seen[0] if len(seen) == 1 else seen[0] & seen[1]
        elif seen or bias is not None:
            mask = q.new_zeros(q.shape[-2], k.shape[-2]) if bias is None else bias.to(q.dtype)
            for m in seen:
                mask = self.hidden(mask, m)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=c.is_causal, scale=scale, enable_gqa=grouped
        )
