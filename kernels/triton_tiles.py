"""How large the tiles of a kernel are: by head dim, dtype, formula, number of queries and GPU.

Chosen so that nothing spills, which the tests compile for; no GPU has timed them. A GPU newer than
the table takes the rows of the newest one in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rewriter import symbols as sym
from rewriter.kernels.triton_backward_code import BackwardTiles
from rewriter.kernels.triton_codegen import Dtype, Tile
from rewriter.kernels.triton_sums import sums_of_edit
from rewriter.spec import SoftmaxSpec

__all__ = ["FEW", "backward_tiles_for", "tile_for"]

_Weight = Literal["light", "medium", "heavy"]

_HALF: dict[int, dict[int, dict[_Weight, Tile]]] = {
    80: {
        64: {
            "light": Tile(128, 64, 4, 2),
            "medium": Tile(64, 64, 4, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
        128: {
            "light": Tile(128, 32, 8, 2),
            "medium": Tile(128, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
        256: {
            "light": Tile(64, 32, 8, 2),
            "medium": Tile(64, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
    },
    90: {
        64: {
            "light": Tile(128, 64, 4, 2),
            "medium": Tile(64, 64, 4, 2),
            "heavy": Tile(64, 32, 4, 2),
        },
        128: {
            "light": Tile(128, 64, 8, 2),
            "medium": Tile(128, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
        256: {
            "light": Tile(64, 32, 8, 2),
            "medium": Tile(64, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
    },
    100: {
        64: {
            "light": Tile(128, 64, 8, 2),
            "medium": Tile(64, 64, 4, 2),
            "heavy": Tile(64, 32, 4, 2),
        },
        128: {
            "light": Tile(128, 64, 8, 2),
            "medium": Tile(128, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
        256: {
            "light": Tile(64, 32, 8, 2),
            "medium": Tile(64, 32, 8, 2),
            "heavy": Tile(64, 32, 8, 2),
        },
    },
}
"""Compute capability (times ten) -> largest head dim -> weight of the formulas -> tile, for float16
and bfloat16."""

_EDITED: dict[int, dict[int, Tile]] = {
    2: {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    3: {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 32, 8, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 32, 8, 2)},
}
"""Most sums of values that a row has -> largest head dim -> tile, for float16 and bfloat16 on every
GPU, where weights are edited by groups of keys."""

_FULL: dict[int, Tile] = {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)}
"""The same for float32, whose products run without tensor cores."""

_EDITED_FULL = {64: Tile(32, 16, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 8, 1)}
"""For several sums of values a row, in float32."""

FEW = 16
"""Up to so many queries, as in decoding, one tile holds all of them."""
_FEW_TILE = {
    "float32": Tile(16, 16, 4, 1),
    "float16": Tile(16, 64, 4, 2),
    "bfloat16": Tile(16, 64, 4, 2),
}
_EDITED_FEW_TILE = {
    "float32": Tile(16, 16, 8, 1),
    "float16": Tile(16, 32, 8, 2),
    "bfloat16": Tile(16, 32, 8, 2),
}
"""The same for several sums of values a row."""


def tile_for(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: Dtype, q_len: int, capability: int
) -> Tile:
    """The tile for a call.

    Args:
        spec: what is computed; a formula needs registers too.
        head_dim: D, at most 256.
        value_dim: Dv, at most 256.
        dtype: of q, k and v.
        q_len: L.
        capability: compute capability times ten, 80 for an A100, 90 for an H100.
    """
    sums = 1 if spec.edit is None else len(sums_of_edit(spec.edit, dtype))
    if q_len <= FEW:
        return (_FEW_TILE if sums == 1 else _EDITED_FEW_TILE)[dtype]
    limit = min(x for x in _FULL if max(head_dim, value_dim) <= x)
    if dtype == "float32":
        return (_FULL if sums == 1 else _EDITED_FULL)[limit]
    if sums > 1:
        return _EDITED[min(n for n in _EDITED if sums <= n)][limit]
    rows = _HALF[max((c for c in _HALF if c <= capability), default=min(_HALF))]
    return rows[limit][_weight(spec)]


_HALF_BACKWARD: dict[bool, dict[int, BackwardTiles]] = {
    False: {
        64: BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: BackwardTiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
        256: BackwardTiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    True: {
        64: BackwardTiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: BackwardTiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)),
        256: BackwardTiles(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
}
"""Whether formulas are heavy -> largest head dim -> tiles of the kernels for gradients, for float16
and bfloat16."""
_BLACKWELL_KEYS = Tile(32, 64, 8, 1)
"""The tile of keys for head dims of 65 to 128 and light formulas from sm_100 on."""
_FULL_BACKWARD: dict[int, BackwardTiles] = {
    64: BackwardTiles(Tile(32, 16, 4, 1), Tile(16, 32, 8, 1)),
    128: BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    256: BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
"""The same for float32."""


def backward_tiles_for(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: Dtype, capability: int
) -> BackwardTiles:
    """The tiles of the kernels for gradients; see `tile_for`."""
    limit = min(x for x in _FULL if max(head_dim, value_dim) <= x)
    if dtype == "float32":
        return _FULL_BACKWARD[limit]
    heavy = spec.edit is not None or _weight(spec) == "heavy"
    tiles = _HALF_BACKWARD[heavy][limit]
    if capability >= 100 and limit == 128 and not heavy:
        return replace(tiles, keys=_BLACKWELL_KEYS)
    return tiles


def _weight(spec: SoftmaxSpec) -> _Weight:
    """How many registers the formulas take: most where each query and key has an address."""
    reads = sym.reads(spec.score) | sym.reads(spec.mask)
    if any(r.has(sym.q) and r.has(sym.k) for r in reads):
        return "heavy"
    return "light" if spec.is_plain_score and spec.edit is None else "medium"
