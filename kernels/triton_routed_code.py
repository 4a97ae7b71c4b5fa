"""The text of the Triton kernel of routed softmax attention: each tile of queries has a list of
blocks of keys, and goes through their keys in one pass of the online softmax.

The body is that of `triton_skeleton`, whose scores, masks, sinks and ends stay as they are: other
are the loop over keys, where a tile finds its queries and keys, and what a query has not chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy

from rewriter.kernels.triton_codegen import KernelSpec, header_of
from rewriter.kernels.triton_lines import constant_lines, load, pointer
from rewriter.kernels.triton_ranges import KeyRange
from rewriter.kernels.triton_skeleton import Skeleton
from rewriter.kernels.triton_source import Argument, Function, Source, file_text, function_text
from rewriter.reference_routes import key_terms
from rewriter.stages import Route

__all__ = ["RoutedKernel", "block_of", "routed_source"]

KERNEL = "routed_fwd_kernel"


@dataclass(frozen=True)
class RoutedKernel:
    """Everything that changes the text of the kernel; equal ones give equal text."""

    base: KernelSpec

    @property
    def route(self) -> Route:
        assert self.base.spec.route is not None
        return self.base.spec.route

    @property
    def has_places(self) -> bool:
        """Where the keys of a block are stands in a table: they are no neighbours."""
        return self.route.by == "region" or key_terms(self.base.spec.mask) != sympy.true


def block_of(route: Route) -> int:
    """Keys of a block: of one of the route, or of a region."""
    return route.block if route.by == "query" else route.region[0] * route.region[1]


@lru_cache(maxsize=1024)
def routed_source(kernel: RoutedKernel) -> Source:
    """The file of the kernel.

    Raises:
        LoweringError: if a formula uses what has no rule in Triton.
    """
    skeleton = _Routed(kernel)
    body = skeleton.body()  # first: printing formulas finds out what has to be handed over
    tile, blocks = kernel.base.tile, tuple(skeleton.blocks())
    function = Function(KERNEL, skeleton.arguments(), blocks, tile.warps, tile.stages)
    text = function_text(function, body, helpers=skeleton.loads.helpers)
    header = [*header_of(kernel.base), *skeleton.header()]
    return Source("routed_fwd", file_text(header, constant_lines(body), [text]), (function,))


class _Routed(Skeleton):
    """Writes the lines of the kernel."""

    taken = ("pair", "place")

    def __init__(self, kernel: RoutedKernel) -> None:
        super().__init__(kernel.base)
        self.routed, self.by_query = kernel, kernel.route.by == "query"
        self.numbers += "TCS" if kernel.has_places else "T"
        self.entry = 1 + -(-kernel.base.tile.queries // 32)
        """Numbers of an entry of the list, if queries choose for themselves: a block, and bits."""
        self.is_open = self.masked == "none"
        if self.is_open and self.by_query:
            self.masked = "zero"  # a query does not see the blocks that others of its tile chose
        self.pivots = True  # the first keys that are visited may all be hidden
        self.ranges = (KeyRange(high=(sympy.Integer(0),)),)  # some keys are not visited

    def header(self) -> list[str]:
        """What the lists mean."""
        lines = [
            "first [tiles + 1]: where the blocks of each tile of queries begin in `block`, int32."
        ]
        if self.by_query:
            lines.append(
                f"block [pairs, {self.entry}]: each block of keys that some query of a tile sees,"
            )
            lines.append(
                "ascending, and a bit for each query of the tile, 1 where it sees it; int32."
            )
        else:
            lines.append("block [pairs]: the blocks of keys that a tile sees, ascending, int32.")
        width = block_of(self.routed.route)
        if self.routed.has_places:
            lines.append(f"place [Y, C, {width}]: the keys of each block, int32; -1: none.")
        else:
            lines.append(f"Block c holds the keys from {width} c on.")
        if not self.by_query:
            lines.append("row [T, BQ]: the queries of each tile of a head, int32; -1: none.")
        return lines

    def own(self) -> list[Argument]:
        names = ["first", "block"]
        names += ["place"] if self.routed.has_places else []
        names += [] if self.by_query else ["row"]
        return [*super().own(), *(Argument(n, "tensor", n) for n in names)]

    def blocks(self) -> list[tuple[str, int]]:
        return [*super().blocks(), ("W", block_of(self.routed.route))]

    def _tile(self) -> list[str]:
        rows = [
            "i_q = i_t % T * BQ  # the first query",
            "o_r = tl.arange(0, BQ)",
            "o_q = i_q + o_r",
            "m_q = o_q < L",
        ]
        if not self.by_query:
            rows = ["o_q = tl.load(row + i_t % T * BQ + tl.arange(0, BQ))", "m_q = o_q >= 0"]
        keys = []
        if self.routed.has_places:
            keys = ["p_place = place + (i_bh // S).to(tl.int64) * C * W"]
        return [
            "# one program a tile of queries of one head",
            "i_t = tl.program_id(0)",
            "i_bh = i_t // T",
            "i_b, i_h = i_bh // H, i_bh % H",
            "i_g = i_h // G  # the head of k and v",
            *rows,
            "o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)",
            *(["m_d = o_d < D"] if self.m_d else []),
            *(["m_e = o_e < E"] if self.m_e else []),
            pointer("q", "i_h", "o_d[None, :]"),
            pointer("k", "i_g", "o_d[None, :]"),
            pointer("v", "i_g", "o_e[None, :]"),
            *keys,
            "# [BQ, BD]",
            load("q", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{self.m_d}"),
            "",
        ]

    def _loop(self) -> list[str]:
        return [
            "# the keys of the listed blocks, BK at a time",
            "n_p = tl.cdiv(W, BK)  # parts of a block",
            "i_first, i_end = tl.load(first + i_t), tl.load(first + i_t + 1)",
            "for i_j in range(i_first * n_p, i_end * n_p):",
        ]

    def _keys(self) -> list[str]:
        lines = ["i_c = tl.load(block + i_j // n_p)"]
        if self.by_query:
            lines = [f"p_pair = block + i_j // n_p * {self.entry}", "i_c = tl.load(p_pair)"]
        lines.append("o_w = i_j % n_p * BK + tl.arange(0, BK)")
        if self.routed.has_places:
            lines.append("o_k = tl.load(p_place + i_c * W + o_w, mask=o_w < W, other=-1)")
            lines.append("m_k = o_k >= 0")
        else:
            lines += ["o_k = i_c * W + o_w", "m_k = (o_w < W) & (o_k < M)"]
        if self.by_query:
            lines.append("m_c = (tl.load(p_pair + 1 + o_r // 32) >> o_r % 32 & 1) != 0")
        return lines

    def _mask(self) -> list[str]:
        lines = super()._mask()
        if not self.by_query:
            return lines
        mask = "" if self.is_open else f" & ({self.loads.text(self.spec.mask)})"
        return [f"m_s = m_c[:, None]{mask}", *lines[1:]]
