"""One site on its own operands: which stage of a spec makes two computations differ.

The rule is that of `verify`, with `reference` in the place of the original: gold is the reference
in float64, ref the reference in the dtype of the operands, new whatever is under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from sympy import Float
from torch import Tensor

from rewriter.errors import LoweringError
from rewriter.lowering import Shapes, choose
from rewriter.op import attention
from rewriter.reference import mask_of, reference
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.verify.call import Run
from rewriter.verify.growing import Stage, grown, plainest, without_dropout
from rewriter.verify.judge import Judge
from rewriter.verify.leaves import Leaves
from rewriter.verify.report import VerifyRow

__all__ = [
    "Function",
    "Operands",
    "Stage",
    "changed_stage",
    "compared",
    "difference",
    "lowered",
    "lowering_of",
    "run",
    "stage_of",
    "unmasked_rows",
]

Function = Callable[[Spec, "Operands"], Tensor]
"""An attention on operands: `run`, or `lowered(target)`."""


@dataclass(frozen=True)
class Operands:
    """What one call of a site was given."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: Mapping[str, Tensor]
    """What formulas read, by name; may hold more than one spec reads."""
    sizes: Mapping[str, int]

    def of(self, spec: Spec) -> tuple[list[Tensor], list[int]]:
        """The tensors and sizes of a spec, in its order."""
        return [self.tensors[t.name] for t in spec.tensors], [self.sizes[n] for n in spec.sizes]

    def hold(self, spec: Spec) -> bool:
        """Everything that the spec reads is there."""
        named = {t.name for t in spec.tensors}
        return named <= set(self.tensors) and set(spec.sizes) <= set(self.sizes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The same with every floating tensor changed."""
        q, k, v = (change(x) for x in (self.q, self.k, self.v))
        tensors = {n: change(x) if x.is_floating_point() else x for n, x in self.tensors.items()}
        return Operands(q, k, v, tensors, self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest one."""
        return max(
            (x.dtype for x in self.floating().values()), key=lambda dtype: torch.finfo(dtype).eps
        )

    def floating(self) -> dict[str, Tensor]:
        """What can want a gradient, by name."""
        read = {n: x for n, x in self.tensors.items() if x.is_floating_point()}
        return {"q": self.q, "k": self.k, "v": self.v, **read}

    def shapes(self, spec: Spec, *, grad: bool = False) -> Shapes:
        batch, heads, q_len, head_dim = self.q.shape
        _, kv_heads, kv_len, value_dim = self.v.shape
        dims = (batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
        sizes = tuple(self.of(spec)[1])
        return Shapes(self.q.device.type, self.q.dtype, *dims, grad, sizes)


# --- what is compared -----------------------------------------------------------------------------


def run(spec: Spec, operands: Operands) -> Tensor:
    """The meaning of the spec, dropout left out."""
    q, k, v = operands.q, operands.k, operands.v
    return reference(without_dropout(spec), q, k, v, *operands.of(spec))


def lowered(target: str) -> Function:
    """What the op makes of a spec, dropout left out."""

    def function(spec: Spec, operands: Operands) -> Tensor:
        q, k, v = operands.q, operands.k, operands.v
        return attention(q, k, v, *operands.of(spec), without_dropout(spec), target)

    return function


def lowering_of(spec: Spec, operands: Operands, target: str, *, grad: bool = False) -> str:
    """The name of the lowering that the op would choose."""
    return choose(without_dropout(spec), operands.shapes(spec, grad=grad), target).lowering.name


def compared(
    gold: Mapping[str, Tensor], ref: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> list[VerifyRow]:
    """One row for the output `out` and each gradient, by the rule of `verify`."""
    dtype = max((x.dtype for x in ref.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return Judge.of(_as_run(ref), _as_run(gold), torch.float64, dtype).rows(_as_run(new))


def _as_run(values: Mapping[str, Tensor]) -> Run:
    outputs = Leaves({n: x for n, x in values.items() if n == "out"}, ())
    return Run(outputs, {n: x for n, x in values.items() if n != "out"})


def results(
    function: Function, spec: Spec, operands: Operands, *, gradients: bool
) -> dict[str, Tensor]:
    """The output, and the gradients of everything floating for a fixed cotangent."""
    if not gradients:
        with torch.no_grad():
            return {"out": function(spec, operands)}
    with torch.enable_grad():
        wanted = operands.map(lambda x: x.detach().requires_grad_())
        out = function(spec, wanted)
        read = {t.name for t in spec.tensors}
        leaves = {n: x for n, x in wanted.floating().items() if n in read or n in ("q", "k", "v")}
        generator = torch.Generator().manual_seed(0)
        cotangent = (torch.randint(-32, 33, out.shape, generator=generator) / 16).to(out)
        found = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    grads = {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return {"out": out.detach(), **grads}


def difference(
    new: Function,
    spec: Spec,
    meant: Spec,
    operands: Operands,
    *,
    gradients: bool = False,
    rows: Tensor | None = None,
) -> str:
    """How `new` of `spec` differs from the reference of `meant`; `""` if it does not.

    Args:
        gradients: compare the gradients, not the output.
        rows: the rows `[B, H, L]` that are compared; None for all.
    """
    gold = results(run, meant, operands.map(Tensor.double), gradients=gradients)
    ref = results(run, meant, operands, gradients=gradients)
    try:
        got = results(new, spec, operands, gradients=gradients)
    except LoweringError:
        return ""  # it does not take this form of the spec
    except Exception as error:
        return f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"
    # what the new spec does not read has no gradient
    got = {n: got.get(n, torch.zeros_like(x)) for n, x in ref.items()}
    if rows is not None:
        if not bool(rows.any()):
            return ""
        gold, ref, got = ({**x, "out": x["out"][rows]} for x in (gold, ref, got))
    kind = "gradient" if gradients else "output"
    failed = (r for r in compared(gold, ref, got) if not r.ok and r.kind == kind)
    return next((f"{_named(r)}: {r.reason}" for r in failed), "")


def _named(row: VerifyRow) -> str:
    return "output" if row.kind == "output" else f"gradient of {row.name}"


def unmasked_rows(spec: SoftmaxSpec, operands: Operands) -> Tensor:
    """Rows `[B, H, L]` to which the mask shows a key."""
    (batch, heads, q_len, _), kv_len = operands.q.shape, operands.k.shape[2]
    tensors, sizes = operands.of(spec)
    read = [x.cpu() for x in tensors]
    lengths = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
    mask = mask_of(spec, tensors=read, sizes=sizes, **lengths)
    return mask.reshape(batch, heads, q_len, kv_len).any(-1).to(operands.q.device)


# --- which stage ----------------------------------------------------------------------------------


def changed_stage(
    before: Spec, after: Spec, operands: Operands, *, gradients: bool = False
) -> tuple[Stage, str] | None:
    """The first stage in which `after` is another function than `before`, and how; None if they are
    the same function on these operands."""
    for stage, spec in grown(before, after):
        found = difference(run, spec, before, operands, gradients=gradients)
        if found:
            return stage, found
    return None


def stage_of(
    new: Function, spec: Spec, operands: Operands, *, gradients: bool = False
) -> tuple[Stage, str] | None:
    """The first stage at which `new` differs from the reference when the stages of the spec are
    switched on one after another, and how; None if it does not differ."""
    whole = difference(new, spec, spec, operands, gradients=gradients)
    if not whole:
        return None
    plain = plainest(spec, operands.q.shape[3])
    found = difference(new, plain, plain, operands, gradients=gradients)
    if found and not isinstance(plain, SoftmaxSpec):
        return "family", found
    if found:
        assert isinstance(plain, SoftmaxSpec)
        factor = _scale_taken(new, plain, operands)
        if factor is not None and not gradients:
            return "score", f"it multiplies the scores by {factor:.4g}; {whole}"
        return "operands", found
    for stage, more in grown(plain, spec):
        if stage == "mask" and not gradients:
            assert isinstance(more, SoftmaxSpec)
            assert isinstance(spec, SoftmaxSpec)
            rows = unmasked_rows(more, operands)
            found = difference(new, more, more, operands, rows=rows)
            if not found and more.masked == spec.masked:
                empty = difference(new, more, more, operands)
                if empty:
                    return "normaliser", f"rows that see no key differ: {empty}"
        else:
            found = difference(new, more, more, operands, gradients=gradients)
        if found:
            return stage, found
    return "operands", whole


def _scale_taken(new: Function, plain: SoftmaxSpec, operands: Operands) -> float | None:
    """The factor by which `new` scales its scores too much, if that alone is what is wrong."""
    still = replace(operands, q=torch.zeros_like(operands.q))
    if difference(new, plain, plain, still):
        return None
    for factor in factors(operands):
        meant = replace(plain, scale=plain.scale * Float(factor))
        if not difference(new, plain, meant, operands):
            return factor
    return None


def factors(operands: Operands) -> tuple[float, ...]:
    """By what a scale is wrong, when it is."""
    root = max(1, operands.q.shape[3]) ** 0.5
    return (2.0, 0.5, root, 1 / root, -1.0, root**2, 1 / root**2, 0.0)
