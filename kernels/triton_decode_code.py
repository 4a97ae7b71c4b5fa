"""The text of the Triton kernels for few queries and many keys, as in a step of decoding.

One program has the queries of all heads that share keys, so that these are read once, and a run of
keys; what it has of each row's maximum and sums goes to memory, and a second kernel puts the runs
together. Sinks, factors of an edit and what follows the product are part of the second kernel
alone, so that each counts once. With a single run the first kernel does all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from rewriter.kernels.triton_codegen import KernelSpec, header_of
from rewriter.kernels.triton_lines import indented, load, pointer
from rewriter.kernels.triton_loads import PACKED
from rewriter.kernels.triton_ranges import KeyRange
from rewriter.kernels.triton_skeleton import Skeleton
from rewriter.kernels.triton_source import (
    Argument,
    Function,
    Source,
    Written,
    arguments_of,
    file_of,
)

__all__ = ["COMBINE", "DECODE", "DecodeSpec", "decode_source", "parts_of"]

DECODE, COMBINE = "softmax_decode_kernel", "softmax_combine_kernel"
_FEW = 16
"""Queries of a head at most."""
_ROWS = "n_rows = n_s.to(tl.int64) * B * H * L"


@dataclass(frozen=True)
class DecodeSpec:
    """Everything that changes the text of the kernels; equal ones give equal text."""

    base: KernelSpec
    """Its tile holds the queries of all heads that share keys."""
    split: bool
    """Keys are split into runs."""


@dataclass(frozen=True)
class Parts:
    """What a program leaves of its run, besides the maximum of each row."""

    sums: tuple[str, ...]
    """`[B, H, L]` each."""
    values: tuple[str, ...]
    """`[B, H, L, BE]` each."""
    block: int
    """BE."""

    @property
    def is_several(self) -> bool:
        return len(self.sums) > 1 or len(self.values) > 1


def parts_of(kernel: DecodeSpec) -> Parts:
    """What the first kernel writes and the second reads."""
    return _parts(_Decode(kernel))


def _parts(skeleton: Skeleton) -> Parts:
    seen = ("m_seen",) if skeleton.counts_seen else ()
    sums = ("b_l", *skeleton.sums.masses, *seen)
    return Parts(sums, tuple(skeleton.sums.names), skeleton.block_e)


class _Decode(Skeleton):
    """The kernel of one run."""

    numbers = "BHGLM"
    layout = PACKED
    taken = ("s", "x", "c", "h", "row", "rows", "run", "maxima", "sums", "parts", "bg")

    def __init__(self, kernel: DecodeSpec) -> None:
        spec = kernel.base.spec
        base = replace(kernel.base, spec=replace(spec, sink=None)) if kernel.split else kernel.base
        super().__init__(base)
        self.split = kernel.split
        if self.split:
            self.ranges = (KeyRange(),)  # the last of few queries sees nearly all
            self.pivots = True

    def own(self) -> list[Argument]:
        args = super().own()
        if not self.split:
            return args
        kept = [a for a in args if a.of != "o"]
        parts = [Argument(n, "tensor", n) for n in ("maxima", "sums", "parts")]
        return [*kept, *parts, Argument("n_run", "size", "n_run"), Argument("n_s", "size", "n_s")]

    def _tile(self) -> list[str]:
        run = ["i_s = i_t // (B * n_g)"] if self.split else []
        return [
            "# one program a run of keys, and the queries of all heads that share them"
            if self.split
            else "# one program the queries of all heads that share keys",
            "i_t, n_g = tl.program_id(0), H // G",
            *run,
            "i_bg = i_t % (B * n_g)",
            "i_b, i_g = i_bg // n_g, i_bg % n_g",
            "o_c = tl.minimum(tl.arange(0, BQ), G * L - 1)  # rows behind the last repeat it",
            "m_row = tl.arange(0, BQ) < G * L",
            "o_h, o_q = i_g * G + o_c // L, o_c % L",
            "m_q = o_q < L",
            "o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)",
            *(["m_d = o_d < D"] if self.m_d else []),
            *(["m_e = o_e < E"] if self.m_e else []),
            pointer("q", "o_h[:, None]", "o_d[None, :]"),
            pointer("k", "i_g", "o_d[None, :]"),
            pointer("v", "i_g", "o_e[None, :]"),
            "# [BQ, BD]",
            load("q", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_d}"),
            "",
        ]

    def _loop(self) -> list[str]:
        if not self.split:
            return super()._loop()
        end = "tl.minimum(i_s * n_run + n_run, M)"
        return [f"for i_k in range(i_s * n_run, {end}, BK):"]

    def _end(self) -> list[str]:
        return self._parts_out() if self.split else super()._end()

    def _store(self) -> list[str]:
        return [
            pointer("o", "o_h[:, None]", "o_e[None, :]"),
            "p_o += o_q.to(tl.int64)[:, None] * stride_o_l",
            f"tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_row[:, None]{self.m_e})",
        ]

    def _parts_out(self) -> list[str]:
        """The stores of what the run has of each row."""
        parts = _parts(self)
        lines = [
            "",
            "# what the run has of each row",
            *([_ROWS] if parts.is_several else []),
            "o_row = ((i_s.to(tl.int64) * B + i_b) * H + o_h) * L + o_q",
            "tl.store(maxima + o_row, b_m, mask=m_row)",
        ]
        for n, name in enumerate(parts.sums):
            value = f"{name}.to(tl.float32)" if name == "m_seen" else name
            lines.append(f"tl.store(sums + {_at(n)}o_row, {value}, mask=m_row)")
        for n, name in enumerate(parts.values):
            at = f"{_rows(n)}[:, None] * BE + o_e[None, :]"
            lines.append(f"tl.store(parts + {at}, {name}, mask=m_row[:, None])")
        return lines


class _Combine(Skeleton):
    """The kernel that puts the runs together, one program a head."""

    numbers = "BHL"
    taken = _Decode.taken

    def __init__(self, kernel: DecodeSpec) -> None:
        super().__init__(kernel.base)
        self.ranges = (KeyRange(),)

    def own(self) -> list[Argument]:
        args = [a for a in super().own() if a.of == "o"]
        parts = [Argument(n, "tensor", n) for n in ("maxima", "sums", "parts")]
        return [*args, *parts, Argument("n_s", "size", "n_s")]

    def arguments(self) -> tuple[Argument, ...]:
        spec = self.spec
        formulas = [spec.heads, *(() if spec.edit is None else spec.edit.factors)]
        formulas += [] if spec.sink is None else [spec.sink]
        return arguments_of(spec, formulas, self.loads, self.own(), self.numbers)

    def blocks(self) -> list[tuple[str, int]]:
        sizes = dict(super().blocks()) | {"BQ": _FEW}
        return [(n, x) for n, x in sizes.items() if n in ("BQ", "BE", "E")]

    def body(self) -> list[str]:
        state, end = self._state(), self._end()
        reads = ["# what the formulas read", *self.loads.once, ""] if self.loads.once else []
        return [*self._tile(), *reads, *state, *self._runs(), *end]

    def _tile(self) -> list[str]:
        return [
            "# one program the queries of one head",
            "i_bh = tl.program_id(0)",
            "i_b, i_h = i_bh // H, i_bh % H",
            "o_q = tl.arange(0, BQ)",
            "o_e = tl.arange(0, BE)",
            "m_q = o_q < L",
            *(["m_e = o_e < E"] if self.m_e else []),
            *([_ROWS] if _parts(self).is_several else []),
            "",
        ]

    def _runs(self) -> list[str]:
        """The loop over runs: an online softmax over what each has."""
        exp, parts = "tl.exp2" if self.base2 else "tl.exp", _parts(self)
        step = [
            "o_row = ((i_s.to(tl.int64) * B + i_b) * H + i_h) * L + o_q",
            'b_x = tl.load(maxima + o_row, mask=m_q, other=float("-inf"))',
            "b_n = tl.maximum(b_m, b_x)",
            "# finite also while a row has seen nothing",
            'b_z = tl.where(b_n == float("-inf"), 0.0, b_n)',
            f"b_r, b_c = {exp}(b_m - b_z), {exp}(b_x - b_z)",
        ]
        for n, name in enumerate(parts.sums):
            value = f"tl.load(sums + {_at(n)}o_row, mask=m_q, other=0.0)"
            if name == "m_seen":
                step.append(f"m_seen = tl.maximum(m_seen, {value}.to(tl.int32))")
            else:
                step.append(f"{name} = {name} * b_r + {value} * b_c")
        for n, name in enumerate(parts.values):
            at = f"{_rows(n)}[:, None] * BE + o_e[None, :]"
            value = f"tl.load(parts + {at}, mask=m_q[:, None], other=0.0)"
            step.append(f"{name} = {name} * b_r[:, None] + {value} * b_c[:, None]")
        # an index as Triton has it, which the interpreter's plain integers are not
        jump = "i_s = i_j + tl.zeros([1], dtype=tl.int32)"
        return ["for i_j in range(0, n_s):", *indented([jump, *step, "b_m = b_n"])]


def _at(number: int) -> str:
    """Where the rows of a sum begin."""
    return {0: "", 1: "n_rows + "}.get(number, f"{number} * n_rows + ")


def _rows(number: int) -> str:
    return f"({_at(number)}o_row)" if number else "o_row"


@lru_cache(maxsize=1024)
def decode_source(kernel: DecodeSpec) -> Source:
    """The file of the kernel, or of both.

    Raises:
        LoweringError: if a formula uses what has no rule in Triton.
    """
    names: list[tuple[str, type[Skeleton]]] = [(DECODE, _Decode)]
    names += [(COMBINE, _Combine)] if kernel.split else []
    written = []
    for name, kind in names:
        skeleton = kind(kernel)  # type: ignore[arg-type]
        body, tile = skeleton.body(), kernel.base.tile
        blocks = tuple(skeleton.blocks())
        function = Function(name, skeleton.arguments(), blocks, tile.warps, tile.stages)
        written.append(Written(function, body, skeleton.loads.helpers))
    return file_of("softmax_decode", header_of(kernel.base, "few queries"), written)
