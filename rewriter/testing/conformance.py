"""The conformance of an implementation: every case against the reference, and the laws.

`check_lowering` takes any `Lowering`, one of the table or one that a test made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from sympy import Integer
from torch import Tensor

from rewriter import lowering as table
from rewriter.beside import Beside, beside
from rewriter.lowering import Lowering, backward_of
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import Spec
from rewriter.testing import laws
from rewriter.testing.agreement import (
    Forward,
    Row,
    gradients_agree,
    judged,
    nan_memory,
    output_agrees,
    run,
    same,
)
from rewriter.testing.cases import Case, Dims
from rewriter.testing.core import refusal, whole
from rewriter.testing.dropout import dropout_row
from rewriter.testing.grid import Plan, cases, extremes, plan, sizes_of
from rewriter.testing.onnx_runtime import ONNX
from rewriter.testing.operands import operands
from rewriter.testing.outcome import Outcome, Outcomes
from rewriter.testing.worker import interpreted
from rewriter.verify.compare import baseline_of

__all__ = ["check_backward", "check_lowering", "lowering_rows", "spec_rows"]

Backward = Callable[..., Sequence[Tensor | None]]


def check_lowering(lowering: Lowering, *, full: bool = False) -> Outcomes:
    """Everything that an implementation promises, on the cases that it supports.

    Args:
        lowering: one of `rewriter.lowering.LOWERINGS`, or any other value of that class. Gradients
            of one of the table are those of `rewriter.op.attention`; those of another one
            are what autograd records, if it says `records`.
        full: the whole grid of cases instead of the fast choice.
    """
    title = f"lowering {lowering.name}"
    if lowering is table.TRITON and not torch.cuda.is_available():
        return Outcomes(title, interpreted(None, full=full))
    work = plan("export" if lowering is ONNX else "call", full=full)
    device = "cuda" if lowering is table.TRITON else "cpu"
    return Outcomes(title, tuple(lowering_rows(lowering, work.on(device), device)))


def lowering_rows(lowering: Lowering, work: Plan, device: str = "cpu") -> Iterator[Outcome]:
    """The rows of `check_lowering`, in this process."""
    yield from spec_rows(lowering, work.cases, gradients=work.gradients)
    yield from spec_rows(lowering, work.extremes, "extremes", gradients=work.gradients)
    for name in work.repeated:
        case = Case.of(name, Dims(q_len=33, kv_len=33), device=device)
        yield _supported(lowering, case, "determinism", _deterministic)
        yield dynamic_shapes(lowering, replace(case, dims=Dims()), few=work.few_sizes)
    for name in work.decoding:
        for ahead in (0, 20):
            dims = Dims(q_len=work.steps, kv_len=work.steps + ahead)
            case = Case.of(name, dims, device=device)
            yield decode_equals_parallel(lowering, case)
            if lowering.cached is not None:
                yield decode_equals_parallel(lowering, case, remembers=True)
    if device == "cpu" and any(lowering is one for one in table.LOWERINGS):
        yield dropout_row(lowering)
    yield from law_rows(lowering, work.laws, device)


def spec_rows(
    lowering: Lowering, found: Iterable[Case], check: str = "output", *, gradients: bool = True
) -> Iterator[Outcome]:
    """Output and gradients of each case that the lowering supports; a reason for the others."""
    name = "gradient" if check == "output" else f"{check}, gradient"
    unrecorded = _differentiable(lowering) is None
    if gradients and unrecorded:
        reason = "autograd records nothing; see the check of the recomputing backward"
        yield Outcome(name, "all cases", "skipped", reason)
    for case in found:
        yield _supported(lowering, case, check, output_agrees)
        exact = check == "output" or case.dtype is torch.float32  # products of 1e4 overflow
        if gradients and exact and not unrecorded:
            yield _supported(lowering, case, name, gradients_agree, grad=True)


def _supported(
    lowering: Lowering,
    case: Case,
    check: str,
    judge: Callable[[Forward, Case, str], Outcome],
    *,
    grad: bool = False,
) -> Outcome:
    """The outcome, or why the lowering does not take the case."""
    reason = refusal(lowering, case, grad=grad)
    if reason is not None:
        return Outcome(check, case.text, "skipped", reason)
    forward = _differentiable(lowering) if grad else whole(lowering.forward)
    assert forward is not None
    try:
        return judge(forward, case, check)
    except Exception as error:
        return Outcome(check, case.text, "failed", f"{type(error).__name__}: {error}")


def _differentiable(lowering: Lowering) -> Forward | None:
    """The forward with gradients: the op for a lowering of the table."""
    if any(lowering is one for one in table.LOWERINGS):
        return partial(_op, lowering.name)
    return whole(lowering.forward) if lowering.records else None


def _op(
    target: str,
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    return attention(q, k, v, tensors, sizes, spec, target)


# --- more than one call ---------------------------------------------------------------------------


def _deterministic(forward: Forward, case: Case, check: str) -> Outcome:
    x = operands(case)
    with torch.no_grad(), nan_memory():
        first, again = run(forward, case.spec, x), run(forward, case.spec, x)
    if same(first, again):
        return Outcome(check, case.text, "passed")
    worst = float((first - again).abs().max())
    return Outcome(check, case.text, "failed", f"two equal calls differ by {worst:.1e}")


def dynamic_shapes(lowering: Lowering, case: Case, *, few: bool = False) -> Outcome:
    """One spec at many sizes, large and small in turn, twice: nothing of a call is left over."""
    check, used = "dynamic shapes", list[float]()
    found = [c for c in sizes_of(case, few=few) if refusal(lowering, c, grad=False) is None]
    if len(found) < 2:
        return Outcome(check, case.text, "skipped", "it takes one of the sizes or none")
    for one in (*found, *found):
        row = output_agrees(whole(lowering.forward), one)
        if row.verdict == "failed":
            return Outcome(check, case.text, "failed", f"at {one.dims}: {row.reason}")
        if row.verdict == "passed":
            used.append(row.used or 0.0)
    if not used:
        return Outcome(check, case.text, "skipped", row.reason)
    return Outcome(check, case.text, "passed", used=max(used))


def decode_equals_parallel(lowering: Lowering, case: Case, *, remembers: bool = False) -> Outcome:
    """Queries one by one give the rows that the reference gives for all at once.

    Args:
        remembers: what the lowering keeps beside a KV cache is handed on from step to step.
    """
    check, spec, x = "decode = parallel", case.spec, operands(case)
    check += ", remembered" if remembers else ""
    with torch.no_grad():
        ref, gold = run(reference, spec, x), run(reference, spec, x.map(Tensor.double))
    used, ahead = list[float](), case.dims.kv_len - case.dims.q_len
    skipped, past = "it takes no step of decoding", None
    for i in range(case.dims.q_len):
        at = replace(case, dims=replace(case.dims, q_len=1, kv_len=ahead + i + 1))
        if refusal(lowering, at, grad=False) is not None:
            continue
        step = x.rows(spec, i, i + 1)
        forward: Any = whole(lowering.forward)
        try:
            with torch.no_grad(), nan_memory():
                if remembers:
                    memory = beside(step.k, past, (case.text,))
                    forward = partial(_remembering, whole(cast(Any, lowering.cached)), memory)
                    past = step.k
                new = run(forward, spec, step)
        except Exception as error:
            return Outcome(check, case.text, "failed", f"query {i}: {error}")
        base = baseline_of(ref[:, :, i : i + 1], gold[:, :, i : i + 1])
        row = judged(check, case.text, [Row(f"query {i}", "output", base, new, case.dtype)])
        if row.verdict == "failed":
            return row
        if row.verdict == "passed":
            used.append(row.used or 0.0)
        else:
            skipped = row.reason
    if not used:
        return Outcome(check, case.text, "skipped", skipped)
    return Outcome(check, case.text, "passed", used=max(used))


def _remembering(cached: Forward, memory: Beside | None, *given: Any) -> Tensor:
    return cast(Tensor, cast(Any, cached)(*given, memory))


def law_rows(
    lowering: Lowering, wanted: Sequence[str] | None, device: str = "cpu"
) -> Iterator[Outcome]:
    """The laws, on plain and causal attention of each family, and on softmax with a sink."""
    dims = Dims(batch=3, heads=6, kv_heads=3, q_len=9, kv_len=9)
    for base, not_for in _LAWS_OF.items():
        case = Case.of(base, dims, device=device)
        for name, law in laws.LAWS.items():
            if name not in not_for and (wanted is None or name in wanted):
                yield _supported(lowering, case, f"law: {name}", partial(_law, law))
    if wanted is None:
        causal = Case.of("causal", dims, device=device)
        spec = replace(causal.softmax, sink=Integer(0))
        sink = replace(causal, name="constant sink", spec=spec)
        yield _supported(lowering, sink, "law: sums below 1", partial(_law, laws.sink_sums))


_LAWS_OF = {
    "plain": laws.CAUSAL_LAWS,
    "causal": laws.UNORDERED_LAWS,
    "routed": laws.UNORDERED_LAWS,
    "linear": (*laws.CAUSAL_LAWS, "shift", "past"),
    "causal linear": (*laws.UNORDERED_LAWS, "shift"),
}
"""Bases without tensors, and the laws that do not hold for them."""


def _law(law: laws.Law, forward: Forward, case: Case, check: str) -> Outcome:
    return law(lambda q, k, v: forward(case.spec, q, k, v, (), case.sizes), case)


# --- the backward that recomputes -----------------------------------------------------------------


def check_backward(backward: Backward | None = None, *, full: bool = False) -> Outcomes:
    """The gradients of the backward that serves every lowering which records nothing.

    Args:
        backward: with the arguments of `rewriter.kernels.torch_backward.backward`; by default the
            one that `rewriter.lowering.backward_of` names for each spec.
        full: the whole grid of cases instead of the fast choice.
    """

    def forward(spec: Spec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any) -> Tensor:
        given = cast(Any, _Given).apply
        return cast(Tensor, given(backward or backward_of(spec), spec, sizes, q, k, v, *tensors))

    found = [*cases(full=full), *(c for c in extremes(full=full) if c.dtype is torch.float32)]
    return Outcomes("backward", tuple(gradients_agree(whole(forward), case) for case in found))


class _Given(torch.autograd.Function):
    """The reference forward, with a backward that is handed over."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, spec: Spec, sizes: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.given = backward, spec, sizes
        q, k, v, *tensors = inputs
        return reference(spec, q, k, v, tensors, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        backward, spec, sizes = ctx.given
        q, k, v, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[3:])
        found = backward(spec, grads[0], q, k, v, tensors, sizes, wanted)
        return (None, None, None, *found)
