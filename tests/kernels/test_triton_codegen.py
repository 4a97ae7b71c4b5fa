"""The text of generated kernels: golden files, formulas as Triton, key ranges and tables.

`REWRITER_UPDATE_GOLDEN=1 pytest tests/kernels/test_triton_codegen.py` rewrites the golden files.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from sympy import Symbol
from torch.nn.attention.flex_attention import create_block_mask

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.evaluate import evaluate
from rewriter.families import from_json
from rewriter.kernels.triton_backward_code import BackwardSpec, BackwardTiles, backward_source
from rewriter.kernels.triton_code import Printer
from rewriter.kernels.triton_codegen import KernelSpec, Tile, codegen
from rewriter.kernels.triton_decode_code import DecodeSpec, decode_source
from rewriter.kernels.triton_ranges import BEHIND, FIRST, key_ranges, query_ranges
from rewriter.kernels.triton_tables import filled, tabulate
from rewriter.reference import mask_of
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import IDiv, IMod, L, M, Maximum, Read, Trunc, Where, b, h, k, q, s
from triton_specs import CAUSAL, SCALE, SPECS

GOLDEN = Path(__file__).parents[1] / "golden"
TILE = Tile(64, 32, 4, 2)


def kernel_of(spec: SoftmaxSpec, head_dim: int = 64, lse: bool = False) -> KernelSpec:
    return KernelSpec(spec, head_dim, 64, "bfloat16", TILE, lse)


def gradients_of(spec: SoftmaxSpec, *wanted: str) -> BackwardSpec:
    tiles = BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2))
    return BackwardSpec(spec, 64, 60, "bfloat16", tiles, frozenset(wanted))


def pad() -> TensorArg:
    return TensorArg("pad", "bool", 2)


# --- the file -------------------------------------------------------------------------------------

FILES = {
    "plain": kernel_of(SPECS["plain"]),
    "window-sinks": kernel_of(SPECS["window-sinks"], lse=True),
    "causal-padding-bias": kernel_of(
        replace(
            SPECS["causal-padding"],
            score=s + Read(Symbol("table"), Maximum(k - q, -8) + 8, h),
            sink=Read(Symbol("sink"), h),
            tensors=(pad(), TensorArg("table", "float32", 2), TensorArg("sink", "float32", 1)),
        ),
        head_dim=60,
    ),
    "edit": kernel_of(SPECS["redistribute"]),
}


@pytest.mark.parametrize("name", FILES)
def test_the_source_is_that_of_the_golden_file(name: str) -> None:
    path, text = GOLDEN / f"softmax_fwd_{name.replace('-', '_')}.py", codegen(FILES[name]).text
    if os.environ.get("REWRITER_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


DECODING = {
    "causal-padding": DecodeSpec(kernel_of(SPECS["causal-padding"]), split=True),
    "window": DecodeSpec(kernel_of(SPECS["two-sided-window"]), split=False),
}


@pytest.mark.parametrize("name", DECODING)
def test_the_kernels_for_few_queries_are_those_of_the_golden_file(name: str) -> None:
    path = GOLDEN / f"softmax_decode_{name.replace('-', '_')}.py"
    text = decode_source(DECODING[name]).text
    if os.environ.get("REWRITER_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


BACKWARD = {
    "plain": gradients_of(SPECS["plain"]),
    "window-sinks": gradients_of(SPECS["window-sinks"]),
    "relative-bias": gradients_of(SPECS["relative-bias"], "table"),
    "edit": gradients_of(SPECS["shares"], "share"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradients_are_those_of_the_golden_file(name: str) -> None:
    path = GOLDEN / f"softmax_bwd_{name.replace('-', '_')}.py"
    text = backward_source(BACKWARD[name]).text
    if os.environ.get("REWRITER_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_plain_spec_gives_plain_gradients() -> None:
    text = backward_source(BACKWARD["plain"]).text
    for absent in ("b_s", "b_x", "group", "factors", " t_", "size_", "atomic", "rows_kernel", "g0"):
        assert absent not in text
    assert text.count("tl.dot") == 7  # three and four


@pytest.mark.parametrize("name", SPECS)
def test_every_file_of_gradients_is_python(name: str) -> None:
    wanted = [t.name for t in SPECS[name].tensors if "float" in t.dtype]
    source = backward_source(gradients_of(SPECS[name], *wanted))
    functions = [n for n in ast.parse(source.text).body if isinstance(n, ast.FunctionDef)]
    for mine in source.functions:
        function = next(f for f in functions if f.name == mine.name)
        names = [a.arg for a in function.args.args]
        assert names[: len(mine.arguments)] == [a.name for a in mine.arguments]
        assert len(set(names)) == len(names)
        lines = [n for line in function.body for n in ast.walk(line)]
        nodes = [n for n in lines if isinstance(n, ast.Name)]
        stored = {n.id for n in nodes if _is_stored(n)}
        assert not stored & set(names), "an argument is overwritten"
        unknown = {n.id for n in nodes} - stored - set(names) - {"tl", "range", "float"}
        assert unknown <= {"LOG2E", "tanh", "floor_div", "floor_mod"}


def test_tensors_may_be_called_like_what_the_gradients_use_themselves() -> None:
    names = ("q", "do", "dz", "delta", "lse", "factors", "g0", "a0", "u1", "row", "d", "e", "x")
    score = s + sum(Read(Symbol(n), b, k) + Read(Symbol(n), b, q) for n in names)
    spec = SoftmaxSpec(score=score, tensors=tuple(TensorArg(n, "float32", 2) for n in names))
    for kernel in backward_source(gradients_of(spec, *names)).text.split("@triton.jit")[1:]:
        lines = [x for x in kernel.splitlines() if " = tl.load(" in x]
        targets = [x.split(" = ")[0].strip() for x in lines]
        assert len(targets) == len(set(targets))


# --- all kernels ----------------------------------------------------------------------------------


def test_a_plain_spec_gives_a_plain_kernel() -> None:
    text = codegen(kernel_of(SPECS["plain"])).text
    for absent in ("m_s", "b_z", "m_seen", "tl.where(b_", "lse", " t_", "size_", "@triton.jit\n"):
        assert absent not in text
    for absent in ("group", "b_l0", "b_p0", "b_o0", "RAISE"):
        assert absent not in text
    assert text.count("tl.dot") == 2


def test_equal_specs_give_equal_text_and_a_digest_of_it() -> None:
    again = from_json(SPECS["alibi"].to_json())
    assert isinstance(again, SoftmaxSpec)
    assert codegen(kernel_of(again)) == codegen(kernel_of(SPECS["alibi"]))
    digest = codegen(kernel_of(again)).digest
    assert digest == codegen(kernel_of(SPECS["alibi"])).digest
    assert digest != codegen(kernel_of(again, lse=True)).digest


@pytest.mark.parametrize("name", SPECS)
def test_every_file_is_python_and_takes_the_arguments_that_are_listed(name: str) -> None:
    source = codegen(kernel_of(SPECS[name]))
    given = [a.name for a in source.function("softmax_fwd_kernel").arguments]
    function = next(
        node
        for node in ast.parse(source.text).body
        if isinstance(node, ast.FunctionDef) and node.name == "softmax_fwd_kernel"
    )
    names = [a.arg for a in function.args.args]
    assert names[: len(given)] == given
    assert len(set(names)) == len(names)
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and _is_stored(n)}
    assert not stored & set(names), "an argument is overwritten"


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def test_tensors_may_be_called_like_what_the_kernel_uses_itself() -> None:
    names = ("q", "k", "s", "o", "m", "b_q", "q.1", "q_1", "")
    score = s + sum(Read(Symbol(n), h) + Read(Symbol(n), b) for n in names)
    spec = SoftmaxSpec(score=score, tensors=tuple(TensorArg(n, "float32", 1) for n in names))
    lines = codegen(kernel_of(spec)).text.splitlines()
    targets = [line.split(" = ")[0].strip() for line in lines if " = tl.load(p_" in line]
    assert len(targets) == len(set(targets)) == 2 * len(names) + len("qkv")


def test_a_name_cannot_bring_code_into_the_file() -> None:
    evil = '"""\nimport os\nos.remove("x")\n"""\\'
    spec = SoftmaxSpec(score=s + Read(Symbol(evil), h), tensors=(TensorArg(evil, "float32", 1),))
    tree = ast.parse(codegen(kernel_of(spec)).text)
    imported = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert imported == ["triton", "triton.language"]
    assert "remove" not in {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def test_generating_code_imports_no_triton() -> None:
    code = (
        "import sys; from rewriter.kernels import triton_codegen, triton_launch, triton_aot;"
        "print('triton.compiler' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- formulas -------------------------------------------------------------------------------------


def printed(formula: sympy.Basic) -> str:
    names = {"b": "i_b", "h": "i_h", "q": "o_q", "k": "o_k", "s": "b_s", "L": "L", "M": "M"}
    dtypes = {"x": "float32", "n": "int64"}
    return Printer(names, dtypes, lambda read: f"b_{read.tensor}", set()).text(formula)


X, N = Read(Symbol("x"), h), Read(Symbol("n"), b)


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (s / 8, "0.125 * b_s"),
        (-s, "-b_s"),
        (s - q * X, "b_s - b_x * o_q"),
        (s * (k - q), "b_s * (o_k - o_q)"),
        (s / X, "b_s / b_x"),
        (1 / (s + X), "1.0 / (b_s + b_x)"),
        (s**2, "b_s * b_s"),
        (sympy.sqrt(X), "tl.sqrt(b_x)"),
        (sympy.Float(0.25) ** (h + 1), "tl.exp2((i_h + 1) * -2.0)"),
        (50 * sympy.tanh(s / 50), "50 * tanh(0.02 * b_s)"),
        (sympy.exp(k), "tl.exp(o_k * 1.0)"),
        (sympy.Abs(k - q), "tl.abs(o_k - o_q)"),
        (Where(k > q, 16, 0), "tl.where(o_k > o_q, 16, 0)"),
        (IDiv(k, 8), "o_k // 8"),
        (IDiv(k - q, 8), "floor_div(o_k - o_q, 8)"),
        (IMod(k - q, N), "floor_mod(o_k - o_q, b_n)"),
        ((k <= q) & (sympy.Ne(N, 0) | (k < 4)), "(o_k <= o_q) & ((o_k < 4) | (b_n != 0))"),
        (~(sympy.Eq(k, q) & sympy.Ne(N, 0)), "~((o_k == o_q) & (b_n != 0))"),
        (sympy.Float(-3.4028234663852886e38), "-3.4028234663852886e+38"),
        (-sympy.oo, 'float("-inf")'),
    ],
    ids=str,
)
def test_a_formula_prints_as_triton(formula: sympy.Basic, text: str) -> None:
    assert printed(formula) == text


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (Trunc(s), "rounded to an integer that depends on more than q, k or k - q alone"),
        (sympy.floor(s * X), "rounded to an integer"),
        (IDiv(X, 2), "divides values that are no integers"),
        (s**X, "the power .* has no rule"),
        (sympy.gamma(s), "gamma has no rule in Triton"),
        (sympy.Float(-1e300), "the constant -1e.300 is beyond float32"),
        (Symbol("unheard"), "unheard is not known"),
    ],
    ids=str,
)
def test_what_has_no_rule_is_refused_with_the_reason(formula: sympy.Basic, reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        printed(formula)


def test_a_sink_that_depends_on_the_key_is_refused() -> None:
    with pytest.raises(LoweringError, match="the sink depends on the key: k"):
        codegen(kernel_of(SoftmaxSpec(sink=k + 1)))


# --- which keys a tile visits ---------------------------------------------------------------------

OFFSET = sym.size_symbol("offset")
MASKS = {
    "causal": k <= q,
    "offset": CAUSAL,
    "size": k + OFFSET <= q + 9,
    "window": (k <= q) & (q - k < 7),
    "window-sinks": (k <= q) & ((q - k < 7) | (k < 3)),
    "sinks-outside": ((k <= q) & (q - k < 7)) | (k < 3),
    "two-sided": sympy.Abs(k - q) <= 5,
    "two-sided-sinks": (sympy.Abs(k - q) < 5) | (k < 3),
    "future": k > q,
    "diagonal": sympy.Eq(k, q),
    "anti-diagonal": k + q < 30,
    "anti-diagonal-from-below": k + q >= 30,
    "three-parts": (k < 3) | (sympy.Abs(k - q) < 3) | (k > M - 3),
    "two-middles": (sympy.Abs(k - q) < 3) | (sympy.Abs(k - q - 12) < 3),
    "every-second": (2 * k <= q) & sympy.Eq(IMod(k, 2), 0),
    "negated": ~(k > q),
    "negated-and": ~((k > q) & (k > 5)),
    "head": (k <= q) | (h > 0),
    "steep": k <= 2 * q - 5,
    "two-blocks": ((q < 9) & (k < 9)) | ((q >= 9) & (k >= 9)),
    "blocks": ((q < 9) & (k < 9))
    | ((q >= 9) & (k >= 9) & (q < 20) & (k < 20))
    | (q > 25) & (k > 25),
    "last-queries": (q >= L - 4) & (k <= q),
    "nothing": sympy.false,
    "all": sympy.true,
}


LENGTHS = [(37, 37), (5, 40), (40, 21)]


def _tiles(
    name: str, q_len: int, kv_len: int, of: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each tile of 8 queries, or of 8 keys: what it sees, and what its loop visits."""
    spec = SoftmaxSpec(mask=MASKS[name], sizes=("offset",))
    mask = mask_of(spec, q_len=q_len, kv_len=kv_len, sizes=[4])
    mask = mask.reshape(-1, q_len, kv_len).any(0)
    ranges, mask = (
        (key_ranges(spec.mask), mask) if of == "queries" else (query_ranges(spec.mask), mask.mT)
    )
    for first in range(0, mask.shape[0], 8):
        rows = mask[first : first + 8]
        visited = torch.zeros(mask.shape[1], dtype=torch.bool)
        at = {FIRST: first, BEHIND: first + 8, sym.size_symbol("offset"): 4, L: q_len, M: kv_len}
        for found in ranges:
            low = max([0, *(int(x.xreplace(_numbers(at))) for x in found.low)])
            high = min([len(visited), *(int(x.xreplace(_numbers(at))) for x in found.high)])
            visited[low : max(low, high)] = True
        yield rows, visited


@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_no_allowed_pair_is_passed_over(name: str, q_len: int, kv_len: int, of: str) -> None:
    for rows, visited in _tiles(name, q_len, kv_len, of):
        assert not (rows.any(0) & ~visited).any()


ONE_RUN = (
    "causal", "offset", "size", "window", "two-sided", "future", "diagonal", "anti-diagonal",
    "anti-diagonal-from-below", "two-blocks", "last-queries", "negated", "nothing", "all",
)  # fmt: skip
"""Masks that bounds describe in full; what a tile sees is one run of keys, or nearly."""


@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("name", ONE_RUN)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_no_tile_without_an_allowed_pair_is_visited(
    name: str, q_len: int, kv_len: int, of: str
) -> None:
    for rows, visited in _tiles(name, q_len, kv_len, of):
        seen = rows.any(0).nonzero()
        if len(rows) < 8:
            continue  # the bounds count the rows that are missing
        if not len(seen):
            assert not visited.any()
            continue
        first, last = int(seen[0]) // 8 * 8, -(-int(seen[-1] + 1) // 8) * 8
        assert not visited[:first].any()
        assert not visited[last:].any()


@pytest.mark.parametrize("name", [n for n in ONE_RUN if n not in ("anti-diagonal", "nothing")])
def test_the_tiles_are_those_of_a_block_mask(name: str) -> None:
    """FlexAttention finds them by evaluating the mask at every pair."""
    length, tile = 64, 8
    seen = mask_of(
        SoftmaxSpec(mask=MASKS[name], sizes=("offset",)), q_len=length, kv_len=length, sizes=[4]
    ).reshape(length, length)
    blocks = create_block_mask(
        lambda b, h, q, k: seen[q, k], 1, 1, length, length, device="cpu", BLOCK_SIZE=tile
    ).to_dense()[0, 0]
    for row, (_, visited) in zip(blocks, _tiles(name, length, length, "queries"), strict=True):
        assert visited.view(-1, tile).any(1).tolist() == row.bool().tolist()


def _numbers(at: dict[Symbol, int]) -> dict[Symbol, sympy.Integer]:
    return {symbol: sympy.Integer(value) for symbol, value in at.items()}


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("causal", [((), (BEHIND,))]),
        ("window", [((FIRST - 6,), (BEHIND,))]),
        ("window-sinks", [((), (sympy.Integer(3), BEHIND)), ((FIRST - 6,), (BEHIND,))]),
        ("two-sided", [((FIRST - 5,), (BEHIND + 5,))]),
        ("head", [((), ())]),
    ],
)
def test_bounds_are_as_tight_as_the_mask(name: str, ranges: list[tuple[object, object]]) -> None:
    assert [(r.low, r.high) for r in key_ranges(MASKS[name])] == ranges


# --- tables ---------------------------------------------------------------------------------------


def test_a_bucket_becomes_a_read_of_a_table_that_torch_fills() -> None:
    spec, tables = tabulate(SPECS["buckets"])
    assert [t.axis for t in tables] == ["k - q"]
    assert spec.score == s + Read(Symbol("table"), Read(Symbol("rounded0"), k - q + L - 1), h)
    q_len, kv_len = 50, 300
    table = filled(tables[0], q_len, kv_len, (), torch.device("cpu"))
    rows, columns = torch.arange(q_len)[:, None], torch.arange(kv_len)
    gold = evaluate(tables[0].formula, {"q": rows, "k": columns}, {}, torch.float32)
    assert isinstance(gold, torch.Tensor)
    assert table[columns - rows + q_len - 1].equal(gold.int())
    assert len(gold.unique()) > 20


def test_rounded_positions_get_tables_of_their_own_axis() -> None:
    spec = SoftmaxSpec(score=s + Trunc(0.3 * k) - Trunc(0.7 * q))
    assert sorted(t.axis for t in tabulate(spec)[1]) == ["k", "q"]


def test_rounding_of_both_positions_has_no_table_and_no_kernel() -> None:
    spec = SoftmaxSpec(score=s + Trunc(0.3 * k * q))
    assert tabulate(spec)[1] == ()
    with pytest.raises(LoweringError, match="rounded to an integer"):
        codegen(kernel_of(spec))


def test_the_scale_of_a_plain_score_is_one_constant() -> None:
    text = codegen(kernel_of(SoftmaxSpec(scale=SCALE))).text
    assert "* 0.18033688011112042" in text  # 0.125 · log2(e)
    assert "LOG2E" not in text
