"""What `variants.py` measures: plain attention, attention as models write it, and each variant.

A row is built for a length and gives a function without arguments. One sequence, 8 heads of 64
dims, float32. Specs come from the passes, applied to a causal site made by hand; the tensors that
they read, such as the gates of a router, are ready before the clock starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rewriter import op, registry
from rewriter import symbols as sym
from rewriter.passbase import parse_request
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["DECODES", "EAGER", "ROWS", "Row", "image_of"]

HEADS, DIM = 8, 64
SCALE = DIM**-0.5
WIDTH = 64
"""Dims of the hidden states in which sinks are looked for."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    build: Callable[[int], Run]
    """For a length."""
    beside: str = "sdpa"
    """The row that it is compared with."""
    is_eager: bool = False
    """It makes matrices of weights."""
    extra: tuple[int, ...] = ()
    """Lengths at which it has a target, besides those of all rows."""


# --- sites and what they read ---------------------------------------------------------------------


def _operands(n: int) -> list[Tensor]:
    """q, k and v `[1, H, n, D]`."""
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, DIM) for _ in range(3)]


def _site(spec: SoftmaxSpec, q_len: int, n: int) -> Site:
    return Site(
        "layers.3",
        layer=3,
        layers=8,
        spec=spec,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=DIM,
        value_dim=DIM,
        q_len=q_len,
        kv_len=n,
        input_dim=HEADS * DIM,
        residual_dim=WIDTH,
    )


def image_of(n: int) -> slice:
    """Where the image tokens of the prompt are: 576 from token 35 on in a prompt of 4096."""
    return slice(35, 35 + min(576, n // 7))


def _taps(n: int, q: Tensor) -> Mapping[str, Tensor]:
    """What programs beside the attention read: queries, hidden states with sinks, labels."""
    labels = torch.zeros(1, n, dtype=torch.int64)
    labels[:, image_of(n)] = 1
    states = torch.randn(1, n, WIDTH)
    states[:, 0, 0] = states[:, image_of(n), 0][:, ::96] = 1000.0  # massive activations
    return {"q": q, "labels": labels, "residual": states}


def _parameter(shape: tuple[int, ...], initial: float | str) -> Tensor:
    if initial == "eye":
        return torch.eye(shape[-2], shape[-1]).expand(shape).contiguous()
    return torch.full(shape, float(initial))


def _reads(spec: Spec, taps: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a spec, computed as the rewritten model computes them."""
    found = []
    for tensor in spec.tensors:
        source = tensor.source
        assert source is not None
        parameters = [_parameter(p.shape, p.initial) for p in source.parameters]
        inputs = [taps[t] for t in source.taps]
        found.append(source.compute(*inputs, *parameters, **dict(source.options)))
    return found


def _spec(request: str, n: int, q_len: int, is_causal: bool = True) -> Spec:
    mask = sym.k <= sym.q + sym.M - sym.L if q_len != n else sym.k <= sym.q
    base = SoftmaxSpec(scale=Float(SCALE), mask=mask if is_causal else sympy.true)
    found: Spec = parse_request(request, registry).action.rewrite(_site(base, q_len, n), base)
    return found


def variant(request: str, *, is_causal: bool = True) -> Callable[[int], Run]:
    """Builds a call of the op for the spec that a request makes of a causal site, or one without a
    mask. `{grid}` in the request is a grid of all tokens."""

    def build(n: int) -> Run:
        q, k, v = _operands(n)
        spec = _spec(request.replace("{grid}", _grid(n)), n, n, is_causal)
        tensors = _reads(spec, _taps(n, q))
        return lambda: op.attention(q, k, v, tensors, [], spec)

    return build


def _grid(n: int) -> str:
    """A grid of n tokens, as square as it can be."""
    down = next(x for x in range(math.isqrt(n), 0, -1) if n % x == 0)
    return f"[{down}, {n // down}]"


# --- what the variants are compared with ----------------------------------------------------------


def plain(is_causal: bool) -> Callable[[int], Run]:
    def build(n: int) -> Run:
        q, k, v = _operands(n)
        return lambda: sdpa(q, k, v, is_causal=is_causal)

    return build


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * SCALE + mask, dim=-1)


def eager(n: int) -> Run:
    """Attention as models write it, where the weights are wanted: output and weights."""
    q, k, v = _operands(n)
    mask = torch.full((n, n), -math.inf).triu_(1)

    def run() -> tuple[Tensor, Tensor]:
        weights = _weights(q, k, mask)
        return weights @ v, weights

    return run


def eager_edit(n: int) -> Run:
    """VAR as its authors write it: weights are read, changed where heads look at the image, and
    multiplied with the values."""
    q, k, v = _operands(n)
    mask = torch.full((n, n), -math.inf).triu_(1)
    spec = _spec(VAR, n, n)
    group, first = _reads(spec, _taps(n, q))
    sinks, rest = ((group[0] == 1) | (group[0] == 2)), group[0] == 3
    image = rest | (group[0] == 2)
    late = slice(int(first), n)

    def run() -> Tensor:
        weights = _weights(q, k, mask)
        rows = weights[:, :, late]
        on_image, on_rest = rows[..., image].sum(-1), rows[..., rest].sum(-1)
        chosen = ((on_image >= 0.2) & (on_rest >= 0.5 * on_image))[..., None]
        taken = 0.4 * rows[..., sinks].sum(-1, keepdim=True)
        edited = torch.where(sinks, 0.6 * rows, rows)
        edited = torch.where(rest, rows * (1 + taken / on_rest[..., None]), edited)
        weights[:, :, late] = torch.where(chosen, edited, rows)
        return weights @ v

    return run


# --- decoding -------------------------------------------------------------------------------------


def decode(request: str) -> Callable[[int], Run]:
    """A token after n - 1 others, whose state a first call left beside the cache."""

    def build(n: int) -> Run:
        q, k, v = _operands(n)
        q = q[:, :, -1:].contiguous()
        full = [k, v]
        past, none = ([x[:, :, :m].contiguous() for x in full] for m in (n - 1, 0))
        step = _spec(request, n, 1)
        run = torch.ops.rewriter.attention.default
        args = _reads(step, {}), [], step.to_json(), "auto"
        with torch.no_grad():  # the state of the keys so far
            run(q, *past, *args, past, none, "site")
        return lambda: run(q, *full, *args, full, past, "site")

    return build


def decode_plain(n: int) -> Run:
    q, k, v = _operands(n)
    q = q[:, :, -1:].contiguous()
    return lambda: sdpa(q, k, v)


MOBA = "sparse.moba(topk=4, dense_below=0)"
"""Blocks of 256. At 16384 tokens a query sees 10 % of the keys that a causal mask leaves it."""
BIFORMER = "sparse.biformer(regions=8, topk=8, grid={grid})"
"""An eighth of the keys at any length, so that its time stays quadratic."""
VAR = "sinks.var(dims=[0], tau=5, mode=released)"

EAGER = "eager, weights"
ROWS = (
    Row("sdpa", plain(True), extra=(4096, 16384)),
    Row("sdpa, not causal", plain(False)),
    Row(EAGER, eager, is_eager=True, extra=(4096,)),
    Row("linear.lightning", variant("linear.lightning(rule=tnl)")),
    Row("linear.features", variant("linear.features(map=elu)")),
    Row("linear.window_tail", variant("linear.window_tail(window=256)")),
    Row("sparse.moba", variant(MOBA), extra=(16384,)),
    Row(
        "sparse.biformer",
        variant(BIFORMER, is_causal=False),
        "sdpa, not causal",
    ),
    Row("heads.moh", variant("heads.moh(active=0.5, router=norm)"), extra=(4096,)),
    Row("sinks.var", variant(VAR), extra=(4096,)),
    Row("eager edit", eager_edit, is_eager=True, extra=(4096,)),
    Row("sinks.remove", variant("sinks.remove(first=1)")),
)
DECODES = (
    Row("decode sdpa", decode_plain, "decode sdpa"),
    Row("decode linear.lightning", decode("linear.lightning(rule=tnl)"), "decode sdpa"),
    Row("decode linear.features", decode("linear.features(map=elu)"), "decode sdpa"),
    Row("decode linear.window_tail", decode("linear.window_tail(window=256)"), "decode sdpa"),
)
