"""Which stage is wrong, for stages beyond plain softmax attention and for linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from sympy import Integer
from torch import Tensor

from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Edit, Route
from rewriter.testing.cases import BASES, Case, Dims
from rewriter.testing.operands import operands
from rewriter.verify.growing import grown, plainest
from rewriter.verify.script import Drawn, is_free, op_script
from rewriter.verify.stages import Operands, changed_stage, lowered, run, stage_of


def given(name: str) -> tuple[Spec, Operands]:
    case = Case.of(name, Dims())
    x = operands(case)
    tensors = dict(zip((t.name for t in case.spec.tensors), x.tensors, strict=True))
    return case.spec, Operands(x.q, x.k, x.v, tensors, {})


def without(**fields: Any) -> Callable[[Spec, Operands], Tensor]:
    """The reference, which forgets something."""

    def function(spec: Spec, x: Operands) -> Tensor:
        less = {n: value for n, value in fields.items() if hasattr(spec, n)}
        return run(cast(Spec, replace(cast(Any, spec), **less)), x)

    return function


@pytest.mark.parametrize(
    ("name", "wrong", "stage"),
    [
        ("routed padding", {"route": None}, "route"),
        ("regions", {"route": None}, "route"),
        ("edit, cap, sink", {"edit": None}, "edit"),
        ("gated heads", {"heads": Integer(1)}, "heads"),
        ("local", {"local": None}, "local"),
        ("patched", {"patch": None}, "patch"),
        ("lightning", {"decay": Integer(0)}, "family"),
        ("linear padding", {"heads": Integer(1)}, "heads"),
    ],
)
def test_the_stage_that_an_implementation_forgets_is_named(
    name: str, wrong: dict[str, Any], stage: str
) -> None:
    spec, x = given(name)
    found = stage_of(without(**wrong), spec, x)
    assert found is not None
    assert found[0] == stage
    assert stage_of(run, spec, x) is None


@pytest.mark.parametrize("name", ["routed", "edit", "gated heads", "patched", "window tail"])
def test_the_op_is_at_no_fault(name: str) -> None:
    spec, x = given(name)
    assert stage_of(lowered("auto"), spec, x) is None
    assert stage_of(lowered("auto"), spec, x, gradients=True) is None


@pytest.mark.parametrize(
    ("changed", "stage"),
    [
        ({"route": Route("query", topk=1, block=8)}, "route"),
        ({"edit": Edit(Integer(0), (Integer(2),))}, "edit"),
        ({"heads": Integer(2), "active": 4}, "heads"),
    ],
)
def test_the_stage_that_a_pass_changes_is_named(changed: dict[str, Any], stage: str) -> None:
    before, x = given("causal")
    after = cast(Spec, replace(cast(Any, before), **changed))
    found = changed_stage(before, after, x)
    assert found is not None
    assert found[0] == stage


def test_another_family_is_a_change_of_the_family() -> None:
    before, x = given("plain")
    for gradients in (False, True):
        found = changed_stage(before, BASES["linear"], x, gradients=gradients)
        assert found is not None
        assert found[0] == "family"


@pytest.mark.parametrize("name", BASES)
def test_growing_ends_at_the_spec(name: str) -> None:
    spec = BASES[name]
    plain = plainest(spec, 16)
    assert [s for _, s in grown(plain, spec)][-1:] == ([] if plain == spec else [spec])
    assert plain.heads == 1
    assert plain.patch is None


def test_a_promise_that_random_tensors_break_takes_those_of_the_model() -> None:
    assert not is_free(BASES["gated heads"])  # more heads would be on than `active` says
    assert not is_free(BASES["lightning"])  # decays would be positive
    assert is_free(BASES["edit"])
    assert is_free(SoftmaxSpec())
    assert is_free(LinearSpec())


@pytest.mark.parametrize("name", ["routed", "edit", "patched", "local", "features"])
def test_the_program_of_a_finding_runs_for_every_family(name: str) -> None:
    spec, x = given(name)
    drawn = Drawn.like(spec, x)
    assert {n: y.shape for n, y in drawn.operands().tensors.items()} == {
        n: y.shape for n, y in x.tensors.items()
    }
    text = op_script("title", spec, "auto", drawn, gradients=False)
    with pytest.raises(SystemExit) as ended:
        exec(compile(text, "script", "exec"), {"__name__": "script"})
    assert ended.value.code == 0
