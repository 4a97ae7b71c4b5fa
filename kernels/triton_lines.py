"""What every generated kernel has: the lines that find and load q, k, v and o, and those of a loop
over keys or queries; sizes of tiles; constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rewriter.kernels.triton_ranges import KeyRange
from rewriter.symbols import Formula

__all__ = [
    "LOG2E",
    "RAISE",
    "constant_lines",
    "indented",
    "load",
    "loop_head",
    "loop_step",
    "padded",
    "pointer",
]

LOG2E = 1.4426950408889634
RAISE = 32768.0
"""In float16 a weight of 1e-7 would be 0, and a factor may make it count: weights that are edited
are multiplied by this before they are rounded. The largest weight is 1, so that none overflows."""
_CONSTANTS = {"LOG2E": LOG2E, "MIN": -3.4028234663852886e38, "RAISE": RAISE}


def constant_lines(body: Iterable[str]) -> list[str]:
    """The module constants that the lines of a kernel use."""
    lines = list(body)
    used = [name for name in _CONSTANTS if any(name in line for line in lines)]
    return [f"{name} = tl.constexpr({_CONSTANTS[name]})" for name in used]


def padded(dim: int) -> int:
    """The size of a tile that holds `dim` numbers: a power of two that the tensor cores take."""
    return max(16, 1 << (dim - 1).bit_length())


def pointer(name: str, head: str, columns: str, last: str = "d") -> str:
    """The line with the pointers to the columns of the first row of a head.

    Args:
        columns: as they stand in a tile, `o_d[None, :]`.
        last: what the stride of the columns is called.
    """
    start = f"i_b.to(tl.int64) * stride_{name}_b + {head}.to(tl.int64) * stride_{name}_h"
    return f"p_{name} = {name} + {start} + {columns} * stride_{name}_{last}"


def load(name: str, rows: str, mask: str) -> str:
    """The line that loads a tile of q, k or v; rows as they stand in it."""
    pointer = f"p_{name} + {rows} * stride_{name}_l"
    return f"b_{name} = tl.load({pointer}, mask={mask}, other=0.0)"


def loop_head(
    ranges: Sequence[KeyRange], text: Callable[[Formula], str], axis: Literal["k", "q"]
) -> list[str]:
    """The head of a loop over tiles of keys, or of queries, and the lines before it.

    Args:
        ranges: one, or two of which the first begins at 0.
        text: prints a bound.
    """
    size, tile = {"k": ("M", "BK"), "q": ("L", "BQ")}[axis]
    bounds = [([text(x) for x in r.low], [text(x) for x in r.high]) for r in ranges]
    low, high = bounds[-1]
    at_least, at_most = _nested("maximum", ["0", *low]), _nested("minimum", [size, *high])
    if len(bounds) == 1:
        lines = [f"{axis}_low = {at_least} // {tile} * {tile}"] if low else []
        lines += [f"{axis}_high = {at_most}"] if high else []
        start, stop = f"{axis}_low" if low else "0", f"{axis}_high" if high else size
        return [*lines, f"for i_{axis} in range({start}, {stop}, {tile}):"]
    first = _nested("minimum", [size, *bounds[0][1]])
    names = ("key tiles: from the first key, and near the queries", "query tiles")
    return [
        f"# two runs of {names[axis == 'q']}",
        f"n_first = tl.cdiv(tl.maximum({first}, 0), {tile})",
        f"n_low = tl.maximum({at_least} // {tile}, n_first)",
        f"n_high = tl.maximum(tl.cdiv({at_most}, {tile}), n_low)",
        "for i_j in range(0, n_first + n_high - n_low):",
    ]


def loop_step(ranges: Sequence[KeyRange], axis: Literal["k", "q"]) -> list[str]:
    """The keys or queries of one step of the loop; `i_k` or `i_q` is the first."""
    size, tile = {"k": ("M", "BK"), "q": ("L", "BQ")}[axis]
    jump = f"i_{axis} = (i_j + tl.where(i_j < n_first, 0, n_low - n_first)) * {tile}"
    lines = [jump] if len(ranges) == 2 else []
    return [*lines, f"o_{axis} = i_{axis} + tl.arange(0, {tile})", f"m_{axis} = o_{axis} < {size}"]


def _nested(function: str, parts: list[str]) -> str:
    """`tl.maximum` or `tl.minimum` of all parts."""
    result = parts[0]
    for part in parts[1:]:
        result = f"tl.{function}({result}, {part})"
    return result


def indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]
