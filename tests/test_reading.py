"""A tensor of a graph is read as a function of its indices, which is right at every index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from sympy import Expr, Integer, Symbol
from torch import Tensor, fx, nn

from rewriter import symbols as sym
from rewriter.capture import Captured, export, from_exported
from rewriter.evaluate import evaluate
from rewriter.formulas import respelled
from rewriter.indices import Bounds, compare, remap_view
from rewriter.reading import Reader, shape_of, value_of
from rewriter.rules import RULES
from rewriter.symbols import Formula, IDiv, IMod, formula_text

AXES = (sym.b, sym.h, sym.q, sym.k)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def read(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False) -> Formula:
    """The formula of the function's output, compared with the output at every index."""
    shapes = (
        (tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in inputs),)
        if dynamic
        else None
    )
    program = export(Function(function), inputs, dynamic_shapes=shapes)
    captured = from_exported(program)
    output = next(n for n in captured.graph.nodes if n.op == "output").args[0][0]
    rank = value_of(output).dim()
    index = AXES[4 - rank :]
    bounds = Bounds(dict(zip(index, shape_of(output), strict=True)))
    reader = Reader(bounds, captured.constant, RULES)
    formula = reader.at(output, index)

    recorder = Recorder(captured)
    held = program.graph_signature.inputs_to_lifted_tensor_constants
    given = iter(inputs)
    placeholders = [n.name for n in captured.graph.nodes if n.op == "placeholder"]
    (result,) = recorder.run(
        *(program.constants[held[n]] if n in held else next(given) for n in placeholders)
    )
    values: dict[str, Any] = {}
    for node, value in recorder.values.items():
        for symbolic, size in zip(_sizes(value_of(node)), _sizes(value), strict=True):
            if isinstance(symbolic, torch.SymInt) and isinstance(symbolic.node.expr, Symbol):
                values[str(symbolic.node.expr)] = int(size)
    for axis, (symbol, size) in enumerate(zip(index, result.shape, strict=True)):
        values[str(symbol)] = torch.arange(size).view(-1, *[1] * (rank - 1 - axis))
    tensors = {str(name): recorder.values[node] for name, node in reader.leaves.items()}
    mine = torch.as_tensor(evaluate(formula, values, tensors, torch.float32)).expand(result.shape)
    torch.testing.assert_close(mine.to(result.dtype), result, rtol=1e-6, atol=1e-6)
    short = {"args_0": "x", "args_1": "y"}
    origins = {symbol: captured.origin(node)[0] for symbol, node in reader.leaves.items()}
    names = {symbol: Symbol(short.get(name, name)) for symbol, name in origins.items()}
    return formula.xreplace(names)


def _sizes(value: Any) -> Sequence[Any]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (value,) if isinstance(value, int | torch.SymInt) else ()


def grid(length: int = 6) -> tuple[Tensor, Tensor]:
    return torch.arange(length)[:, None], torch.arange(length)[None]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def truths(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5


# --- layout ---------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "transpose": (lambda x: x.transpose(0, 1), "x[k, q]"),
    "mT": (lambda x: x.mT, "x[k, q]"),
    "T": (lambda x: x.T, "x[k, q]"),
    "movedim": (lambda x: x[None].movedim(0, 2)[:, :, 0], "x[q, k]"),
    "movedim_several": (lambda x: x[None].movedim((1, 2), (2, 0))[:, 0], "x[k, q]"),
    "swapdims": (lambda x: x.swapdims(0, 1), "x[k, q]"),
    "permute": (lambda x: x[None].permute(2, 0, 1)[:, 0], "x[k, q]"),
    "negative_start": (lambda x: x[-3:], "x[q + 3, k]"),
    "step": (lambda x: x[1::2], "x[2·q + 1, k]"),
    "select": (lambda x: x[-1][None], "x[5, k]"),
    "flatten_and_back": (lambda x: x.flatten().view(6, 4), "x[q, k]"),
    "halves": (lambda x: x.view(3, 2, 4)[:, 1], "x[2·q + 1, k]"),
    "unbind": (lambda x: x.unbind(1)[2][None], "x[k, 2]"),
    "chunk": (lambda x: x.chunk(2)[1], "x[q + 3, k]"),
    "split": (lambda x: x.split([1, 5])[1], "x[q + 1, k]"),
    "expand": (lambda x: x[:1].expand(5, 4), "x[0, k]"),
    "repeat": (lambda x: x.repeat(2, 1), "x[(q mod 6), k]"),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), "x[⌊q/2⌋, k]"),
    "roll": (lambda x: x.roll(2, 0), "x[((q - 2) mod 6), k]"),
    "flip": (lambda x: x.flip(0), "x[-q + 5, k]"),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 0)), "(x[max(q - 1, 0), k] if q - 1 ≥ 0 else 0)"),
    "cat": (lambda x: torch.cat([x.new_zeros(2, 4), x]), "(0 if q < 2 else x[max(q - 2, 0), k])"),
    "stack": (lambda x: torch.stack([x[0], x[3]]), "(x[0, k] if q < 1 else x[3, k])"),
    "gather": (lambda x: x.gather(1, (torch.arange(6)[:, None] * 2 % 4)), "x[q, 2·(q mod 2)]"),
    "index": (lambda x: x[torch.arange(6)[:, None], torch.arange(4)[None]], "x[q, k]"),
    "index_backwards": (lambda x: x[5 - torch.arange(6)], "x[-q + 5, k]"),
    "index_select": (lambda x: x.index_select(0, torch.arange(3) * 2), "x[2·q, k]"),
    "embedding": (lambda x: F.embedding(torch.arange(3) + 1, x), "x[q + 1, k]"),
    "triangle": (lambda x: x.tril(1), "(x[q, k] if k ≤ q + 1 else 0)"),
}


PARTS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "block": (lambda m: m[1:3, 2:4].fill_(1), "(1 if k < 4 ∧ q < 3 ∧ k ≥ 2 ∧ q ≥ 1 else 0)"),
    "blocks": (
        lambda m: (m[:3, :3].fill_(1), m[3:, 3:].fill_(1)),
        "(1 if (k < 3 ∧ q < 3) ∨ (k ≥ 3 ∧ q ≥ 3) else 0)",
    ),
    "row": (lambda m: m[-1].fill_(2), "(2 if q = 5 else 0)"),
    "row_of_a_part": (lambda m: m[2:][1].fill_(2), "(2 if q ≥ 2 ∧ q - 2 = 1 else 0)"),
    "overwritten": (
        lambda m: (m[:4].fill_(1), m[2:].fill_(3)),
        "(3 if q ≥ 2 else (1 if q < 4 else 0))",
    ),
    "copied": (
        lambda m: m[:, 1:].copy_(torch.arange(5)),
        "(k - 1 if k ≥ 1 else 0)",
    ),
    "filled_where": (
        lambda m: m[2:].masked_fill_(torch.arange(6) < 3, 1),
        "((1 if k < 3 else 0) if q ≥ 2 else 0)",
    ),
    "whole": (lambda m: m[:].fill_(1), "1"),
}
"""What writes to a part of six by six zeros."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_written(name: str, dtype: torch.dtype) -> None:
    write, expected = PARTS[name]

    def written(x: Tensor) -> Tensor:
        whole = torch.zeros(6, 6, dtype=dtype)
        write(whole)
        return whole

    text = formula_text(read(written, numbers(6, 6)))
    if dtype != torch.bool:
        assert text == expected


def test_parts_of_any_length_that_are_written() -> None:
    def written(x: Tensor) -> Tensor:
        whole = torch.zeros(x.shape[0], x.shape[0])
        whole[2:, :3] = 1
        return whole

    text = formula_text(read(written, numbers(7, 4), dynamic=True))
    assert text == "(1 if k < 3 ∧ q ≥ 2 else 0)"


STALE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another_name_is_used_later": lambda whole, x: _stale(whole, whole[1:], x),
    "the_result_is_used": lambda whole, x: whole[1:].fill_(1)[:3] + whole[:3],
    "the_part_is_used_later": lambda whole, x: _part_used(whole),
    "numbers_of_the_model": lambda whole, x: _numbers_written(whole, x),
}


def _stale(whole: Tensor, name: Tensor, x: Tensor) -> Tensor:
    whole[:, 2:] = 1
    return name + whole[1:]


def _part_used(whole: Tensor) -> Tensor:
    part = whole[2:, 2:]
    part.fill_(3)
    return part + whole[:4, :4]


def _numbers_written(whole: Tensor, x: Tensor) -> Tensor:
    whole[1:, 1:] = x[1:, 1:]
    return whole


@pytest.mark.parametrize("name", STALE)
def test_a_write_that_other_names_show_stays_in_place(name: str) -> None:
    function, x = Function(lambda x: STALE[name](torch.zeros(6, 6), x)), numbers(6, 6)
    captured = from_exported(export(function, (x,)))
    assert captured.written
    one = [torch.tensor(n) for n in (1, 3)]
    held = iter(one[1:] if name == "the_part_is_used_later" else one)
    places = [n for n in captured.graph.nodes if n.op == "placeholder"]
    (result,) = captured.module(*(x if n.name.startswith("args") else next(held) for n in places))
    torch.testing.assert_close(result, function(x))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_operation_that_moves_elements_moves_indices(name: str) -> None:
    function, text = LAYOUTS[name]
    assert formula_text(read(function, numbers(6, 4))) == text


def test_batch_and_heads_are_told_apart_again_after_a_flattening() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        batch, heads, rows, columns = x.shape
        flat = x.reshape(batch * heads, rows, columns).transpose(1, 2)
        return flat.reshape(batch, heads, columns, rows)

    formula = read(there_and_back, numbers(2, 3, 4, 5), dynamic=True)
    assert formula_text(formula) == "x[b, h, k, q]"


def test_windows_are_told_apart_again_after_a_flattening() -> None:
    formula = read(
        lambda x: x.view(x.shape[0] * 3, 4, 5).view(-1, 3, 4, 5), numbers(2, 3, 4, 5), dynamic=True
    )
    assert formula_text(formula) == "x[b, h, q, k]"


def test_a_view_takes_mixed_radix_apart() -> None:
    d = Symbol("d", integer=True, nonnegative=True)
    batch = Symbol("n", integer=True, positive=True)
    bounds = Bounds({sym.b: 2 * batch, d: Integer(4)})
    where = remap_view((sym.b, d), (2 * batch, Integer(4)), (batch, Integer(8)), bounds)
    assert where == [IDiv(sym.b, 2), 4 * IMod(sym.b, 2) + d]


@pytest.mark.parametrize("step", [2, 3, 4, 6, 12])
def test_splitting_an_index_is_exact(step: int) -> None:
    bounds = Bounds({sym.b: Integer(5), sym.q: Integer(4), sym.k: Integer(3)})
    index = 12 * sym.b + 3 * sym.q + sym.k
    upper, lower = bounds.split(index, Integer(step))
    for b, q, k in ((b, q, k) for b in range(5) for q in range(4) for k in range(3)):
        at = {sym.b: b, sym.q: q, sym.k: k}
        assert divmod(int(index.subs(at)), step) == (int(upper.subs(at)), int(lower.subs(at)))


# --- masks as logic -------------------------------------------------------------------------------

MASKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "le": (lambda i, j: j <= i, "k ≤ q"),
    "lt": (lambda i, j: j < i + 1, "k ≤ q"),
    "ge": (lambda i, j: i >= j, "k ≤ q"),
    "gt": (lambda i, j: i + 1 > j, "k ≤ q"),
    "not_gt": (lambda i, j: ~(j > i), "k ≤ q"),
    "difference": (lambda i, j: i - j >= 0, "k ≤ q"),
    "window": (lambda i, j: i - j < 3, "q - k < 3"),
    "window_from_below": (lambda i, j: j > i - 3, "q - k < 3"),
    "window_of_the_opposite": (lambda i, j: ~(j <= i - 3), "q - k < 3"),
    "both": (lambda i, j: (j <= i) & (j > i - 3), "k ≤ q ∧ q - k < 3"),
    "product": (lambda i, j: (j <= i) * (j > i - 3), "k ≤ q ∧ q - k < 3"),
    "either": (lambda i, j: (j <= i) | (j < 2), "k < 2 ∨ k ≤ q"),
    "blocks": (lambda i, j: i // 2 == j // 2, "⌊q/2⌋ = ⌊k/2⌋"),
    "triangle": (lambda i, j: torch.ones(6, 6, dtype=torch.bool).tril(), "k ≤ q"),
    "triangle_of_numbers": (lambda i, j: torch.ones(6, 6).tril() == 1, "k ≤ q"),
    "upper_triangle": (lambda i, j: torch.ones(6, 6).triu(1) == 0, "k ≤ q"),
    "cast": (lambda i, j: (j <= i).long().bool(), "k ≤ q"),
    "complement": (lambda i, j: (1 - (j <= i).int()) == 0, "k ≤ q"),
    "where": (lambda i, j: torch.where(j <= i, 1, 0) != 0, "k ≤ q"),
    "xor": (lambda i, j: (j <= i) ^ (j < 2), "(k ≤ q ∧ k ≥ 2) ∨ (k < 2 ∧ q - k < 0)"),
    "equal_truths": (lambda i, j: (i < 2) == (j < 2), "(k < 2 ∧ q < 2) ∨ (k ≥ 2 ∧ q ≥ 2)"),
    "unequal_truths": (lambda i, j: (i < 2) != (j < 2), "(q < 2 ∧ k ≥ 2) ∨ (k < 2 ∧ q ≥ 2)"),
    "not_equal_to_true": (lambda i, j: (j <= i) != torch.tensor(False), "k ≤ q"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_comes_out_in_one_spelling(name: str) -> None:
    function, text = MASKS[name]
    formula = read(lambda x: function(*grid()) & (x == x), torch.zeros(6, 6, dtype=torch.int64))
    assert formula_text(respelled(formula)) == text


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize(
    "offset", [Integer(0), Integer(2), Symbol("n", integer=True), -Symbol("n", integer=True)]
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_comparison_of_positions_is_exact(op: str, offset: Expr, swapped: bool) -> None:
    sides = (sym.k, sym.q + offset)
    x, y = reversed(sides) if swapped else sides
    formula = compare(op, x, y)
    for q, k, n in ((q, k, n) for q in range(5) for k in range(5) for n in range(3)):
        at = {sym.q: q, sym.k: k, Symbol("n", integer=True): n}
        assert bool(formula.subs(at)) == eval(f"{x.subs(at)} {op} {y.subs(at)}")


def test_an_additive_mask_is_a_choice_between_two_numbers() -> None:
    lowest = torch.finfo(torch.float32).min
    formula = read(lambda pad: (1.0 - pad[:, None, None, :].float()) * lowest, truths(2, 5))
    assert formula_text(formula, ["x"]) == f"(0 if x[b, k] else {lowest:.6g})"


def test_a_subtracted_mask_is_a_choice_between_two_numbers() -> None:
    formula = read(lambda x, pad: x - 1e30 * (~pad).float(), numbers(2, 5), truths(2, 5))
    assert formula_text(formula, ["y"]) == "x[q, k] + (-1e+30 if ¬y[q, k] else 0)"


# --- numbers --------------------------------------------------------------------------------------


def buckets(distance: Tensor, count: int = 32, furthest: int = 128) -> Tensor:
    """Buckets of distances, equal ones near by and logarithmic ones further away."""
    exact = count // 2
    far = torch.log(distance.float() / exact) / math.log(furthest / exact) * (count - exact)
    return torch.where(distance < exact, distance, (exact + far.long()).clamp(max=count - 1))


@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_logarithmic_buckets_are_exact_at_every_border(count: int) -> None:
    read(lambda x: buckets(torch.arange(201), count) + x, torch.zeros(201, dtype=torch.int64))


def test_what_float32_rounding_decides_is_not_read_in_another_precision() -> None:
    formula = read(
        lambda x: (torch.log(torch.arange(1, 9).double()) * 3).long() + x,
        torch.zeros(8, dtype=torch.int64),
    )
    assert not formula.has(sym.Fmul)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "arange_with_step": lambda x: torch.arange(1, 13, 2) + x,
    "zero_dimensional": lambda x: x * torch.tensor(3) + torch.tensor(2),
    "full": lambda x: torch.full((6,), 4) + x,
    "floor_division": lambda x: (torch.arange(6) - 3) // 2 + x,
    "remainder": lambda x: (torch.arange(6) - 3) % 4 + x,
    "true_division": lambda x: torch.arange(6) / 4 + x,
    "power": lambda x: torch.arange(6) ** 2 + x,
    "power_of_two": lambda x: 2.0 ** -torch.arange(6) + x,
    "clamp": lambda x: torch.arange(6).clamp(2, 4) + x,
    "minimum": lambda x: torch.minimum(torch.arange(6), torch.tensor(3)) + x,
    "abs": lambda x: (torch.arange(6) - 3).abs() + x,
    "sign": lambda x: torch.sign(torch.arange(6) - 3) + x,
    "floor": lambda x: torch.floor((torch.arange(6) - 3) * 0.7) + x,
    "truncation": lambda x: ((torch.arange(6) - 3) * 0.7).long() + x,
    "exp": lambda x: torch.exp(-0.5 * torch.arange(6)) + x,
    "sqrt": lambda x: torch.sqrt(torch.arange(6)) + x,
    "addcmul": lambda x: torch.addcmul(x, torch.arange(6), torch.arange(6), value=2),
    "rsub": lambda x: 3 - torch.arange(6) + x,
    "assigned_where": lambda x: torch.arange(6).masked_fill(torch.arange(6) > 2, -1) + x,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_arithmetic_on_positions_is_exact(name: str) -> None:
    formula = read(NUMBERS[name], torch.zeros(6, dtype=torch.int64))
    assert {r.tensor for r in sym.reads(formula)} <= {"x"}


def test_a_chain_of_choices_keeps_its_order() -> None:
    def pick(x: Tensor) -> Tensor:
        i = torch.arange(6)
        return torch.where(i < 2, x, torch.where(i < 4, x * 2, torch.where(i == 4, 7, i)))

    formula = read(pick, numbers(6))
    assert formula_text(formula) == (
        "(x[k] if k < 2 else (2·x[k] if k < 4 else (7 if k = 4 else k)))"
    )


# --- what is not read -----------------------------------------------------------------------------


def test_what_has_no_rule_is_a_read_of_that_tensor_at_its_own_indices() -> None:
    formula = read(
        lambda pad: (pad.cumsum(-1) - 1)[:, None, :].expand(-1, 3, -1)[:, None], truths(2, 5)
    )
    assert formula_text(formula) == "cumsum[b, k] - 1"


def test_a_detached_parameter_is_not_looked_through() -> None:
    """Whoever read the parameter itself would let a gradient flow to it."""
    formula = read(lambda x: (x * 2).detach() + 1, numbers(3, 4))
    assert formula_text(formula) == "detach[q, k] + 1"
    assert (
        formula_text(read(lambda x: x + torch.arange(4).detach(), numbers(3, 4))) == "x[q, k] + k"
    )
