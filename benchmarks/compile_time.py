"""How long finding, lifting and lowering take, by number of layers: the cost a site, and whether it
is linear.

    python benchmarks/compile_time.py [--layers 4 16 64] [--json FILE]

Torch's own capture (Dynamo and the re-trace) is shown beside it and is not part of the cost a site.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import Captured, capturing, from_dynamo
from rewriter.optimize import rewrite_graph
from rewriter.registry import read_requests


class Layer(nn.Module):
    """Soft-capped causal attention with padding and a window, written as models write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        scores = torch.tanh(scores / 50.0) * 50.0 + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Stack(nn.Module):
    """Layers that share one mask."""

    def __init__(self, layers: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        seen = position[None, :] <= position[:, None]
        seen = seen & (position[:, None] - position[None, :] < 64) & pad[:, None, None, :]
        mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def measure(layers: int) -> dict[str, float]:
    """Seconds of capture and milliseconds a site for one model."""
    torch._dynamo.reset()
    model = Stack(layers).eval()
    row: dict[str, float] = {"layers": layers}

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        captured: Captured = from_dynamo(gm, {id(p): n for n, p in model.named_parameters()})
        row["retrace_s"] = time.perf_counter() - start
        start = time.perf_counter()
        reports = rewrite_graph(captured, model, read_requests(["fuse"]))
        spent = time.perf_counter() - start
        assert sum(r.decision == "rewritten" for r in reports) == layers
        row["rewrite_s"] = spent
        row["ms_a_site"] = 1e3 * spent / layers
        return captured.module

    x, pad = torch.randn(2, 24, 32), torch.ones(2, 24, dtype=torch.bool)
    start = time.perf_counter()
    with torch.no_grad(), capturing():
        torch.compile(model, backend=backend, dynamic=True)(x, pad)
    row["capture_s"] = time.perf_counter() - start - row["rewrite_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--json")
    options = parser.parse_args()
    measure(1)  # imports and caches of torch and sympy
    rows = [measure(n) for n in options.layers]
    print(f"{'layers':>7} {'torch capture':>14} {'find+lift+lower':>16} {'a site':>10}")
    for row in rows:
        print(
            f"{row['layers']:>7.0f} {row['capture_s']:>12.2f} s {row['rewrite_s']:>14.3f} s"
            f" {row['ms_a_site']:>7.1f} ms"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
