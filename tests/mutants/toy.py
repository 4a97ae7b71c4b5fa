"""An honest lowering in forty lines, cut into steps: a mutant replaces one of them.

Online softmax over blocks of keys, in float32 or wider. It is one more implementation that the
harness has to find right; what it computes is what `rewriter.reference` computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.evaluate import evaluate, index_values
from rewriter.kernels.torch_softmax import blocked_supports
from rewriter.lowering import Lowering, Shapes
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["Toy", "lowering_of", "supports"]


def supports(spec: Spec, shapes: Shapes) -> str | None:
    if not isinstance(spec, SoftmaxSpec) or spec.route is not None or spec.edit is not None:
        return "it computes softmax attention to all keys, whose weights are not edited"
    return "it has no dropout" if spec.dropout else blocked_supports(spec, shapes)


class Toy:
    """Called as a lowering's forward is."""

    block = 16

    def __call__(
        self,
        spec: SoftmaxSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Tensor:
        self.spec, self.named = spec, {}
        dtype = v.dtype
        wide = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
        self.wide = wide
        q, k, v = self.inputs(q, k, v)
        self.named = self.tensors(tensors)
        batch, heads, q_len, _ = q.shape
        self.values: dict[str, Any] = index_values(
            spec, batch, heads, q_len, k.shape[2], self.sizes(sizes), q.device
        )
        self.values["q"] = self.rows(q_len, k.shape[2])
        self.scale = evaluate(spec.scale, self.values, self.named, wide)
        q, k, v = self.cast(q), self.repeated(self.cast(k), heads), v.to(wide)
        v = self.repeated(v, heads)
        top = torch.full((batch, heads, q_len, 1), self.lowest(), dtype=wide)
        total, out = torch.zeros_like(top), torch.zeros(batch, heads, q_len, v.shape[3], dtype=wide)
        found = torch.zeros_like(top, dtype=torch.bool)
        for start, stop in self.cuts(q_len, k.shape[2]):
            s, seen = self.score(q, k[:, :, start:stop], self.places(start, stop))
            found = found | seen.any(-1, keepdim=True)
            new = self.largest(top, self.hide(s, seen))
            p = self.exp(self.hide(s, seen) - new)
            keep = self.kept(top, new)
            total = self.summed(total, keep, p, new)
            out = self.added(out, keep, p, v[:, :, start:stop])
            top = new
        if spec.sink is not None:
            sink = evaluate(spec.sink, self.values, self.named, wide)
            total, out = self.with_sink(top, total, out, torch.as_tensor(sink, dtype=wide))
        out = self.empty(self.divided(out, total), found, v)
        return self.finished(out, self.gate()).to(dtype)

    # --- the steps --------------------------------------------------------------------------------

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def tensors(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((t.name for t in self.spec.tensors), tensors, strict=True))

    def sizes(self, sizes: Sequence[int]) -> Sequence[int]:
        return sizes

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        return torch.arange(q_len).view(-1, 1)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.wide)

    def repeated(self, x: Tensor, heads: int) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    def lowest(self) -> float:
        return -1e30

    def cuts(self, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
        for start in range(0, kv_len, self.block):
            yield start, min(start + self.block, kv_len)

    def places(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop)

    def score(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and where keys are seen, `[B, H, L, K]`."""
        product = q @ k.mT
        values = {**self.values, "k": places, "s": product * self.scale}
        s = torch.as_tensor(evaluate(self.spec.score, values, self.named, self.wide))
        seen = torch.as_tensor(evaluate(self.spec.mask, values, self.named, self.wide))
        return s.to(self.wide).expand_as(product), seen.expand_as(product)

    def hide(self, s: Tensor, seen: Tensor) -> Tensor:
        return s.masked_fill(~seen, -torch.inf)

    def largest(self, top: Tensor, s: Tensor) -> Tensor:
        return torch.maximum(top, s.amax(-1, keepdim=True))

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def kept(self, top: Tensor, new: Tensor) -> Tensor:
        return (top - new).exp()

    def summed(self, total: Tensor, keep: Tensor, p: Tensor, top: Tensor) -> Tensor:
        return total * keep + p.sum(-1, keepdim=True)

    def added(self, out: Tensor, keep: Tensor, p: Tensor, v: Tensor) -> Tensor:
        return out * keep + p @ v

    def with_sink(
        self, top: Tensor, total: Tensor, out: Tensor, sink: Tensor
    ) -> tuple[Tensor, Tensor]:
        new = torch.maximum(top, sink)
        keep = (top - new).exp()
        return total * keep + (sink - new).exp(), out * keep

    def divided(self, out: Tensor, total: Tensor) -> Tensor:
        return out / total.clamp_min(1e-38)

    def empty(self, out: Tensor, found: Tensor, v: Tensor) -> Tensor:
        """Rows that see no key, as the spec has it."""
        if self.spec.masked == "zero" or (self.spec.sink is not None):
            return torch.where(found, out, 0.0)
        if self.spec.masked == "nan":
            return torch.where(found, out, torch.nan)
        return torch.where(found, out, v.mean(-2, keepdim=True))

    def gate(self) -> Any:
        return evaluate(self.spec.heads, self.values, self.named, self.wide)

    def finished(self, out: Tensor, gate: Any) -> Tensor:
        return out * gate


def lowering_of(forward: Any, *, records: bool = False) -> Lowering:
    return Lowering("mutant", supports, forward, records)
