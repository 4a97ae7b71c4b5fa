"""The text of the Triton kernels for the gradients of softmax attention.

The weights of a tile are computed again from the scores and the logarithm of each row's
denominator, `p = exp(z - lse)`; then `dz = p (u - delta)` with `u` the gradient of the weight and
`delta = sum_j p_j u_j`. Two kernels: one program a tile of queries gives the gradient of q, one a
tile of keys those of k and v, so that nothing is added up by atomics. What the score reads gets its
gradient where its index allows it to stay in registers: reads of the query in the first kernel,
reads of the key in the second. Only a read of both is added to memory by atomics.

With an edit (`rewriter.stages.Edit`) `u_j = a_g t_j + b_g`, where t is the gradient of the edited
weight, a the factor of the key's group and b the gradient of its mass; a third kernel gives the
masses and the sums of `p t` by group before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.triton_code import is_number
from rewriter.kernels.triton_codegen import Dtype, Tile
from rewriter.kernels.triton_derivatives import ReadGradient, derivative, read_gradients
from rewriter.kernels.triton_lines import (
    LOG2E,
    indented,
    load,
    loop_head,
    loop_step,
    padded,
    pointer,
)
from rewriter.kernels.triton_loads import KEYS, QUERIES, Layout, Loads, identifiers
from rewriter.kernels.triton_ranges import KeyRange, key_ranges, query_ranges
from rewriter.kernels.triton_source import (
    Argument,
    Function,
    Source,
    Written,
    arguments_of,
    file_of,
)
from rewriter.kernels.triton_tables import Table, tabulate
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula

__all__ = ["BackwardSpec", "BackwardTiles", "backward_source"]

_TAKEN = (
    *("a", "b", "c", "d", "e", "g", "h", "u", "w", "x", "bh", "row", "lse", "delta", "keep"),
    *("do", "dp", "dq", "dk", "dv", "dx", "dz", "bound", "masses", "totals", "factors", "offsets"),
    *(f"{letter}{n}" for letter in "bgtu" for n in range(16)),
)


@dataclass(frozen=True)
class BackwardTiles:
    """How much a program of each kernel takes at a time."""

    queries: Tile
    keys: Tile


@dataclass(frozen=True)
class BackwardSpec:
    """Everything that changes the text of the kernels; equal ones give equal text."""

    spec: SoftmaxSpec
    head_dim: int
    value_dim: int
    dtype: Dtype
    """Of q, k, v, the output and its gradient."""
    tiles: BackwardTiles
    wanted: frozenset[str]
    """The tensors of the spec whose gradient is wanted."""

    @cached_property
    def lowered(self) -> tuple[SoftmaxSpec, tuple[Table, ...]]:
        """The spec with its rounded integers read from tables, and the tables."""
        return tabulate(self.spec)

    @property
    def sums_rows(self) -> bool:
        """A kernel of its own adds up what each row needs. The output in a half would give `delta`
        too, but rounded: a row's `dz` would not add up to 0, which a bias gets to see."""
        reads = read_gradients(self.lowered[0], self.wanted)
        return self.spec.edit is not None or (self.dtype != "float32" and bool(reads))


# --- lines ----------------------------------------------------------------------------------------


class _Kernel:
    """Writes one of the kernels; each method a part of it."""

    name = ""
    layout: Layout = QUERIES
    axis: Literal["k", "q"] = "k"
    """What the inner loop goes through."""

    def __init__(self, kernel: BackwardSpec) -> None:
        self.kernel, self.spec = kernel, kernel.lowered[0]
        spec, dtypes = self.spec, {t.name: t.dtype for t in self.spec.tensors}
        self.sizes = {n: f"n_{ident}" for n, ident in identifiers(spec.sizes, _TAKEN).items()}
        self.gradients = read_gradients(spec, kernel.wanted)
        pairs = {g.read.tensor for g in self.gradients if g.place == "pair" and self.adds}
        self.loads = Loads(dtypes, self.sizes, _TAKEN, self.layout, frozenset(pairs))
        self.ieee = ', input_precision="ieee"' if kernel.dtype == "float32" else ""
        # In float16 a factor may take a weight out of its range.
        self.wide = spec.edit is not None and kernel.dtype == "float16"
        self.block_d, self.block_e = padded(kernel.head_dim), padded(kernel.value_dim)
        self.m_d = " & m_d[None, :]" if self.block_d != kernel.head_dim else ""
        self.m_e = " & m_e[None, :]" if self.block_e != kernel.value_dim else ""
        self.number = float(spec.scale) if is_number(spec.scale) else None
        self.folded = self.number is not None and spec.is_plain_score
        self.slope = derivative(spec.score, sym.s)
        self.of_products = "b_dz"
        """The gradient of the products of queries and keys; complete after `scores_gradient`."""
        self.printed: list[Formula] = []

    adds = False
    """It adds gradients of pairs to memory."""

    @property
    def tile(self) -> Tile:
        return self.kernel.tiles.queries

    @property
    def ranges(self) -> tuple[KeyRange, ...]:
        return key_ranges(self.spec.mask)

    def text(self, formula: Formula) -> str:
        self.printed.append(formula)
        return self.loads.text(formula)

    def rows(self, name: str) -> str:
        """A value of each query, in a tile."""
        return f"{name}[:, None]" if self.layout is QUERIES else f"{name}[None, :]"

    def dot(self, x: str, y: str, total: str = "") -> str:
        """A product of tiles of the dtype, added to a total if there is one."""
        more = f", {total}" if total else ""
        return f"tl.dot({x}, {y}{more}{self.ieee})"

    def dot_of(self, weights: str, rows: str, total: str) -> str:
        """The line that adds a product of computed numbers and a tile of the dtype to a total."""
        if self.wide:
            return f"{total} = tl.dot({weights}, {rows}.to(tl.float32), {total})"
        return f"{total} = {self.dot(f'{weights}.to({rows}.dtype)', rows, total)}"

    # parts of the inner loop

    def score(self) -> list[str]:
        """The tile of scores, those that are not seen minus infinity; in units of log 2 if they
        are nothing but the scaled product."""
        spec, (x, y) = self.spec, self.operands("q", "k")
        product = self.dot(x, f"tl.trans({y})")
        shape = ", ".join(f"B{str(i).upper()}" for i in self.layout.shape)
        lines = [f"# [{shape}]"]
        if self.folded:
            assert self.number is not None
            lines += [f"b_z = {product} * {self.number * LOG2E!r}"]
        else:
            scale = repr(self.number) if self.number is not None else f"({self.text(spec.scale)})"
            lines += [f"b_x = {product}", f"b_s = b_x * {scale}"]
            lines += [f"b_z = {self.text(spec.score)}"]
        bound = f"m_k{'[None, :]' if self.layout is QUERIES else '[:, None]'}"
        if spec.is_unmasked:
            lines += [f"m_keep = {bound}"]
        else:
            lines += [f"m_keep = ({self.text(spec.mask)}) & {bound}"]
        return [*lines, 'b_z = tl.where(m_keep, b_z, float("-inf"))']

    def operands(self, of_query: str, of_key: str) -> tuple[str, str]:
        """Tiles of the queries and the keys, in the order of the dimensions of a tile."""
        names = (f"b_{of_query}", f"b_{of_key}")
        return names if self.layout is QUERIES else (names[1], names[0])

    def weights(self) -> list[str]:
        """The weights of the tile, and the gradients of the weights."""
        z = "b_z" if self.folded else "b_z * LOG2E"
        do, v = self.operands("do", "v")
        return [
            f"b_p = tl.exp2({z} - {self.rows('b_lse')})",
            f"b_dp = {self.dot(do, f'tl.trans({v})')}",
            *self.dropped(),
        ]

    def dropped(self) -> list[str]:
        """Weights that dropout takes away have no gradient."""
        rate = self.spec.dropout
        if not rate:
            return []
        self.loads.helpers.add("kept")
        names = self.layout.names
        return [
            f"m_kept = kept(seed, {names['q']}, {names['k']}, i_bh, {rate!r})",
            f"b_dp = tl.where(m_kept, b_dp * {1.0 / (1.0 - rate)!r}, 0.0)",
        ]

    def group(self) -> list[str]:
        """The groups of the keys of the tile."""
        assert self.spec.edit is not None
        return [f"b_group = {self.text(self.spec.edit.group)}"]

    def by_group(self, name: str, letter: str) -> list[str]:
        """The line with what each pair has by the group of its key; 0 where it has none."""
        assert self.spec.edit is not None
        text = "0.0"
        for g in reversed(range(len(self.spec.edit.factors))):
            text = f"tl.where(b_group == {g}, {self.rows(f'b_{letter}{g}')}, {text})"
        return [f"{name} = {text}"]

    def edited(self) -> list[str]:
        """The gradients of the weights before the edit."""
        if self.spec.edit is None:
            return []
        return [
            *self.group(),
            *self.by_group("b_w", "a"),
            *self.by_group("b_u", "u"),
            "b_dp = b_dp * b_w + b_u",
        ]

    def scores_gradient(self) -> list[str]:
        """The gradient of the scores, and of the products of queries and keys."""
        lines = [f"b_dz = b_p * (b_dp - {self.rows('b_delta')})"]
        slope = self.slope if self.number is not None else self.slope * self.spec.scale
        if slope == 1:
            return lines
        self.of_products = "b_dx"
        return [*lines, f"b_dx = tl.where(m_keep, b_dz * ({self.text(slope)}), 0.0)"]

    def of_read(self, gradient: ReadGradient) -> str:
        """The gradient of a read at each pair."""
        if gradient.slope == 1:
            return "b_dz"
        return f"tl.where(m_keep, b_dz * ({self.text(gradient.slope)}), 0.0)"

    # parts before and behind it

    def head_of(self, lines: Sequence[str]) -> list[str]:
        """Lines that stand before the loops, with what the formulas read."""
        reads = ["# what the formulas read", *self.loads.once, ""] if self.loads.once else []
        return [*lines, *reads]

    def of_queries(self) -> list[str]:
        """The lines that load what each query of a tile has, from the forward and the edit."""
        lines = self.row("lse", "lse + i_row", other='float("inf")')
        lines += ["# a row that saw nothing has no weights"]
        lines += ['b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E']
        return lines

    def row(self, name: str, start: str, other: str = "0.0") -> list[str]:
        return [f"b_{name} = tl.load({start} + o_q, mask=m_q, other={other})"]

    def of_edit(self) -> list[str]:
        """The lines that load the factors of each group, and the gradients of their masses."""
        if self.spec.edit is None:
            return []
        lines = ["n_rows = B.to(tl.int64) * H * L"]
        for g in range(len(self.spec.edit.factors)):
            lines += self.row(f"a{g}", _of_group("factors", g))
            lines += self.row(f"u{g}", _of_group("offsets", g))
        return lines

    def times_scale(self, name: str) -> list[str]:
        """What is left to multiply a sum of products with."""
        factor = 1.0 if self.number is None else self.number
        return [] if factor == 1.0 else [f"{name} = {name} * {factor!r}"]

    def own(self) -> list[Argument]:
        raise NotImplementedError

    def body(self) -> list[str]:
        raise NotImplementedError

    def tensors(self, *names: str) -> list[Argument]:
        """The arguments for tensors `[B, H, L, D]` and their strides, and for plain ones."""
        plain = {"lse", "delta", "masses", "totals", "factors", "offsets"}
        args = [Argument(n, "tensor", n) for n in names]
        for name in names:
            if name not in plain:
                strides = zip(range(4), "bhld", strict=True)
                args += [Argument(f"stride_{name}_{i}", "stride", name, dim) for dim, i in strides]
        return args

    def blocks(self) -> list[tuple[str, int]]:
        """Compile-time parameters and their values."""
        kernel, m_d, m_e = self.kernel, self.m_d, self.m_e
        blocks = [("BQ", self.tile.queries), ("BK", self.tile.keys), ("BD", self.block_d)]
        blocks += [("BE", self.block_e)]
        blocks += [("D", kernel.head_dim)] if m_d else []
        return blocks + ([("E", kernel.value_dim)] if m_e else [])

    def columns(self) -> list[str]:
        return [
            "o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)",
            *(["m_d = o_d < D"] if self.m_d else []),
            *(["m_e = o_e < E"] if self.m_e else []),
        ]

    def function(self) -> tuple[Function, list[str]]:
        """The kernel, and its lines."""
        body = self.body()  # first: printing formulas finds out what has to be handed over
        numbers = "HGLM" if self.spec.edit is None else "BHGLM"
        own = self.own() + ([Argument("seed", "size", "seed")] if self.spec.dropout else [])
        args = arguments_of(self.spec, self.printed, self.loads, own, numbers)
        tile = self.tile
        return Function(self.name, args, tuple(self.blocks()), tile.warps, tile.stages, 255), body

    def store(self, name: str, index: str, rows: str, mask: str) -> list[str]:
        """The lines that store a tile of gradients."""
        columns = "o_e[None, :]" if name == "dv" else "o_d[None, :]"
        return [
            pointer(name, index, columns),
            f"p_{name} += {rows}.to(tl.int64)[:, None] * stride_{name}_l",
            f"tl.store(p_{name}, b_{name}.to({name}.dtype.element_ty), mask={mask})",
        ]


class _OfRows(_Kernel):
    """Sums over the keys of a row, one program a tile of queries of one head: the masses of groups
    and `p t` of each, or `delta`."""

    name = "softmax_bwd_rows_kernel"

    def tile_lines(self) -> list[str]:
        return [
            "# one program a tile of queries of one head",
            "i_t = tl.program_id(0)",
            "n_t = tl.cdiv(L, BQ)",
            "i_bh = i_t // n_t",
            "i_b, i_h = i_bh // H, i_bh % H",
            "i_g = i_h // G  # the head of k and v",
            "i_q = i_t % n_t * BQ  # the first query",
            "o_q = i_q + tl.arange(0, BQ)",
            *self.columns(),
            "m_q = o_q < L",
            "i_row = i_bh.to(tl.int64) * L",
            pointer("q", "i_h", "o_d[None, :]"),
            pointer("k", "i_g", "o_d[None, :]"),
            pointer("v", "i_g", "o_e[None, :]"),
            pointer("do", "i_h", "o_e[None, :]"),
            "# [BQ, BD], [BQ, BE]",
            load("q", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_d}"),
            load("do", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_e}"),
            "# [BQ]",
            *self.of_queries(),
        ]

    def keys(self) -> list[str]:
        return [
            *loop_step(self.ranges, "k"),
            "# [BK, BD], [BK, BE]",
            load("k", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_d}"),
            load("v", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_e}"),
        ]

    def own(self) -> list[Argument]:
        sums = ["delta"] if self.spec.edit is None else ["masses", "totals"]
        return self.tensors("q", "k", "v", "do", "lse", *sums)

    def body(self) -> list[str]:
        edit = self.spec.edit
        groups = range(len(edit.factors) if edit is not None else 0)
        step = [*self.score(), *self.weights()]
        step += ["b_delta += tl.sum(b_p * b_dp, 1)"] if edit is None else self.group()
        sums = ["b_delta = tl.zeros([BQ], dtype=tl.float32)"] if edit is None else []
        for g in groups:
            step += [f"b_p{g} = tl.where(b_group == {g}, b_p, 0.0)"]
            step += [f"b_m{g} += tl.sum(b_p{g}, 1)", f"b_t{g} += tl.sum(b_p{g} * b_dp, 1)"]
            sums += [f"b_m{g} = tl.zeros([BQ], dtype=tl.float32)"]
            sums += [f"b_t{g} = tl.zeros([BQ], dtype=tl.float32)"]
        loop = loop_head(self.ranges, self.text, "k")
        end = ["", "n_rows = B.to(tl.int64) * H * L"] if edit is not None else [""]
        end += ["tl.store(delta + i_row + o_q, b_delta, mask=m_q)"] if edit is None else []
        for g in groups:
            end += [f"tl.store({_of_group('masses', g)} + o_q, b_m{g}, mask=m_q)"]
            end += [f"tl.store({_of_group('totals', g)} + o_q, b_t{g}, mask=m_q)"]
        head = self.head_of([*self.tile_lines(), ""])
        return [*head, *sums, *loop, *indented([*self.keys(), *self.loads.each, *step]), *end]


class _OfQueries(_OfRows):
    """The gradient of q, one program a tile of queries of one head."""

    name = "softmax_bwd_queries_kernel"
    adds = True

    def own(self) -> list[Argument]:
        edit = self.spec.edit is not None
        output = [] if self.kernel.sums_rows else ["o"]
        names = ["q", "k", "v", "do", *output, "dq", "lse", "delta"]
        args = self.tensors(*names, *(["factors", "offsets"] if edit else []))
        mine = [g for g in self.gradients if g.place != "key"]
        return args + [_argument(n, g) for n, g in enumerate(self.gradients) if g in mine]

    def body(self) -> list[str]:
        state = ["b_dq = tl.zeros([BQ, BD], dtype=tl.float32)"]
        step = [*self.score(), *self.weights(), *self.edited(), *self.scores_gradient()]
        end = [""]
        for n, g in enumerate(self.gradients):
            if g.place == "query":
                state += [f"b_g{n} = tl.zeros([BQ], dtype=tl.float32)"]
                step += [f"b_g{n} += tl.sum({self.of_read(g)}, 1)"]
                end += [f"tl.store(g{n} + i_row + o_q, b_g{n}, mask=m_q)"]
            elif g.place == "pair":
                value = self.of_read(g)
                self.text(g.read)
                offsets = self.loads.offsets(g.read)
                step += ["m_pair = m_keep & m_q[:, None]"]
                step += [f"tl.atomic_add(g{n} + {offsets}, {value}, mask=m_pair)"]
        step += [self.dot_of(self.of_products, "b_k", "b_dq")]
        loop = loop_head(self.ranges, self.text, "k")
        end += self.times_scale("b_dq")
        end += self.store("dq", "i_h", "o_q", f"m_q[:, None]{self.m_d}")
        head = self.head_of([*self.tile_lines(), *self._delta(), *self.of_edit(), ""])
        return [*head, *state, *loop, *indented([*self.keys(), *self.loads.each, *step]), *end]

    def _delta(self) -> list[str]:
        """The mean gradient of each row's weights: the product of the output and its gradient,
        which the other kernel will read, where no kernel has added it up."""
        if self.kernel.sums_rows:
            return self.row("delta", "delta + i_row")
        gives_nan = self.spec.masked == "nan" and not self.spec.is_unmasked
        return [
            pointer("o", "i_h", "o_e[None, :]"),
            load("o", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_e}"),
            "b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)",
            *(['b_delta = tl.where(b_lse == float("inf"), 0.0, b_delta)'] if gives_nan else []),
            "tl.store(delta + i_row + o_q, b_delta, mask=m_q)",
        ]


class _OfKeys(_Kernel):
    """The gradients of k and v, one program a tile of keys of one head of theirs."""

    name = "softmax_bwd_keys_kernel"
    layout = KEYS
    axis = "q"

    @property
    def tile(self) -> Tile:
        return self.kernel.tiles.keys

    @property
    def ranges(self) -> tuple[KeyRange, ...]:
        return query_ranges(self.spec.mask)

    def own(self) -> list[Argument]:
        edit = self.spec.edit is not None
        args = self.tensors("q", "k", "v", "do", "dk", "dv", "lse", "delta")
        args = args if not edit else [*args, *self.tensors("factors", "offsets")]
        mine = [g for g in self.gradients if g.place == "key"]
        return args + [_argument(n, g) for n, g in enumerate(self.gradients) if g in mine]

    def body(self) -> list[str]:
        rows = "o_q.to(tl.int64)[:, None]"
        each = [
            "# [BQ, BD], [BQ, BE]",
            load("q", rows, f"m_q[:, None]{self.m_d}"),
            load("do", rows, f"m_q[:, None]{self.m_e}"),
            "# [BQ]",
            *self.of_queries(),
            *self.row("delta", "delta + i_row"),
            *self.of_edit(),
        ]
        score, weights, edited = self.score(), self.weights(), self.edited()
        used = "b_p" if self.spec.edit is None else "(b_p * b_w)"
        used = f"tl.where(m_kept, {used}, 0.0)" if self.spec.dropout else used
        values = self.dot_of(used, "b_do", "b_dv")
        step = [*score, *weights, *edited, values, *self.scores_gradient()]
        state, stores = [], []
        for n, g in enumerate(self.gradients):
            if g.place == "key":
                state += [f"b_g{n} = tl.zeros([BK], dtype=tl.float32)"]
                step += [f"b_g{n} += tl.sum({self.of_read(g)}, 1)"]
                at = f"g{n} + i_bh.to(tl.int64) * M + o_k"
                stores += [f"tl.store({at}, b_g{n}, mask=m_k)"]
        step += [self.dot_of(self.of_products, "b_q", "b_dk")]
        # the bounds know no head, so that their lines may stand before the loop over heads
        *bounds, loop = loop_head(self.ranges, self.text, "q")
        inner = [*loop_step(self.ranges, "q"), *each, *self.loads.each, *step]
        heads = [
            "i_h = i_g * G + i_n",
            "i_bh = i_b * H + i_h",
            "i_row = i_bh.to(tl.int64) * L",
            pointer("q", "i_h", "o_d[None, :]"),
            pointer("do", "i_h", "o_e[None, :]"),
            *self.loads.head,
            *state,
            loop,
            *indented(inner),
            *stores,
        ]
        return [
            *self.head_of([*self._tile_lines(), ""]),
            "b_dk = tl.zeros([BK, BD], dtype=tl.float32)",
            "b_dv = tl.zeros([BK, BE], dtype=tl.float32)",
            *bounds,
            "for i_n in range(0, G):",
            *indented(heads),
            "",
            *self.times_scale("b_dk"),
            *([f"b_dv = b_dv * {1.0 / (1.0 - rate)!r}"] if (rate := self.spec.dropout) else []),
            *self.store("dk", "i_g", "o_k", f"m_k[:, None]{self.m_d}"),
            *self.store("dv", "i_g", "o_k", f"m_k[:, None]{self.m_e}"),
        ]

    def _tile_lines(self) -> list[str]:
        return [
            "# one program a tile of keys of one head of k and v",
            "i_t = tl.program_id(0)",
            "n_t = tl.cdiv(M, BK)",
            "i_bg, n_g = i_t // n_t, H // G",
            "i_b, i_g = i_bg // n_g, i_bg % n_g",
            "i_k = i_t % n_t * BK  # the first key",
            "o_k = i_k + tl.arange(0, BK)",
            *self.columns(),
            "m_k = o_k < M",
            pointer("k", "i_g", "o_d[None, :]"),
            pointer("v", "i_g", "o_e[None, :]"),
            "# [BK, BD], [BK, BE]",
            load("k", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_d}"),
            load("v", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_e}"),
        ]


def _of_group(name: str, group: int) -> str:
    """The row of a group in a tensor `[groups, B, H, L]`."""
    skip = {0: "", 1: " + n_rows"}.get(group, f" + {group} * n_rows")
    return f"{name}{skip} + i_row"


def _argument(number: int, gradient: ReadGradient) -> Argument:
    return Argument(f"g{number}", "tensor", f"g:{number}")


# --- the file -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def backward_source(kernel: BackwardSpec) -> Source:
    """The file of the kernels.

    Raises:
        LoweringError: if a formula, or a derivative of one, has no rule in Triton.
    """
    spec = kernel.spec
    if spec.route is not None:
        raise LoweringError("the kernels for gradients have no routes")
    kinds: list[type[_Kernel]] = [_OfQueries, _OfKeys]
    if kernel.sums_rows:
        kinds.insert(0, _OfRows)
    written = []
    for kind in kinds:
        writer = kind(kernel)
        function, body = writer.function()
        written.append(Written(function, body, writer.loads.helpers))
    return file_of("softmax_bwd", _header(kernel), written)


def _header(kernel: BackwardSpec) -> list[str]:
    """The docstring of the file."""
    d, e = kernel.head_dim, kernel.value_dim
    lines = [
        "Softmax attention, gradients; generated by rewriter from its spec.\n",
        f"    {kernel.spec}\n",
        f"q, dq [B, H, L, {d}], k, dk [B, H / G, M, {d}], v, dv [B, H / G, M, {e}], "
        f"o, do [B, H, L, {e}]: {kernel.dtype}.",
        "lse, delta [B, H, L]: logarithm of the denominators, and mean gradient of the weights; "
        "float32.",
    ]
    for n, g in enumerate(read_gradients(kernel.lowered[0], kernel.wanted)):
        shape = {"query": "[B, H, L]", "key": "[B, H, M]", "pair": "as it is"}[g.place]
        lines.append(f"g{n}, {shape}: gradient of {sym.formula_text(g.read)}, float32.")
    return lines
