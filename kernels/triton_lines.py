"""What every generated kernel has: the lines that find and load q, k, v and o; sizes of tiles."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["indented", "load", "padded", "pointer"]


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


def indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]
