"""Kernels that edit weights by groups of keys: which sums they carry, and what they refuse."""

from __future__ import annotations

import pytest
import sympy
from sympy import Symbol

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.triton_codegen import Dtype, KernelSpec, Tile, codegen
from rewriter.kernels.triton_sums import sums_of_edit
from rewriter.kernels.triton_tables import tabulate
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
from rewriter.symbols import Read, Trunc, Where, b, h, k, s

TILE = Tile(64, 32, 4, 2)
GROUP = Read(Symbol("label"), b, k)
A, SHARE = sympy.Float(0.4), Read(Symbol("share"), h)
M0, M1, M2, _ = sym.masses


@pytest.mark.parametrize(
    ("factors", "sums"),
    [
        pytest.param((1 / M0, 0), [((0,), 1 / M0)], id="a factor of 0 has no sum"),
        pytest.param((A, A, A), [((0, 1, 2), A)], id="equal numbers share one"),
        pytest.param((1, SHARE, 0, A), [((0, 1, 3), 1)], id="known factors share one"),
        pytest.param((1, A, A, M1), [((0, 1, 2), 1), ((3,), M1)], id="of masses, another one"),
        pytest.param((M1, A, M1), [((1,), A), ((0, 2), M1)], id="equal formulas share one"),
        pytest.param((M1, M0, M1 + M0), [((0,), M1), ((1,), M0), ((2,), M1 + M0)], id="each"),
        pytest.param((0, 0), [((), 1)], id="nothing is left"),
    ],
)
def test_groups_share_a_sum_where_they_can(
    factors: tuple[sympy.Expr, ...], sums: list[tuple[tuple[int, ...], sympy.Expr]]
) -> None:
    edit = Edit(GROUP, tuple(sympy.sympify(a) for a in factors))
    found = [(s.groups, s.factor) for s in sums_of_edit(edit, "bfloat16")]
    assert found == sums
    assert codegen(grouped(edit)).text.count("tl.dot(") == 1 + len([g for g, _ in sums if g])


def grouped(edit: Edit, dtype: Dtype = "bfloat16") -> KernelSpec:
    tensors = (TensorArg("label", "int64", 2), TensorArg("share", "float32", 1))
    return KernelSpec(SoftmaxSpec(edit=edit, tensors=tensors), 64, 64, dtype, TILE)


def test_float16_weights_are_multiplied_by_no_factor_that_may_overflow_them() -> None:
    edit = Edit(GROUP, (A, sympy.Float(3), SHARE, sympy.Integer(1)))
    assert [s.groups for s in sums_of_edit(edit, "float16")] == [(0, 3), (1,), (2,)]
    assert [s.groups for s in sums_of_edit(edit, "bfloat16")] == [(0, 1, 2, 3)]
    assert "RAISE" in codegen(grouped(edit, "float16")).text
    assert "RAISE" not in codegen(grouped(edit)).text


def test_only_masses_that_a_factor_reads_are_added_up() -> None:
    text = codegen(grouped(Edit(GROUP, (sympy.Integer(1), sympy.Integer(0), 1 + M1 / M2)))).text
    assert [f"b_l{g} = " in text for g in range(4)] == [False, True, True, False]


@pytest.mark.parametrize("factor", [1 + k, s * M0], ids=str)
def test_a_factor_that_depends_on_the_key_is_refused(factor: sympy.Expr) -> None:
    with pytest.raises(LoweringError, match="the factor of a group depends on the key: "):
        codegen(grouped(Edit(GROUP, (factor,))))


def test_a_size_that_is_called_like_a_mass_is_refused() -> None:
    size = sym.size_symbol("m1")
    spec = SoftmaxSpec(mask=k < size, edit=Edit(sympy.Integer(0), (1 / M0,)), sizes=("m1",))
    with pytest.raises(LoweringError, match="a size is called m1, as the mass of a group is"):
        codegen(KernelSpec(spec, 64, 64, "bfloat16", TILE))


def test_a_tensor_may_be_called_like_what_the_edit_uses_itself() -> None:
    names = ("group", "m0", "l0", "p0", "o0", "f1", "a1")
    reads = sum(Read(Symbol(n), h) for n in names)
    edit = Edit(Where(k < 2, 1, 0), (reads * M0, reads + M1))
    spec = SoftmaxSpec(edit=edit, tensors=tuple(TensorArg(n, "float32", 1) for n in names))
    lines = codegen(KernelSpec(spec, 64, 64, "bfloat16", TILE)).text.splitlines()
    loaded = {line.split(" = ")[0].strip() for line in lines if " = tl.load(t_" in line}
    loaded |= {line.split(" = ")[0].strip() for line in lines if "= tl.load(p_" in line}
    computed = [line.split(" = ")[0].strip() for line in lines if " = tl.load(" not in line]
    assert len(loaded) == len(names) + len("qkv")
    assert not loaded & set(computed)


def test_a_rounded_group_is_read_from_a_table() -> None:
    spec, tables = tabulate(SoftmaxSpec(edit=Edit(Trunc(0.1 * k), (sympy.Integer(1), 1 / M0))))
    assert [t.axis for t in tables] == ["k"]
    assert spec.edit is not None
    assert spec.edit.group == Read(Symbol("rounded0"), k)
