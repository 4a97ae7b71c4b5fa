"""Verdicts of tensors: what zeros would pass as well has not passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter import symbols
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Source
from rewriter.testing import grid
from rewriter.testing.agreement import Row, gradients_agree, judged, output_agrees
from rewriter.testing.cases import Case, Dims
from rewriter.testing.families import read
from rewriter.verify.compare import baseline_of
from rewriter.verify.rows import Errors

GOLD = torch.linspace(-1.0, 1.0, 11)


def row(name: str, gold: Tensor, new: Tensor, size: float = 0.0) -> Row:
    """A tensor whose terms are of that size, as a sum that cancels has them."""
    base = baseline_of(gold, gold.double())
    size = max(size, base.size.max)
    return Row(name, "gradient", replace(base, size=Errors(size, size)), new, torch.float32)


def test_a_tensor_that_could_be_zero_is_no_evidence() -> None:
    loose = row("dq", GOLD, torch.zeros(11), size=1e6)
    found = judged("gradient", "a case", [loose])
    assert (found.verdict, found.used) == ("skipped", None)
    assert found.reason == "bounds nothing: zeros are allowed for dq"


def test_the_other_tensors_keep_their_verdict() -> None:
    loose, close = row("dq", GOLD, GOLD * 0, size=1e6), row("dv", GOLD, GOLD.clone())
    found = judged("gradient", "a case", [loose, close])
    assert (found.verdict, found.reason, found.used) == ("passed", "", 0.0)
    wrong = row("dv", GOLD, GOLD * 1.01)
    assert judged("gradient", "a case", [loose, wrong]).verdict == "failed"


def test_what_bounds_nothing_can_still_fail() -> None:
    found = judged("gradient", "a case", [row("dq", GOLD, GOLD * torch.nan, size=1e6)])
    assert found.verdict == "failed"


def test_zeros_are_bounded_by_zeros() -> None:
    zeros = torch.zeros(11)
    assert judged("gradient", "a case", [row("dq", zeros, zeros.clone(), 1.0)]).verdict == "passed"
    empty = torch.zeros(0)
    assert judged("gradient", "a case", [row("dq", empty, empty.clone())]).verdict == "passed"


@pytest.mark.parametrize("which", range(3))
def test_each_gradient_of_large_scores_is_bounded_somewhere(which: int) -> None:
    def faulty(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        given = [x.detach() if i == which else x for i, x in enumerate((q, k, v))]
        return reference(spec, *given, *rest)

    cases = [Case.of("causal", grid.extremes()[0].dims, logits=x) for x in (1e4, 30.0)]
    assert {case.text for case in cases} <= {case.text for case in grid.extremes()}
    verdicts = [gradients_agree(faulty, case).verdict for case in cases]
    assert verdicts == ["failed" if which == 2 else "passed", "failed"]


@pytest.mark.parametrize("options", [(), (("shift", [0.0]),)], ids=["", "with a list"])
def test_equal_specs_with_other_programs_are_not_taken_for_each_other(options: Any) -> None:
    """As when a pass is edited and checked again in one process."""

    def case(gate: Callable[..., Tensor]) -> Case:
        source = Source(gate, ("q",), options=options)
        heads = read("mine", symbols.b, symbols.h, symbols.q)
        spec = SoftmaxSpec(heads=heads, tensors=(TensorArg("mine", "float32", 3, source),))
        return Case("mine", spec, Dims(q_len=5, kv_len=5))

    for gate in (lambda x, **_: x.mean(-1), lambda x, **_: x.amax(-1)):
        for judge in (output_agrees, gradients_agree):
            assert judge(reference, case(gate)).verdict == "passed"
