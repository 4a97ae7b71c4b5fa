"""Gradients of softmax attention by generated kernels, from the output and its log-sum-exp.

What has one value a row is left to torch: the factors of an edit and their masses, sinks, rows that
see no key, and the way from a row's or key's gradient to the tensor that a formula read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.evaluate import evaluate, tensor_of
from rewriter.kernels.triton_backward_code import BackwardSpec, backward_source
from rewriter.kernels.triton_code import is_number
from rewriter.kernels.triton_derivatives import read_gradients
from rewriter.kernels.triton_launch import DTYPES, MIN_CAPABILITY, capability_of
from rewriter.kernels.triton_skeleton import is_small
from rewriter.kernels.triton_source import Source, launch
from rewriter.kernels.triton_tables import filled, tabulate
from rewriter.kernels.triton_tiles import backward_tiles_for
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["backward", "refusal", "source_of"]


# --- the guard ------------------------------------------------------------------------------------


def refusal(spec: SoftmaxSpec, shapes: Shapes, wanted: Sequence[bool]) -> str | None:
    """None if kernels can be generated for the gradients of a call that `triton_launch` takes, else
    the reason.

    Args:
        wanted: which tensors of the spec want a gradient.
    """
    names = frozenset(t.name for t, want in zip(spec.tensors, wanted, strict=True) if want)
    args = (shapes.head_dim, shapes.value_dim, shapes.dtype)
    pairs = any(g.place == "pair" for g in read_gradients(tabulate(spec)[0], names))
    if pairs and torch.are_deterministic_algorithms_enabled():
        return "gradients of what is read at pairs of positions are added up in no fixed order"
    return _spec_reason(spec, names, *args)


@lru_cache(maxsize=1024)
def _spec_reason(
    spec: SoftmaxSpec, wanted: frozenset[str], head_dim: int, value_dim: int, dtype: torch.dtype
) -> str | None:
    if not is_small(spec.score):
        return "the score has constants so large that no logarithm of a denominator holds"
    if spec.dropout and spec.masked in ("mean", "add") and not spec.is_unmasked:
        return "rows without a visible key drop weights of all keys"
    if spec.masked == "add" and not spec.is_unmasked:
        reads = read_gradients(tabulate(spec)[0], wanted)
        if spec.score.diff(sym.s) != 1 or reads or spec.edit or not is_number(spec.scale):
            return "rows without a visible key see their scores, which are not plain"
    try:
        backward_source(_backward_spec(spec, head_dim, value_dim, dtype, wanted, MIN_CAPABILITY))
    except LoweringError as reason:
        return str(reason)
    return None


@lru_cache(maxsize=4096)
def _backward_spec(
    spec: SoftmaxSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    wanted: frozenset[str],
    capability: int,
) -> BackwardSpec:
    name = DTYPES[dtype]
    tiles = backward_tiles_for(tabulate(spec)[0], head_dim, value_dim, name, capability)
    return BackwardSpec(spec, head_dim, value_dim, name, tiles, wanted)


def source_of(
    spec: SoftmaxSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    wanted: Sequence[str],
    capability: int,
) -> Source:
    """The file that a call runs, given the names of the tensors that want a gradient."""
    args = (spec, head_dim, value_dim, dtype, frozenset(wanted), capability)
    return backward_source(_backward_spec(*args))


# --- the call -------------------------------------------------------------------------------------


def backward(
    spec: SoftmaxSpec,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: Sequence[bool],
    seed: int | None = None,
) -> list[Tensor | None]:
    """Gradients of `triton_launch.forward_with_lse` for q, k, v and then each of the tensors; None
    where not wanted.

    Args:
        spec: without a factor of the heads, which is not part of `out`.
        grad: gradient of the output, `[B, Hq, L, Dv]`.
        out: the output.
        lse: `[B, Hq, L]` in float32.
        wanted: which gradients are wanted, in the order of the result.
        seed: of the dropout, as the forward had it.
    """
    call = _Call(spec, grad, out, lse, (q, k, v), tensors, sizes, wanted)
    if seed is not None:
        call.numbers["seed"] = seed
    return call.run()


@dataclass
class _Sums:
    """Values of formulas, and their gradients, for autograd to go on from."""

    values: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor, grad: Tensor) -> None:
        if value.requires_grad:
            self.values.append(value)
            self.grads.append(grad.sum_to_size(value.shape))


class _Call:
    """One backward."""

    def __init__(
        self,
        spec: SoftmaxSpec,
        grad: Tensor,
        out: Tensor,
        lse: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        self.spec, self.grad, self.lse, self.wanted = spec, grad, lse, wanted
        self.q, self.k, self.v = qkv
        (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, value_dim) = (
            self.q.shape,
            self.v.shape,
        )
        self.rows = (batch, heads, q_len)
        self.numbers = dict(zip(spec.sizes, (int(n) for n in sizes), strict=True))
        self.numbers |= {"B": batch, "H": heads, "L": q_len, "M": kv_len}
        self.numbers["G"] = heads // kv_heads
        names = frozenset(t.name for t, w in zip(spec.tensors, wanted[3:], strict=True) if w)
        capability = capability_of(str(self.q.device))
        self.kernel = _backward_spec(spec, head_dim, value_dim, self.q.dtype, names, capability)
        self.leaves = {
            t.name: x.detach().requires_grad_(t.name in names)
            for t, x in zip(spec.tensors, tensors, strict=True)
        }
        self.sums = _Sums()
        self.buffers: dict[str, Tensor] = {}
        self.delta = self.grad.new_empty(self.rows, dtype=torch.float32)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv)
        self.named = {"q": self.q, "k": self.k, "v": self.v, "o": out, "do": grad, "lse": lse}
        self.named |= {"delta": self.delta, "dq": dq, "dk": dk, "dv": dv}

    def run(self) -> list[Tensor | None]:
        spec, named = self.spec, self.named
        if self.grad.numel() and self.numbers["M"]:
            self._run()
        else:
            for name in ("dq", "dk", "dv"):
                named[name].zero_()
        found: dict[str, Tensor] = {}
        leaves = {n: x for n, x in self.leaves.items() if x.requires_grad}
        if self.sums.values and leaves:
            got = torch.autograd.grad(
                self.sums.values, list(leaves.values()), self.sums.grads, allow_unused=True
            )
            found = {n: g for n, g in zip(leaves, got, strict=True) if g is not None}
        for name, total in self.buffers.items():
            found[name] = found[name] + total if name in found else total
        results: list[Tensor | None] = [named["dq"], named["dk"], named["dv"]]
        for t in spec.tensors:
            x = self.leaves[t.name]
            results.append(found[t.name].to(x.dtype) if t.name in found else torch.zeros_like(x))
        return [g if want else None for g, want in zip(results, self.wanted, strict=True)]

    def _run(self) -> None:
        lowered, tables = self.kernel.lowered
        device = self.q.device
        used = tuple((n, x) for n, x in self.numbers.items() if n not in ("L", "M", "G", "seed"))
        q_len, kv_len = self.numbers["L"], self.numbers["M"]
        filled_tables = {t.name: filled(t, q_len, kv_len, used, device) for t in tables}
        reads = read_gradients(lowered, self.kernel.wanted)
        pairs = {g.read.tensor for g in reads if g.place == "pair"}
        given = {n: x.detach() for n, x in self.leaves.items()}
        given |= {n: given[n].contiguous() for n in pairs}
        self.named |= {f"t:{n}": x for n, x in (given | filled_tables).items()}
        self.tables = filled_tables
        self.buffers = {n: torch.zeros_like(given[n], dtype=torch.float32) for n in pairs}
        ends = {"query": q_len, "key": kv_len}
        at: list[Tensor] = []
        for n, g in enumerate(reads):
            if g.place == "pair":
                total = self.buffers[g.read.tensor]
            else:
                total = self.delta.new_empty((*self.rows[:2], ends[g.place]))
            self.named[f"g:{n}"] = total
            at.append(total)
        self.empty = None if self.spec.is_unmasked else self.lse == -torch.inf
        tiles = self.kernel.tiles
        if self.spec.edit is not None:
            self._factors()
        elif self.kernel.sums_rows:
            self._launch("softmax_bwd_rows_kernel", "q", tiles.queries.queries)
        self._launch("softmax_bwd_queries_kernel", "q", tiles.queries.queries)
        self._launch("softmax_bwd_keys_kernel", "k", tiles.keys.keys)
        if self.empty is not None:
            self._rows_that_see_nothing(self.empty)
        with torch.enable_grad():
            for g, total in zip(reads, at, strict=True):
                if g.place != "pair":
                    self.sums.add(self._value(g.read, g.place), total)
            if self.spec.sink is not None and self.kernel.wanted:
                self._sink()

    def _launch(self, name: str, of: str, tile: int) -> None:
        source = backward_source(self.kernel)
        x = self.named[of]
        programs = x.shape[0] * x.shape[1] * -(-x.shape[2] // tile)
        launch(source, name, programs, self.named, self.numbers)

    def _value(self, formula: Formula, axis: str, **more: Any) -> Tensor:
        """A formula at every query or key, `[B, H, L]` or `[B, H, M]` or what that broadcasts."""
        device = self.q.device
        batch, heads, _ = self.rows
        length = self.numbers["L" if axis == "query" else "M"]
        values: dict[str, Any] = {**self.numbers, **more}
        values["b"] = torch.arange(batch, device=device)[:, None, None]
        values["h"] = torch.arange(heads, device=device)[:, None]
        values["q" if axis == "query" else "k"] = torch.arange(length, device=device)
        tensors = self.leaves | self.tables
        found = evaluate(formula, values, tensors, torch.float32)
        return tensor_of(found, self.lse, torch.float32)

    # what is left to torch

    def _factors(self) -> None:
        """The factors of each group, the gradients of their masses, and `delta`."""
        edit = self.kernel.lowered[0].edit
        assert edit is not None
        shape = (len(edit.factors), *self.rows)
        masses, totals = self.delta.new_empty(shape), self.delta.new_empty(shape)
        self.named |= {"masses": masses, "totals": totals}
        self._launch("softmax_bwd_rows_kernel", "q", self.kernel.tiles.queries.queries)
        if self.empty is not None and self.spec.masked in ("mean", "add"):
            self._masses_of_all_keys(masses, totals)
        with torch.enable_grad():
            leaves = [m.requires_grad_() for m in masses.unbind(0)]
            named = dict(zip(map(str, sym.masses), leaves, strict=False))
            factors = [self._value(f, "query", **named).float() for f in edit.factors]
            through = [(a, t) for a, t in zip(factors, totals, strict=True) if a.requires_grad]
            back: Sequence[Tensor | None] = [None] * len(leaves)
            if through:
                back = torch.autograd.grad(
                    [a for a, _ in through],
                    leaves,
                    [t.sum_to_size(a.shape) for a, t in through],
                    allow_unused=True,
                    retain_graph=True,
                )
        for a, t in zip(factors, totals, strict=True):
            self.sums.add(a, t)
        a = torch.stack([f.detach().expand(self.rows) for f in factors])
        zero = torch.zeros(self.rows, device=a.device)
        b = torch.stack([zero if g is None else g for g in back])
        self.named |= {"factors": a, "offsets": b}
        torch.sum(a * totals + b * masses.detach(), 0, out=self.delta)

    def _groups(self) -> Tensor:
        """Which keys are in each group, `[groups, B, H, M]`."""
        edit = self.kernel.lowered[0].edit
        assert edit is not None
        group = self._value(edit.group, "key").expand(*self.rows[:2], -1)
        numbers = torch.arange(len(edit.factors), device=group.device)
        kv_len = self.numbers["M"]
        return (group == numbers.view(-1, 1, 1, 1)).expand(-1, -1, -1, kv_len).float()

    def _masses_of_all_keys(self, masses: Tensor, totals: Tensor) -> None:
        """A row that sees no key weighs all keys alike."""
        assert self.empty is not None
        groups, kv_len = self._groups(), self.numbers["M"]
        masses.copy_(torch.where(self.empty, groups.mean(-1)[..., None], masses))
        v = self.v.float().repeat_interleave(self.numbers["G"], 1)
        means = torch.einsum("gbhm,bhme->gbhe", groups, v) / kv_len
        products = torch.einsum("bhle,gbhe->gbhl", self.grad.float(), means)
        totals.copy_(torch.where(self.empty, products, totals))

    def _rows_that_see_nothing(self, empty: Tensor) -> None:
        masked = self.spec.masked
        dv = self.named["dv"]
        if masked == "nan":
            lost = empty.any(-1)[..., None]  # [B, H, 1]; hidden scores have no gradient
            if self.spec.edit is not None:  # keys of no group have no weight
                lost = lost & (self._groups().sum(0) > 0)
            dv.masked_fill_(self._of_groups(lost)[..., None] > 0, torch.nan)
        if masked not in ("mean", "add"):
            return
        kv_len, seen = self.numbers["M"], empty.float()
        grad = self.grad.float()
        if self.spec.edit is None:
            total = torch.einsum("bhl,bhle->bhe", seen, grad)[:, :, None] / kv_len
        else:
            weights = self.named["factors"] * seen
            each = torch.einsum("gbhl,bhle->gbhe", weights, grad) / kv_len
            total = torch.einsum("gbhm,gbhe->bhme", self._groups(), each)
        dv += self._of_groups(total).to(dv.dtype)
        if masked == "add":
            self._through_plain_scores(seen, grad)

    def _through_plain_scores(self, seen: Tensor, grad: Tensor) -> None:
        """Where hiding adds to the scores, `ds = (do v - delta) / M` in rows that see nothing."""
        factor = float(self.spec.scale) / self.numbers["M"]
        heads = self.numbers["G"]
        q, k, v = (x.float() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
        grad, delta = grad * seen[..., None], (self.delta * seen)[..., None]
        dq = grad @ (v.mT @ k) - delta * k.sum(2, keepdim=True)
        dk = v @ (grad.mT @ q) - (delta * q).sum(2, keepdim=True)
        self.named["dq"] += (factor * dq).to(self.q.dtype)
        self.named["dk"] += self._of_groups(factor * dk).to(self.k.dtype)

    def _of_groups(self, x: Tensor) -> Tensor:
        """A sum over the heads that share keys."""
        batch, heads = x.shape[:2]
        group = self.numbers["G"]
        return x.reshape(batch, heads // group, group, *x.shape[2:]).sum(2)

    def _sink(self) -> None:
        """A sink takes a part of a row and has no value: only `-sum p u` reaches it."""
        sink = self._value(cast(Formula, self.kernel.lowered[0].sink), "query")
        if sink.requires_grad:
            part = torch.exp(sink.detach() - self.lse)
            part = torch.where(self.lse == -torch.inf, 0.0, part)
            self.sums.add(sink, -part * self.delta)
