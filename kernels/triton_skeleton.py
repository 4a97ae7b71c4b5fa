"""The body of a Triton kernel for softmax attention: online softmax over tiles of keys.

A stage of the spec that does nothing leaves no line behind, so that a plain spec gives a plain
kernel. Prefixes: `i_` index of a batch, head or first key, `o_` offsets, `p_` pointers, `b_` values
in registers, `m_` masks, `t_` tensors that formulas read, `size_` their extents, `n_` sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
from sympy import Expr

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.triton_code import is_number
from rewriter.kernels.triton_lines import (
    LOG2E,
    indented,
    load,
    loop_head,
    loop_step,
    padded,
    pointer,
)
from rewriter.kernels.triton_loads import QUERIES, Layout, Loads, identifiers
from rewriter.kernels.triton_ranges import key_ranges
from rewriter.kernels.triton_source import Argument, arguments_of
from rewriter.kernels.triton_sums import EditedSums, Sums
from rewriter.symbols import formula_text

if TYPE_CHECKING:
    from rewriter.kernels.triton_codegen import KernelSpec

__all__ = ["Skeleton", "is_small"]

_HUGE = 1e30


class Skeleton:
    """Writes the lines of one kernel; each method a part of it.

    Attributes:
        loads: the reads of tensors, complete once `body` has been called.
        sizes: what each size of the formulas is called, by name.
    """

    numbers = "HGLM"
    """The sizes that it takes."""
    taken: tuple[str, ...] = ()
    """What it writes behind `b_`, `n_` or `p_` besides what every kernel does."""

    layout: Layout = QUERIES

    def __init__(self, kernel: KernelSpec) -> None:
        self.kernel, self.spec = kernel, kernel.lowered[0]
        for name, formula in (("sink", self.spec.sink), ("head factor", self.spec.heads)):
            if formula is not None and formula.has(sym.k, sym.s):
                raise LoweringError(f"the {name} depends on the key: {formula_text(formula)}")
        dtypes = {t.name: t.dtype for t in self.spec.tensors}
        self.sizes = {
            n: f"n_{ident}" for n, ident in identifiers(self.spec.sizes, self.taken).items()
        }
        self.loads = Loads(dtypes, self.sizes, self.taken, self.layout)
        self.ranges = key_ranges(self.spec.mask)
        masked = {"add": "mean"}.get(self.spec.masked, self.spec.masked)
        self.masked = "none" if self.spec.is_unmasked else masked
        # A key that is seen scores -inf only through a read; else -inf says that nothing was seen.
        floats = any("float" in dtypes[r.tensor] for r in sym.reads(self.spec.score))
        self.counts_seen = floats and self.masked == "zero"
        self.pivots = floats or self.masked in ("zero", "nan") or self.spec.sink is not None
        self.base2 = not floats and is_small(self.spec.score)
        self.ieee = ', input_precision="ieee"' if kernel.dtype == "float32" else ""
        self.block_d, self.block_e = padded(kernel.head_dim), padded(kernel.value_dim)
        edit = self.spec.edit
        self.sums = (
            Sums(self.ieee)
            if edit is None
            else EditedSums(edit, kernel.dtype, self.loads, self.ieee)
        )
        self.m_d = " & m_d[None, :]" if self.block_d != kernel.head_dim else ""
        self.m_e = " & m_e[None, :]" if self.block_e != kernel.value_dim else ""

    def blocks(self) -> list[tuple[str, int]]:
        """Compile-time parameters and their values."""
        tile, kernel = self.kernel.tile, self.kernel
        blocks = [("BQ", tile.queries), ("BK", tile.keys), ("BD", self.block_d)]
        blocks += [("BE", self.block_e)]
        blocks += [("D", kernel.head_dim)] if self.m_d else []
        return blocks + ([("E", kernel.value_dim)] if self.m_e else [])

    def own(self) -> list[Argument]:
        """Its tensors and their strides."""
        names = ("q", "k", "v", "o", *(["lse"] if self.kernel.lse else []))
        args = [Argument(n, "tensor", n) for n in names]
        for name in "qkvo":
            strides = zip(range(4), "bhld", strict=True)
            args += [Argument(f"stride_{name}_{i}", "stride", name, dim) for dim, i in strides]
        return [*args, Argument("seed", "size", "seed")] if self.spec.dropout else args

    def arguments(self) -> tuple[Argument, ...]:
        """What a call hands over, once `body` has been called."""
        return arguments_of(self.spec, self.spec.formulas, self.loads, self.own(), self.numbers)

    def body(self) -> list[str]:
        """Every line of the kernel."""
        # Formulas first: printing them collects the loads that have to stand before them.
        state, score, loop, end = self._state(), self._score(), self._loop(), self._end()
        reads = ["# what the formulas read", *self.loads.once, ""] if self.loads.once else []
        step = [*self._keys(), *self.loads.each, *score, *self._step()]
        return [*self._tile(), *reads, *state, *loop, *indented(step), *end]

    def _tile(self) -> list[str]:
        """Which rows this program has, and the query tile."""
        return [
            "# one program a tile of queries of one head",
            "i_t = tl.program_id(0)",
            "n_t = tl.cdiv(L, BQ)",
            "i_bh = i_t // n_t",
            "i_b, i_h = i_bh // H, i_bh % H",
            "i_g = i_h // G  # the head of k and v",
            "i_q = i_t % n_t * BQ  # the first query",
            "o_q = i_q + tl.arange(0, BQ)",
            "o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)",
            "m_q = o_q < L",
            *(["m_d = o_d < D"] if self.m_d else []),
            *(["m_e = o_e < E"] if self.m_e else []),
            pointer("q", "i_h", "o_d[None, :]"),
            pointer("k", "i_g", "o_d[None, :]"),
            pointer("v", "i_g", "o_e[None, :]"),
            "# [BQ, BD]",
            load("q", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_d}"),
            "",
        ]

    def _state(self) -> list[str]:
        """The running maximum, denominator and output of each row."""
        lines = ["# running maximum, denominator and output of each row"]
        if self.spec.sink is None:
            lines += ['b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)']
            lines += ["b_l = tl.zeros([BQ], dtype=tl.float32)"]
        else:
            sink = self.loads.text(self.spec.sink, "row")
            sink = f"({sink}) * LOG2E" if self.base2 else sink
            lines += [f"b_m = {sink} + tl.zeros([BQ], dtype=tl.float32)"]
            lines += ['b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)  # the sink']
        if self.counts_seen:
            lines.append("m_seen = tl.zeros([BQ], dtype=tl.int32)")
        return [*lines, *self.sums.state(), ""]

    def _loop(self) -> list[str]:
        """The head of the loop over keys."""
        return loop_head(self.ranges, self.loads.text, "k")

    def _keys(self) -> list[str]:
        """The keys of one step; `i_k` is the first."""
        return loop_step(self.ranges, "k")

    def _score(self) -> list[str]:
        """The tile of scores, masked; in units of log 2 if `base2`."""
        spec, product = self.spec, f"tl.dot(b_q, tl.trans(b_k){self.ieee})"
        times = " * LOG2E" if self.base2 else ""
        if is_number(spec.scale):
            folded = self.base2 and spec.is_plain_score
            factor = float(spec.scale) * (LOG2E if folded else 1.0)
            lines = [f"b_s = {product} * {factor!r}" if factor != 1.0 else f"b_s = {product}"]
            times = "" if folded else times
        else:
            lines = [f"b_s = {product} * ({self.loads.text(spec.scale)})"]
        if times or not spec.is_plain_score:
            text = self.loads.text(spec.score)
            lines.append(f"b_s = ({text}){times}" if times else f"b_s = {text}")
        return [
            "# [BK, BD]",
            load("k", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_d}"),
            "# [BQ, BK]",
            *lines,
            *self._mask(),
        ]

    def _mask(self) -> list[str]:
        """What becomes of keys that are not seen, and of those behind the last."""
        lines = [f"m_s = {self.loads.text(self.spec.mask)}"] if self.masked != "none" else []
        keep = "m_k[None, :]"
        if self.masked == "mean":
            lines.append("b_s = tl.where(m_s, b_s, MIN)")
        elif self.masked != "none":
            keep = "m_s & m_k[None, :]"
        lines.append(f'b_s = tl.where({keep}, b_s, float("-inf"))')
        if self.counts_seen:
            lines.append(f"m_any = tl.broadcast_to(({keep}).to(tl.int32), [BQ, BK])")
            lines.append("m_seen = tl.maximum(m_seen, tl.max(m_any, 1))")
        return lines

    def _step(self) -> list[str]:
        """One step of the online softmax."""
        exp, pivot = "tl.exp2" if self.base2 else "tl.exp", "b_n"
        lines = ["# [BQ]", "b_n = tl.maximum(b_m, tl.max(b_s, 1))"]
        if self.pivots:
            pivot = "b_z"
            lines.append("# finite also while a row has seen nothing")
            lines.append('b_z = tl.where(b_n == float("-inf"), 0.0, b_n)')
        return [
            *lines,
            f"b_r = {exp}(b_m - {pivot})",
            f"b_p = {exp}(b_s - {pivot}[:, None])",
            *self.sums.weights(),
            *self._dropped(),
            "b_m = b_n",
            *self._values(),
            *self.sums.products(),
        ]

    def _dropped(self) -> list[str]:
        """Weights that dropout takes away; the denominator has them all."""
        if not self.spec.dropout:
            return []
        self.loads.helpers.add("kept")
        kept = f"m_kept = kept(seed, o_q[:, None], o_k[None, :], i_bh, {self.spec.dropout!r})"
        names = self.sums.weight_names
        return [kept, *(f"{name} = tl.where(m_kept, {name}, 0.0)" for name in names)]

    def _values(self) -> list[str]:
        """The values of one step."""
        return ["# [BK, BE]", load("v", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_e}")]

    def _end(self) -> list[str]:
        """Rows that saw nothing, the division, and the stores."""
        lines = ["", *self._lse()]
        if self.masked == "mean" and any(r.low or r.high for r in self.ranges):
            lines += self._mean()
        if self.masked == "zero":
            seen = "m_seen > 0" if self.counts_seen else 'b_m > float("-inf")'
            lines += [f"b_l = tl.where({seen}, b_l, 1.0)  # a row that sees no key gives 0"]
        lines += self.sums.end()
        if self.spec.dropout:
            lines.append(f"b_o = b_o * {1.0 / (1.0 - self.spec.dropout)!r}  # what dropout keeps")
        if self.spec.heads != 1:
            lines.append(f"b_o = b_o * ({self.loads.text(self.spec.heads)})")
        return [*lines, *self._store()]

    def _store(self) -> list[str]:
        return [
            pointer("o", "i_h", "o_e[None, :]"),
            "p_o += o_q.to(tl.int64)[:, None] * stride_o_l",
            f"tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_q[:, None]{self.m_e})",
        ]

    def _lse(self) -> list[str]:
        """The logarithm of the denominators, if it is asked for."""
        if not self.kernel.lse:
            return []
        lines = [
            "b_lse = (b_m + tl.log2(b_l)) / LOG2E" if self.base2 else "b_lse = b_m + tl.log(b_l)"
        ]
        if self.masked != "none":
            empty = "b_m <= MIN" if self.masked == "mean" else 'b_m == float("-inf")'
            lines.append(f'b_lse = tl.where({empty}, float("-inf"), b_lse)')
        return [*lines, "tl.store(lse + i_bh.to(tl.int64) * L + o_q, b_lse, mask=m_q)"]

    def _mean(self) -> list[str]:
        """Rows without a visible key, whose keys the loop may have passed over."""
        found = "m_empty = m_q & (b_m <= MIN)"
        some = "if tl.max(m_empty.to(tl.int32), 0) > 0:"
        if isinstance(self.sums, EditedSums) or self.spec.dropout:
            alike = self.sums.alike(self._values(), self._dropped())
            return [found, f"{some}  # they weigh all keys alike", *indented(alike)]
        return [
            found,
            f"{some}  # they give the mean of v over all keys",
            "    b_mean = tl.zeros([BE], dtype=tl.float32)",
            "    for i_k in range(0, M, BK):",
            "        o_k = i_k + tl.arange(0, BK)",
            "        # [BK, BE]",
            f"        {load('v', 'o_k.to(tl.int64)[:, None]', f'(o_k < M)[:, None]{self.m_e}')}",
            "        b_mean += tl.sum(b_v.to(tl.float32), 0)",
            "    b_o = tl.where(m_empty[:, None], b_mean[None, :], b_o)",
            "    b_l = tl.where(m_empty, M, b_l)",
        ]


def is_small(score: Expr) -> bool:
    """Scores of this form stay finite when they are multiplied by log2(e)."""
    return all(abs(float(x)) < _HUGE for x in score.atoms(sympy.Number))
