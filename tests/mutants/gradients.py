"""Wrong gradients: a dense backward written out, with one step replaced, and patches of ours.

The outputs of all of these are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mutants.catalogue import Mutant
from mutants.toy import lowering_of
from rewriter.evaluate import evaluate, index_values
from rewriter.kernels import torch_backward
from rewriter.kernels.torch_blocked import Call
from rewriter.lowering import BLOCKED, Lowering
from rewriter.reference import reference, reference_weights
from rewriter.spec import SoftmaxSpec

__all__ = ["HONEST", "MUTANTS", "Patched"]

MUTANTS: list[Mutant] = []


class Written:
    """The backward of attention as the textbook has it, in steps; the forward is the reference."""

    def __call__(
        self,
        spec: SoftmaxSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Tensor:
        return _Function.apply(self, spec, sizes, q, k, v, *tensors)

    def backward(
        self, spec: SoftmaxSpec, sizes: Sequence[int], given: Tensor, inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        given, q, k, v, *tensors = (
            x.detach().to(wide) if x.is_floating_point() else x for x in (given, *inputs)
        )
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        self.spec, self.group = spec, group
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
        named = dict(zip((t.name for t in spec.tensors), leaves, strict=True))
        values: dict[str, Any] = index_values(
            spec, q.shape[0], heads, q.shape[2], k.shape[2], sizes, q.device
        )
        product = q @ k.mT
        with torch.enable_grad():
            scale = torch.as_tensor(evaluate(spec.scale, values, named, wide), dtype=wide)
            s = (product * scale).detach().requires_grad_()
            z = evaluate(spec.score, {**values, "s": s}, named, wide)
            z = torch.as_tensor(z, dtype=wide).expand_as(s)
            gate = torch.as_tensor(evaluate(spec.heads, values, named, wide), dtype=wide)
            sink = torch.zeros(())
            if spec.sink is not None:
                sink = torch.as_tensor(evaluate(spec.sink, values, named, wide), dtype=wide)
        with torch.no_grad():
            p = reference_weights(spec, q, k, [x.detach() for x in leaves], sizes)
            seen = torch.as_tensor(evaluate(spec.mask, values, named, wide)).expand_as(p)
            inner = self.through_gate(given, gate)
            dv = p.mT @ inner
            dp = self.weights_gradient(inner, v)
            delta = self.delta(p, dp)
            dz = self.score_gradient(p, dp, delta)
            dz = self.hidden(dz, seen)
            pairs = [(gate, given * (p @ v)), (z, dz)]
            if spec.sink is not None:
                pairs.append((sink, self.sink_gradient(p, delta)))
            ds = self.through_formula(dz, s, z)
            pairs.append((scale, ds * product))
            dq, dk = self.query_gradient(ds, k, scale), self.key_gradient(ds, q, scale)
            dk, dv = self.grouped(dk), self.grouped(dv)
        found = self.tensor_gradients(
            [(x, g.expand(p.shape[:-1] + g.shape[-1:])) for x, g in pairs if x.requires_grad],
            [x for x in leaves if x.requires_grad],
        )
        rest = iter(found)
        more = [next(rest) if x.requires_grad else None for x in leaves]
        dq, dk, dv = self.order(dq, dk, dv)
        return [
            None if g is None else g.to(x.dtype)
            for g, x in zip((dq, dk, dv, *more), inputs, strict=True)
        ]

    # --- the steps --------------------------------------------------------------------------------

    def through_gate(self, given: Tensor, gate: Tensor) -> Tensor:
        return given * gate

    def weights_gradient(self, inner: Tensor, v: Tensor) -> Tensor:
        return inner @ v.mT

    def delta(self, p: Tensor, dp: Tensor) -> Tensor:
        return (p * dp).sum(-1, keepdim=True)

    def score_gradient(self, p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
        return p * (dp - delta)

    def hidden(self, dz: Tensor, seen: Tensor) -> Tensor:
        return dz if self.spec.masked == "add" else dz.masked_fill(~seen, 0.0)

    def sink_gradient(self, p: Tensor, delta: Tensor) -> Tensor:
        return (p.sum(-1, keepdim=True) - 1.0) * delta

    def through_formula(self, dz: Tensor, s: Tensor, z: Tensor) -> Tensor:
        if not z.requires_grad:
            return torch.zeros_like(s)
        (found,) = torch.autograd.grad(z, s, dz, retain_graph=True, allow_unused=True)
        return torch.zeros_like(s) if found is None else found

    def query_gradient(self, ds: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return (ds * scale) @ k

    def key_gradient(self, ds: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return (ds * scale).mT @ q

    def grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.group)).sum(2)

    def tensor_gradients(
        self, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]
    ) -> list[Tensor | None]:
        if not pairs or not leaves:
            return [None] * len(leaves)
        grads = [g.sum_to_size(_four(x)).reshape(x.shape) for x, g in pairs]
        return list(torch.autograd.grad([x for x, _ in pairs], leaves, grads, allow_unused=True))

    def order(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dq, dk, dv


def _four(x: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - x.dim()) + tuple(x.shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, written: Written, spec: SoftmaxSpec, sizes: Sequence[int], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.rest = written, spec, sizes
        q, k, v, *tensors = inputs
        return reference(spec, q, k, v, tensors, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        written, spec, sizes = ctx.rest
        return None, None, None, *written.backward(spec, sizes, grads[0], ctx.saved_tensors)


HONEST = lowering_of(Written(), records=True)


def step(method: str, name: str, breaks: str = "") -> Any:
    """A `Written` in which the function takes the place of a step."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        kind = type(function.__name__, (Written,), {method: function})
        made = lowering_of(kind(), records=True)
        MUTANTS.append(Mutant(name, "gradient", breaks, "gradient", made))
        return function

    return add


@step("delta", "row sums of the backward forgotten", "ds = p · dp instead of p · (dp - delta)")
def no_delta(w: Written, p: Tensor, dp: Tensor) -> Tensor:
    return torch.zeros_like(p[..., :1])


@step("delta", "row sums over the queries", "the wrong axis of p · dp")
def delta_of_columns(w: Written, p: Tensor, dp: Tensor) -> Tensor:
    return (p * dp).sum(-2, keepdim=True)


@step("score_gradient", "weights forgotten in the gradient of the scores")
def no_weights(w: Written, p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    return dp - delta


@step("hidden", "gradient through hidden keys", "the mask is not applied again in the backward")
def gradient_through_hidden(w: Written, dz: Tensor, seen: Tensor) -> Tensor:
    return dz + 0.01 * ~seen


@step("hidden", "gradient of rows that see no key", "of a mean there is none to the scores")
def gradient_of_empty_rows(w: Written, dz: Tensor, seen: Tensor) -> Tensor:
    return dz


@step("hidden", "gradient of an added mask lost", "rows that see no key still have one there")
def no_gradient_of_empty_rows(w: Written, dz: Tensor, seen: Tensor) -> Tensor:
    return dz.masked_fill(~seen, 0.0)


@step("through_formula", "derivative of the soft cap forgotten", "ds = dz")
def no_cap_derivative(w: Written, dz: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return dz


@step("query_gradient", "scale missing in the gradient of q")
def no_scale_in_dq(w: Written, ds: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return ds @ k


@step("key_gradient", "scale missing in the gradient of k")
def no_scale_in_dk(w: Written, ds: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return ds.mT @ q


@step("key_gradient", "scale twice in the gradient of k", "q was scaled before it was kept")
def scale_twice_in_dk(w: Written, ds: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return (ds * scale * scale).mT @ q


@step("order", "gradients of k and v swapped")
def dk_and_dv_swapped(w: Written, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    return (dq, dv, dk) if dk.shape == dv.shape else (dq, dk, dv)


@step("order", "gradient of k missing", "keys of a cache are taken as constants")
def no_dk(w: Written, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    return dq, torch.zeros_like(dk), dv


@step("order", "gradient of v in bfloat16")
def dv_in_half(w: Written, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    return dq, dk, dv.to(torch.bfloat16).to(dv.dtype)


@step(
    "order", "gradient of the last keys missing", "the loop of the backward stops at a full block"
)
def last_keys_without_gradient(
    w: Written, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, ...]:
    whole = dk.shape[2] // 16 * 16 or dk.shape[2]
    dk[:, :, whole:] = 0.0
    return dq, dk, dv


@step("grouped", "gradients of a group not summed", "only the first query head of each group")
def group_not_summed(w: Written, x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, w.group))[:, :, 0]


@step("grouped", "gradients of a group averaged")
def group_averaged(w: Written, x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, w.group)).mean(2)


@step("grouped", "gradients of interleaved groups summed")
def group_interleaved(w: Written, x: Tensor) -> Tensor:
    return x.unflatten(1, (w.group, -1)).sum(1)


@step("sink_gradient", "gradient of a sink missing")
def no_sink_gradient(w: Written, p: Tensor, delta: Tensor) -> Tensor:
    return torch.zeros_like(delta)


@step("sink_gradient", "sign of the gradient of a sink")
def sink_gradient_sign(w: Written, p: Tensor, delta: Tensor) -> Tensor:
    return -Written.sink_gradient(w, p, delta)


@step("sink_gradient", "gradient of a sink without its own weight", "-delta, not -p_sink · delta")
def sink_gradient_unweighted(w: Written, p: Tensor, delta: Tensor) -> Tensor:
    return -delta


@step("tensor_gradients", "gradient of a captured bias missing")
def no_tensor_gradients(
    w: Written, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]
) -> list[Tensor | None]:
    return [None] * len(leaves)


@step("tensor_gradients", "gradient of a bias averaged over the batch")
def averaged_over_batch(
    w: Written, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]
) -> list[Tensor | None]:
    found = Written.tensor_gradients(w, pairs, leaves)
    batch = pairs[0][1].shape[0] if pairs else 1
    return [None if g is None else g / batch for g in found]


@step(
    "tensor_gradients", "gradient of a table written, not added", "the last read of each row wins"
)
def last_read_wins(
    w: Written, pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]
) -> list[Tensor | None]:
    return Written.tensor_gradients(
        w, [(x, torch.cat([0 * g[:, :, :-1], g[:, :, -1:]], dim=2)) for x, g in pairs], leaves
    )


@step("through_gate", "factor of the heads missing in the backward")
def no_gate_in_backward(w: Written, given: Tensor, gate: Tensor) -> Tensor:
    return given


@step("weights_gradient", "gradient through the keys", "dp = grad · k, not grad · v")
def weights_gradient_of_another_head(w: Written, inner: Tensor, v: Tensor) -> Tensor:
    return inner @ v.roll(1, 1).mT


# --- patches of our own backward ------------------------------------------------------------------


@dataclass(frozen=True)
class Patched:
    """A lowering of ours, while something in our code is broken."""

    lowering: Lowering
    patches: tuple[tuple[Any, str, Any], ...]

    @contextmanager
    def active(self) -> Iterator[Lowering]:
        before = [getattr(owner, name) for owner, name, _ in self.patches]
        for owner, name, value in self.patches:
            setattr(owner, name, value)
        try:
            yield self.lowering
        finally:
            for (owner, name, _), value in zip(self.patches, before, strict=True):
                setattr(owner, name, value)


def patch(
    owner: Any,
    method: str,
    name: str,
    breaks: str = "",
    kind: Any = "gradient",
    expected: str = "gradient",
) -> Any:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        made = Patched(BLOCKED, ((owner, method, function),))
        words = "output" if kind == "lowering" else expected
        MUTANTS.append(Mutant(name, kind, breaks, words, made))
        return function

    return add


Step = torch_backward._Step
_add_columns = Step._add_columns


@patch(Step, "_through_sink", "ours: gradient of a sink missing")
def ours_without_sink(self: Any, p: Tensor, dp: Tensor) -> None:
    return None


@patch(Step, "_add_part", "ours: gradient of a captured tensor missing")
def ours_without_parts(self: Any, part: Any, grad: Tensor) -> None:
    return None


@patch(Step, "_shared", "ours: the sink's share forgotten in the backward")
def ours_without_share(self: Any, p: Tensor) -> Tensor:
    return p


@patch(Step, "_add_columns", "ours: gradient of k at the next key")
def ours_shifted(self: Any, which: int, rows: Tensor, values: Tensor, alpha: float = 1.0) -> None:
    _add_columns(self, which, rows.roll(1, -1) if which == 1 else rows, values, alpha)


@patch(Step, "_add_columns", "ours: scale missing in the gradient of k")
def ours_without_scale(
    self: Any, which: int, rows: Tensor, values: Tensor, alpha: float = 1.0
) -> None:
    _add_columns(self, which, rows, values)


@patch(Step, "_through_heads", "ours: factor of the heads missing in the backward")
def ours_without_heads(self: Any, grad: Tensor, dropped: Tensor) -> Tensor:
    return grad


_backward = torch_backward.backward


@patch(
    torch_backward, "backward", "ours: other weights dropped in the backward", expected="dropout"
)
def ours_with_other_dropout(*args: Any, seed: int | None = None) -> Any:
    return _backward(*args, seed=None if seed is None else seed + 1)


# --- patches of our own forward -------------------------------------------------------------------

_visible, _hide, _share, _rows = Call._visible, Call._hide, Call._share, Call.rows


@patch(Call, "_visible", "ours: the last visible key of a block left out", kind="lowering")
def ours_sees_less(self: Any, spans: Any) -> Any:
    return tuple((a, max(a + 1, c - 1)) for a, c in _visible(self, spans))


@patch(Call, "_hide", "ours: rows without a key not looked for", kind="lowering")
def ours_ignores_empty_rows(self: Any, x: Any, s: Tensor, fill: float) -> bool:
    _hide(self, x, s, fill)
    return False


@patch(Call, "_share", "ours: the sink's share from a rounded logsumexp", kind="lowering")
def ours_rounds_the_sink(self: Any, x: Any, p: Tensor, top: Tensor) -> Tensor:
    found = _share(self, x, p, top)
    return found.to(torch.bfloat16).to(found.dtype)


@patch(Call, "rows", "ours: query heads interleaved in a block", kind="lowering")
def ours_interleaved(self: Any, source: Tensor, x: Any) -> Tensor:
    heads = source.shape[1]
    order = torch.arange(heads).view(self.group, -1).T.flatten()
    return _rows(self, source[:, order], x)
