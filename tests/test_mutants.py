"""The catalogue of wrong rewrites is large, and the harness catches those of it that cost nothing.

`make mutants` runs all of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mutants import executors, forms, gradients, lowerings, specs
from mutants.catalogue import KINDS, Mutant, catalogue
from mutants.seams import CONTROLS, caught_by, first, raised
from mutants.toy import Toy, supports
from rewriter.reference import reference
from rewriter.testing.agreement import nan_memory
from rewriter.testing.cases import BASES, Case, Dims
from rewriter.testing.core import core_of, refusal, whole
from rewriter.testing.families import FAMILIES, grid_of
from rewriter.testing.operands import operands
from rewriter.testing.outcome import Outcome

ALL = catalogue()
CHEAP = [m for m in ALL if m.kind in ("spec", "form")]
SOME = [
    *CHEAP,
    *[m for m in ALL if m.kind in ("lowering", "gradient", "pass")][6::12],
    *[m for m in ALL if m.kind == "generation"][::5],
]


def test_the_catalogue_has_every_kind_and_no_name_twice() -> None:
    assert len(ALL) >= 350
    assert {m.kind for m in ALL} == set(KINDS)
    assert len({m.name for m in ALL}) == len(ALL)


@pytest.mark.parametrize("mutant", SOME, ids=lambda m: f"{m.kind}: {m.name}")
def test_the_harness_catches(mutant: Mutant) -> None:
    found, earliest = caught_by(mutant)
    assert found is not None, f"missed by {mutant.expected!r}, caught by {earliest}"


@pytest.mark.parametrize(
    "name", [n for n, (kind, _) in CONTROLS.items() if kind in ("spec", "form", "generation")]
)
def test_an_honest_subject_raises_no_alarm(name: str) -> None:
    rows = list(CONTROLS[name][1]())
    assert any(row.verdict == "passed" for row in rows)
    assert first(rows) is None


@pytest.mark.parametrize(
    ("reason", "crash"),
    [
        ("IndexError: index 9 is out of bounds", True),
        ("it raises CheckpointError: no plan", True),
        ("the original runs, the model raises KeyError; call the model", True),
        ("the output: max error 1.0e+00 where 1.0e-05 is allowed", False),
        ("keys after 3 changed: outputs differ by 1.0e+00", False),
    ],
)
def test_what_raised_has_caught_nothing(reason: str, crash: bool) -> None:
    assert raised(Outcome("output", "a case", "failed", reason)) == crash


# --- each mutant is a mutant ----------------------------------------------------------------------


def _is_whole(case: Case) -> bool:
    """A lowering computes all of it."""
    return core_of(case.spec, case.dims.q_len, case.dims.kv_len) == case.spec


def cases() -> list[Case]:
    found = [Case.of(n, Dims(q_len=q_len, kv_len=33)) for n in BASES for q_len in (33, 20)]
    found = [c for c in found if _is_whole(c) and supports(c.spec, c.shapes(grad=False)) is None]
    found += [
        Case.of(n, Dims(q_len=9, kv_len=9), masked=masked, hidden="all")
        for n in ("padding", "causal padding")
        for masked in ("zero", "mean", "nan")
    ]
    return found


def differs(x: torch.Tensor, y: torch.Tensor) -> bool:
    return not torch.allclose(x.nan_to_num(99.0), y.nan_to_num(99.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mutant", [m for m in specs.MUTANTS if m.made is not specs.add_to_mean], ids=lambda m: m.name
)
def test_a_wrong_spec_is_another_function(mutant: Mutant) -> None:
    for case in cases():
        spec, x = mutant.made(case.spec), operands(case)
        kept = {t.name for t in spec.tensors}
        tensors = [y for t, y in zip(case.spec.tensors, x.tensors, strict=True) if t.name in kept]
        sizes = [n for n, name in zip(x.sizes, case.spec.sizes, strict=True) if name in spec.sizes]
        try:
            new = reference(spec, x.q, x.k, x.v, tensors, sizes)
        except IndexError:
            continue  # such as the padding of a query behind the last key
        if differs(new, reference(case.spec, x.q, x.k, x.v, x.tensors, x.sizes)):
            return
    pytest.fail("it changes the function of no case")


def test_what_is_lost_with_an_added_mask_is_a_gradient() -> None:
    case = Case.of("padding", Dims(q_len=5, kv_len=5), masked="add", hidden="all")
    x, found = operands(case), []
    for spec in (case.spec, specs.add_to_mean(case.spec)):
        q = x.q.detach().requires_grad_()
        out = reference(spec, q, x.k, x.v, x.tensors, x.sizes)
        found.append(torch.autograd.grad(out.pow(2).sum(), q)[0])
    assert differs(*found)


@pytest.mark.parametrize("mutant", forms.MUTANTS, ids=lambda m: m.name)
def test_a_wrong_form_is_another_function(mutant: Mutant) -> None:
    family = mutant.made.family
    x = [torch.randn(2, 4, 37, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    if "heads" in family.laws:
        x[1:] = [y[:, :2] for y in x[1:]]
    assert differs(mutant.made.form(*x), family.plain(*x))


def test_the_honest_seams_compute_the_reference() -> None:
    for case in cases():
        x = operands(case)
        want = reference(case.spec, x.q, x.k, x.v, x.tensors, x.sizes)
        for forward in (Toy(), gradients.Written()):
            assert not differs(forward(case.spec, x.q, x.k, x.v, x.tensors, x.sizes), want)


@pytest.mark.parametrize(
    "mutant", [m for m in lowerings.MUTANTS if m.kind == "lowering"], ids=lambda m: m.name
)
def test_a_wrong_lowering_is_another_function(mutant: Mutant) -> None:
    found = [*cases(), *(replace(c, dtype=torch.bfloat16) for c in cases()[:4])]
    plain = Dims(q_len=65, kv_len=65, heads=4, kv_heads=4)
    found += [Case.of("causal", plain), Case.of("causal", plain, logits=1e4)]
    found += [Case.of("causal", replace(plain, q_len=1))]
    found += [Case.of("plain", replace(plain, head_dim=d, value_dim=16)) for d in (60, 128)]
    found += [Case.of("plain", replace(plain, kv_len=200)), Case.of("causal", plain, layout="BLHD")]
    found += [Case.of("padding", Dims(q_len=9, kv_len=9), seed=n) for n in (0, 1)]
    for case in found:
        x = operands(case)
        before = x.q.clone()
        want = reference(case.spec, x.q, x.k, x.v, x.tensors, x.sizes)
        new = mutant.made.forward(case.spec, x.q, x.k, x.v, x.tensors, x.sizes)
        if new.dtype != want.dtype or differs(new, want) or differs(x.q, before):
            return
    pytest.fail("it changes the result of no case")


@pytest.mark.parametrize(
    "mutant",
    [
        m
        for m in executors.MUTANTS
        if m.kind == "lowering"
        and isinstance(m.made, gradients.Patched)
        and m.name != "routed: sums of a block that still grows kept"  # it needs a cache
    ],
    ids=lambda m: m.name,
)
def test_a_wrong_executor_is_another_function(mutant: Mutant) -> None:
    long = Dims(batch=1, heads=8, kv_heads=4, q_len=520, kv_len=520)
    found = [Case.of(name, Dims(q_len=n, kv_len=n)) for name in FAMILIES for n in (65, 300)]
    found = [c for c in found if grid_of(c.spec) in (0, c.dims.q_len)]
    for case in (*found, Case.of("gated padding", long)):
        lowering, x = mutant.made.lowering, operands(case)
        if refusal(lowering, case, grad=False) is None:
            forward = whole(lowering.forward)
            given = case.spec, x.q, x.k, x.v, x.tensors, x.sizes
            with mutant.made.active(), nan_memory():
                new = forward(*given)
            if differs(new, forward(*given)):
                return
    pytest.fail("it changes the result of no case")
