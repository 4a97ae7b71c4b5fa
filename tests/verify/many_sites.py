"""Twelve small attentions in a row, no two alike: a fault of one kind of site has one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Form:
    """What is special about one attention."""

    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    cap: float = 0.0
    slopes: bool = False
    sink: bool = False
    bias: bool = False
    window: int = 0
    left: bool = False
    """Keys on the left are padding, so that the first rows see none; as
    `scaled_dot_product_attention` with a boolean mask."""


FORMS = (
    Form(),
    Form(cap=2.0),
    Form(slopes=True),
    Form(heads=4),
    Form(left=True),
    Form(sink=True),
    Form(bias=True),
    Form(dim=6),
    Form(heads=3, kv_heads=1),
    Form(window=3),
    Form(),
    Form(cap=3.0, window=4),
)
PLAIN, CAP, SLOPES, GROUPS, EMPTY, SINK, BIAS, WIDE, SHARED, WINDOW, PLAIN_AGAIN, LAST = range(12)


class Attention(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        self.form = form
        heads = form.heads + 2 * form.kv_heads
        self.project = nn.Linear(width, heads * form.dim, bias=False)
        self.out = nn.Linear(form.heads * form.dim, width, bias=False)
        with torch.no_grad():  # scores as large as in a trained model
            self.project.weight[: form.heads * form.dim] *= 4
        if form.sink:
            self.sinks = nn.Parameter(torch.randn(form.heads))
        if form.bias:
            self.bias = nn.Parameter(torch.randn(form.heads, 9, 9))
        if form.slopes:
            self.register_buffer("slopes", 2.0 ** -torch.arange(form.heads))

    def forward(self, x: Tensor, back: Tensor, pad: Tensor) -> Tensor:
        """`back` is how far a key lies behind a query, `[L, L]`."""
        form = self.form
        heads = self.project(x).unflatten(2, (-1, form.dim)).transpose(1, 2)
        q, k, v = heads.split((form.heads, form.kv_heads, form.kv_heads), 1)
        if form.heads > form.kv_heads:
            groups = form.heads // form.kv_heads
            k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
        seen = back >= 0
        if form.window:
            seen = seen & (back < form.window)
        if form.left:
            out = scaled_dot_product_attention(q, k, v, seen & pad[:, None, None, :])
        else:
            out = self.weights(q @ k.mT * form.dim**-0.5, seen) @ v
        return self.out(out.transpose(1, 2).flatten(2))

    def weights(self, s: Tensor, seen: Tensor) -> Tensor:
        form, L = self.form, s.shape[-1]
        if form.cap:
            s = form.cap * torch.tanh(s / form.cap)
        if form.slopes:
            s = s + self.slopes.to(s.dtype)[:, None, None] * torch.arange(L)
        if form.bias:
            s = s + self.bias[:, :L, :L]
        s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
        if form.sink:
            column = self.sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)
            return torch.cat([s, column], dim=-1).softmax(-1)[..., :-1]
        return s.softmax(-1)


class Row(nn.Module):
    """On floating `x` `[B, L, width]` and boolean `pad` `[B, L]`, True for a real token."""

    def __init__(self, width: int = 8, forms: tuple[Form, ...] = FORMS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(form, width) for form in forms)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        back = place[:, None] - place
        for layer in self.layers:
            x = x + layer(x, back, pad)
        return x


def inputs() -> dict[str, Tensor]:
    """The first two tokens of the last row are padding."""
    pad = torch.ones(2, 7, dtype=torch.bool)
    pad[-1, :2] = False
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 7, 8, generator=generator), "pad": pad}
