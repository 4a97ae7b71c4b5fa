"""Small transformers with hand-written attention, in honest forms and with planted faults."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMS = ("eager", "einsum", "sdpa", "blocked")

FAULTS = (
    "mask off by one",
    "mask missing",
    "padding ignored",
    "scale doubled",
    "scale missing",
    "scale 1/D",
    "heads interleaved",
    "heads swapped",
    "softmax over queries",
    "cap missing",
    "bias transposed",
    "slope of the next head",
    "keys used as values",
    "last block dropped",
    "cast dropped",
    "dropout at inference",
)


@dataclass(frozen=True)
class Shape:
    """Everything that fixes the function of `Tower`."""

    dim: int = 32
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    causal: bool = True
    cap: float = 0.0
    slopes: bool = False
    classes: int = 0
    """0 returns every token, else a `[B, classes]` output of the first token."""


class Attention(nn.Module):
    """Grouped-query attention; `form` changes how it is computed, `fault` what."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.form, self.fault = shape, "eager", ""
        self.head_dim = shape.dim // shape.heads
        kv_dim = self.head_dim * shape.kv_heads
        self.query = nn.Linear(shape.dim, shape.dim)
        self.key = nn.Linear(shape.dim, kv_dim)
        self.value = nn.Linear(shape.dim, kv_dim)
        self.out = nn.Linear(shape.dim, shape.dim)
        with torch.no_grad():  # scores as large as in a trained model
            self.query.weight *= 4

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        B, L, _ = x.shape
        H = self.shape.heads
        q = self.query(x).view(B, L, H, -1).transpose(1, 2)  # [B, H, L, D]
        k = self.key(x).view(B, L, self.shape.kv_heads, -1).transpose(1, 2)
        v = self.value(x).view(B, L, self.shape.kv_heads, -1).transpose(1, 2)
        if self.fault == "keys used as values":
            v = k
        k, v = self.repeated(k), self.repeated(v)
        seen = self.seen(L, pad)
        out = getattr(
            self, "sdpa" if self.form == "sdpa" and self.plain else self.form_with_scores
        )(q, k, v, seen)
        if self.fault == "heads swapped":
            out = out.flip(1)
        if self.fault == "dropout at inference":
            out = functional.dropout(out, 0.1, training=True)
        return self.out(out.transpose(1, 2).reshape(B, L, -1))

    @property
    def plain(self) -> bool:
        return not self.shape.cap and not self.shape.slopes

    @property
    def form_with_scores(self) -> str:
        return "blocked" if self.form in ("sdpa", "blocked") else "eager"

    def repeated(self, x: Tensor) -> Tensor:
        groups = self.shape.heads // self.shape.kv_heads
        if self.fault == "heads interleaved":
            return x.repeat(1, groups, 1, 1)
        return x.repeat_interleave(groups, dim=1)

    def seen(self, length: int, pad: Tensor) -> Tensor:
        q, k = torch.arange(length)[:, None], torch.arange(length)
        late = {"mask off by one": 1, "mask missing": length}.get(self.fault, 0)
        rows = (k <= q + late) if self.shape.causal else (k <= length)
        keys = torch.ones_like(pad) if self.fault == "padding ignored" else pad
        return rows & keys[:, None, None, :]  # [B, 1, L, L]

    @property
    def scale(self) -> float:
        faulty = {
            "scale doubled": 2.0,
            "scale missing": math.sqrt(self.head_dim),
            "scale 1/D": self.head_dim**-0.5,
        }
        return self.head_dim**-0.5 * faulty.get(self.fault, 1.0)

    def scores(self, q: Tensor, k: Tensor, start: int = 0) -> Tensor:
        """Scores of the keys from `start` on, scaled, capped and biased, at least in float32."""
        if self.form == "einsum":
            s = torch.einsum("bhqd,bhkd->bhqk", q * self.scale, k)
        else:
            s = q @ k.mT * self.scale
        narrow = torch.float16 if s.dtype == torch.float32 else s.dtype
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        if self.shape.cap and self.fault != "cap missing":
            s = self.shape.cap * torch.tanh(s / self.shape.cap)
        if self.shape.slopes:
            slope = 2.0 ** (1 - torch.arange(float(self.shape.heads))).view(-1, 1, 1)
            slope = slope.roll(1, 0) if self.fault == "slope of the next head" else slope
            place = torch.arange(start, start + k.shape[2])
            if self.fault == "bias transposed":
                place = torch.arange(q.shape[2])[:, None]
            if self.fault == "cast dropped":
                return s.to(narrow) + (slope * place).to(narrow)
            s = s + slope * place
        return s

    def eager(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        s = self.scores(q, k)
        s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
        weights = s.softmax(-2 if self.fault == "softmax over queries" else -1).to(q.dtype)
        if self.fault == "last block dropped":
            weights = weights * (torch.arange(k.shape[2]) < (k.shape[2] - 1) // 4 * 4)
        return weights @ v

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, seen, scale=self.scale)

    def blocked(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, block: int = 4) -> Tensor:
        """Online softmax over blocks of keys, sums in float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        top = torch.full((*q.shape[:3], 1), -1e30, dtype=wide)
        total, out = torch.zeros_like(top), torch.zeros(v.shape, dtype=wide)
        for start in range(0, k.shape[2], block):
            part = slice(start, start + block)
            s = self.scores(q.to(wide), k[:, :, part].to(wide), start).masked_fill(
                ~seen[..., part], -1e30
            )
            new = torch.maximum(top, s.amax(-1, keepdim=True))
            p = (s - new).exp().masked_fill(~seen[..., part], 0.0)
            keep = (top - new).exp()
            total = total * keep + p.sum(-1, keepdim=True)
            out = out * keep + p @ v[:, :, part].to(wide)
            top = new
        return (out / total.clamp_min(1e-30)).to(v.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(shape.dim), nn.LayerNorm(shape.dim)
        self.attention = Attention(shape)
        self.up, self.down = (
            nn.Linear(shape.dim, 2 * shape.dim),
            nn.Linear(2 * shape.dim, shape.dim),
        )

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), pad)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Tower(nn.Module):
    """Blocks on floating `x` `[B, L, dim]` and boolean `pad` `[B, L]`, True for a real token."""

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.dim, shape.classes) if shape.classes else None

    def forward(self, x: Tensor, pad: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x, pad)
        return {"hidden": x} if self.head is None else {"logits": self.head(x[:, 0])}

    def set(self, *, form: str = "eager", fault: str = "", layers: slice = slice(None)) -> Tower:
        """Change the attention of the chosen layers, in place."""
        for block in self.blocks[layers]:
            block.attention.form, block.attention.fault = form, fault
        return self


def batch(
    seed: int, *, rows: int = 2, length: int = 11, dim: int = 32, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs of a `Tower`; the last third of the last row is padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, dim, generator=generator).to(dtype)
    pad = torch.ones(rows, length, dtype=torch.bool)
    pad[-1, length - length // 3 :] = False
    return {"x": x, "pad": pad}
