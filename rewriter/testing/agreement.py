"""One call of an attention against the dense reference, outputs and gradients, by the error ratio.

Gold is the reference in float64, ref the reference in the dtype of the case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.reference import reference
from rewriter.spec import Spec
from rewriter.stages import Source
from rewriter.testing.cases import Case
from rewriter.testing.operands import Operands, operands
from rewriter.testing.outcome import Outcome
from rewriter.testing.roundings import gradient_terms, output_terms
from rewriter.verify.compare import Baseline, baseline_of, compare
from rewriter.verify.rows import Errors, Kind

__all__ = [
    "Forward",
    "Row",
    "expected_output",
    "gradients",
    "gradients_agree",
    "judged",
    "nan_memory",
    "output_agrees",
    "run",
    "same",
]

Forward = Callable[[Spec, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int]], Tensor]
"""What a lowering has as its `forward`."""


def run(forward: Forward, spec: Spec, x: Operands) -> Tensor:
    """The output for these operands."""
    return forward(spec, x.q, x.k, x.v, x.tensors, x.sizes)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN: what an implementation does not write cannot pass."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())


def output_agrees(forward: Forward, case: Case, check: str = "output") -> Outcome:
    """The output is that of the reference, and the operands are as before."""
    x = operands(case)
    with torch.no_grad():
        before = x.map(Tensor.clone)
        try:
            with nan_memory():
                new = run(forward, case.spec, x)
        except Exception as error:
            return Outcome(check, case.text, "failed", _raised(error))
        if not all(map(same, _inputs(x), _inputs(before))):
            return Outcome(check, case.text, "failed", "an operand was written to")
    row = Row("the output", "output", expected_output(case), new, case.dtype)
    return judged(check, case.text, [row])


def gradients_agree(forward: Forward, case: Case, check: str = "gradient") -> Outcome:
    """The gradients of q, k, v and every floating tensor that formulas read are those of the
    reference, for one random cotangent."""
    expected = _expected_gradients(case)
    if expected is None:
        return Outcome(check, case.text, "skipped", "rows of NaN have no gradient")
    try:
        with nan_memory():
            new = gradients(forward, case.spec, operands(case), _cotangent(case))
    except Exception as error:
        return Outcome(check, case.text, "failed", _raised(error))
    rows = [
        Row(f"the gradient of {name}", "gradient", base, n, case.dtype)
        for name, base, n in zip(_names(case.spec), expected, new, strict=True)
    ]
    return judged(check, case.text, rows)


Found = TypeVar("Found")


def _known(find: Callable[[Case], Found]) -> Callable[[Case], Found]:
    """Remembers what is found of a case, by the programs of its tensors too: equal specs may have
    other ones."""

    @lru_cache(maxsize=512)
    def known(case: Case, programs: tuple[Source | None, ...]) -> Found:
        return find(case)

    @wraps(find)
    def found(case: Case) -> Found:
        programs = tuple(t.source for t in case.spec.tensors)
        try:
            hash(programs)
        except TypeError:  # an option that is a list, say
            return find(case)
        return known(case, programs)

    return found


@_known
def expected_output(case: Case) -> Baseline:
    """What the reference gives, in the dtype of the case and in float64."""
    x = operands(case)
    with torch.no_grad():
        gold = run(reference, case.spec, x.map(Tensor.double))
        base = baseline_of(run(reference, case.spec, x), gold)
        least = output_terms(case.spec, x.map(Tensor.double))
        return replace(base, size=Errors(*map(max, base.size, least)))


@_known
def _expected_gradients(case: Case) -> tuple[Baseline, ...] | None:
    """The same of each gradient; None where the output holds NaN."""
    x, cotangent = operands(case), _cotangent(case)
    wide = x.map(Tensor.double)
    with torch.no_grad():
        if bool(run(reference, case.spec, wide).isnan().any()):
            return None
    ref = gradients(reference, case.spec, x, cotangent)
    gold = gradients(reference, case.spec, wide, cotangent.double())
    found = []
    sizes = gradient_terms(case.spec, wide, cotangent.double())
    for r, g, least in zip(ref, gold, sizes, strict=True):
        base = baseline_of(r, g)
        found.append(replace(base, size=Errors(*map(max, base.size, least))))
    return tuple(found)


def gradients(forward: Forward, spec: Spec, x: Operands, cotangent: Tensor) -> list[Tensor]:
    """Gradients of q, k, v and the floating tensors; zeros where autograd finds no way to one."""
    leaves = x.map(lambda t: t.detach().requires_grad_())
    wanted = [t for t in _inputs(leaves) if t.is_floating_point()]
    with torch.enable_grad():
        out = run(forward, spec, leaves)
    if not out.requires_grad:
        raise RuntimeError("the output does not depend on the operands, as autograd sees it")
    found = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


@dataclass(frozen=True)
class Row:
    """One tensor that is compared."""

    name: str
    kind: Kind
    base: Baseline
    new: Tensor
    dtype: torch.dtype
    """The coarsest dtype that the reference computes in."""


def judged(check: str, text: str, rows: Sequence[Row]) -> Outcome:
    """One outcome for several tensors: the worst one speaks.

    A tensor of which zeros would pass as well is not among those that pass.
    """
    used, unbound = [], []
    for row in rows:
        found = compare(row.name, row.kind, row.base, row.new, row.dtype)
        if not found.ok:
            return Outcome(check, text, "failed", f"{row.name}: {found.reason}", found.used)
        if _bounds_nothing(row.base, found.allowed):
            unbound.append(row.name)
        else:
            used.append(found.used)
    if unbound and not used:
        reason = f"bounds nothing: zeros are allowed for {', '.join(unbound)}"
        return Outcome(check, text, "skipped", reason)
    return Outcome(check, text, "passed", used=max(used, default=0.0))


def _bounds_nothing(base: Baseline, allowed: Errors | None) -> bool:
    """True if the error that is allowed is as large as the values, which are not all zero."""
    if allowed is None:
        return False
    gold = base.gold.abs()
    gold = gold if base.special is None else gold[~base.special]
    if not gold.numel() or not bool(gold.any()):
        return False
    return allowed.mean >= float(gold.mean()) and allowed.max >= float(gold.max())


def _names(spec: Spec) -> list[str]:
    return ["q", "k", "v", *(t.name for t in spec.tensors if "float" in t.dtype)]


def _inputs(x: Operands) -> list[Tensor]:
    return [x.q, x.k, x.v, *x.tensors]


def _cotangent(case: Case) -> Tensor:
    """Laid out as the gradient of a model that merges heads after attention."""
    d = case.dims
    generator = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(d.batch, d.q_len, d.heads, d.value_dim, generator=generator)
    return x.to(case.device, case.dtype).transpose(1, 2)


def _raised(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
