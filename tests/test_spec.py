"""The new stages and linear attention as values: JSON, text, what they refuse, both families."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
from sympy import Float, Integer, Symbol

from rewriter.errors import SpecError
from rewriter.families import from_dict, from_json
from rewriter.linear import Features, LinearSpec, Near
from rewriter.spec import SoftmaxSpec, Spec, TensorArg
from rewriter.stages import Edit, Local, Patch, Route, Source
from rewriter.symbols import L, M, Read, b, h, k, masses, q, s
from rewriter.testing.cases import BASES

POSITION = q + M - L


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_a_spec_reads_back_from_json_as_an_equal_one_of_its_family(name: str) -> None:
    spec = BASES[name]
    again = from_json(spec.to_json())
    assert again == spec
    assert type(again) is type(spec)
    assert hash(again) == hash(spec)
    assert (again.digest(), str(again)) == (spec.digest(), str(spec))
    assert from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_that_differ_in_one_stage_have_other_digests() -> None:
    assert len({spec.digest() for spec in BASES.values()}) == len(BASES)


def test_a_spec_without_the_new_stages_is_written_as_before() -> None:
    written = SoftmaxSpec().to_dict()
    assert not {"route", "edit", "local", "active", "patch"} & set(written)


def test_how_a_tensor_is_computed_is_no_part_of_the_spec() -> None:
    args = (TensorArg("gate", "float32", 3),)
    spec = SoftmaxSpec(heads=Read(Symbol("gate"), b, h, q), tensors=args)
    with_source = replace(spec, tensors=(replace(args[0], source=Source(lambda: None)),))  # type: ignore[arg-type,return-value]
    assert with_source == spec
    assert with_source.to_json() == spec.to_json()
    assert from_json(with_source.to_json()).tensors[0].source is None


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("routed", "softmax( s | k ≤ M + q - L ; top 3 blocks of 8 ) · v"),
        ("regions", "softmax( s ; top 2 regions of 3 × 3 and the first 1 keys ) · v"),
        (
            "edit, cap, sink",
            "softmax( 5·tanh(s/5) | k ≤ M + q - L ∧ pad[b, k] ; sink sink[h] ) "
            "times (1, 0, share[h])[group[b, k]] · v",
        ),
        ("gated heads", "gates[b, h, q] · softmax( s | k ≤ M + q - L ) · v"),
        ("patched", "softmax( s | k ≤ M + q - L ) · v, patch where h = 1 ∧ rows[b, q]"),
        ("local", "softmax( s ) · v + kernel ∗ v"),
        ("linear", "linear( elu(q) · elu(k) ) · v / sum"),
        (
            "lightning",
            "linear( exp((M + q - L - k)·decay[h])·silu(q) · silu(k) | k ≤ M + q - L ) · v / rms",
        ),
        (
            "window tail",
            "linear( exp(q q_matrix + q_offset) · exp(k k_matrix + k_offset) | k ≤ M + q - L ∧ "
            "pad[b, k] ; exp(mix[h])·exp(s) of the last 8 ) · v / sum",
        ),
    ],
)
def test_a_spec_prints_as_its_formula(name: str, text: str) -> None:
    assert str(BASES[name]) == text


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Route("query", topk=0, block=4), "topk is 0; at least one block is chosen"),
        (lambda: Route("query", topk=1), "block is 0; a block has at least one key"),
        (
            lambda: Route("region", topk=1, grid=(4, 0), regions=2),
            "grid (4, 0) cannot be cut into 2 regions a side",
        ),
        (lambda: Edit(Integer(0), ()), "0 groups; there are 1 to 4"),
        (lambda: Edit(Integer(0), (Integer(1),) * 5), "5 groups; there are 1 to 4"),
        (
            lambda: Edit(sympy.Mod(q, 2), (Integer(1),)),
            "the group of a key may not depend on the query: Mod(q, 2)",
        ),
        (
            lambda: SoftmaxSpec(patch=Patch("rows")),
            "the formulas read rows, which `tensors` does not list",
        ),
        (
            lambda: SoftmaxSpec(local=Local("w", "c", (2, 2))),
            "the formulas read c, w, which `tensors` does not list",
        ),
        (
            lambda: LinearSpec(q_map=Features("silu", "w")),
            "the formulas read w, which `tensors` does not list",
        ),
        (
            lambda: Features("cosine"),  # type: ignore[arg-type]
            "there is no feature map 'cosine'; one of identity, silu, relu, elu, exp",
        ),
        (lambda: Features(bias="c"), "a feature map has a bias only beside a weight"),
        (
            lambda: LinearSpec(norm="mean"),  # type: ignore[arg-type]
            "norm is 'mean'; it is one of none, sum, rms",
        ),
        (lambda: LinearSpec(decay=Float(-0.1)), "a decay or a window needs positions"),
        (lambda: LinearSpec(near=Near(4), norm="sum"), "a decay or a window needs positions"),
        (
            lambda: LinearSpec(position=POSITION, near=Near(4)),
            "softmax weights and linear ones are added over one sum: norm='sum'",
        ),
        (
            lambda: LinearSpec(position=POSITION, decay=-k),
            "the decay may differ between heads only, got -k",
        ),
    ],
)
def test_what_means_nothing_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"family": "fourier"}, "there is no family 'fourier'; one of softmax, linear"),
        ({"family": None}, "there is no family None; one of softmax, linear"),
        ({"version": 9}, "a linear spec of version 1 was expected, got linear 9"),
        ({"q_map": ["cosine", "", ""]}, "there is no feature map 'cosine'"),
        ({"position": ["no such function"]}, "not a formula: ['no such function']"),
        ({"tensors": [["decay"]]}, "not a linear spec: "),
    ],
)
def test_json_of_no_family_is_refused(change: dict[str, Any], text: str) -> None:
    data = {**BASES["lightning"].to_dict(), **change}
    with pytest.raises(SpecError) as caught:
        from_dict(data)
    assert str(caught.value).startswith(text)


def test_a_family_does_not_read_another_one() -> None:
    with pytest.raises(SpecError, match="a softmax spec of version 1 was expected, got linear 1"):
        SoftmaxSpec.from_dict(LinearSpec().to_dict())
    with pytest.raises(SpecError, match="a linear spec of version 1 was expected, got softmax 1"):
        LinearSpec.from_dict(SoftmaxSpec().to_dict())


# --- what all families share ----------------------------------------------------------------------


def test_tensors_that_are_used_whole_count_as_used() -> None:
    spare = TensorArg("spare", "float32", 1)
    for name in ("patched", "local", "features", "window tail"):
        spec: Any = BASES[name]
        more: Spec = replace(spec, tensors=(*spec.tensors, spare))
        assert more.without_unused() == spec


def test_masses_read_back_as_the_symbols_of_the_groups() -> None:
    spec = SoftmaxSpec(edit=Edit(Integer(0), (1 - masses[0],)))
    again = from_json(spec.to_json())
    assert isinstance(again, SoftmaxSpec)
    edit = again.edit
    assert edit is not None
    assert edit.factors[0].free_symbols == {masses[0]}


def test_the_bias_of_a_score_is_what_does_not_hold_it() -> None:
    assert SoftmaxSpec(score=s - k).bias == -k
    assert SoftmaxSpec(score=2 * s).bias is None
