"""The optional stages of an attention, each a frozen value: a route, an edit and a local term of
softmax attention, a patch of any; and how a tensor is computed that the model does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import sympy
from sympy import Expr
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.errors import SpecError
from rewriter.symbols import decode, encode, formula_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Edit", "Local", "Parameter", "Patch", "Route", "Source", "Tap"]


# --- tensors that a pass adds ---------------------------------------------------------------------

Tap = Literal["input", "residual", "q", "k", "v", "labels", "patch"]
"""What a program may read of a site.

`"input"`: what feeds the projection of the queries, `[B, L, C]`;
`"residual"`: the hidden state that enters the layer, before its norm, `[B, L, C]`;
`"q"`, `"k"`, `"v"`: the operands `[B, H, L, D]`;
`"labels"`: what the user gives of each key of the prompt, int64 `[B, M]`;
`"patch"`: head outputs that the user gives, `[B, H, L, Dv]`."""


@dataclass(frozen=True)
class Parameter:
    """A new parameter of the model, in the dtype of the queries of its site."""

    name: str
    shape: tuple[int, ...]
    initial: float | Literal["eye", "kaiming"] = 0.0
    """A number fills it; `"eye"`: ones on the diagonal of the last two dimensions; `"kaiming"`:
    uniform in ±1 / sqrt of the dimension before the last."""
    trained: bool = True
    """False for a buffer."""


@dataclass(frozen=True)
class Source:
    """A program beside the attention: how a tensor is computed from taps and new parameters."""

    compute: Callable[..., Tensor]
    """`compute(*taps, *parameters, **options)`, in plain torch, differentiable where it should
    be."""
    taps: tuple[Tap, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    loss: Callable[..., Tensor] | None = None
    """With the same arguments: a scalar that is to be added to the training loss."""
    later: int | None = None
    """For a tensor `[B, M]` of keys that is decided once, by the prompt: the value of every key
    that comes after it. Such a tensor is kept beside the KV cache. None: computed anew in each
    call."""


# --- stage 4 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """Blocks of keys that are chosen at run time by their mean key; the choice has no gradient.

    `by="query"` (MoBA, arXiv 2502.13189): each query and head chooses for itself. Block c holds the
    keys number `c · block` to `(c + 1) · block - 1` among those that the mask shows to any query
    (its terms without q): padding counts for nothing. The block of the query's own position is
    always seen and counts as one of `topk`; later blocks are never seen; of the earlier ones those
    with the largest `q · mean(keys)` are, in float32, q unscaled, ties to the earlier block.

    `by="region"` (bi-level routing, arXiv 2303.08810): the tokens after the first `extra` form a
    grid of `grid` = (rows, columns), cut into regions of `ceil(rows / regions)` by
    `ceil(columns / regions)` tokens. All queries of a region and all heads choose together: the
    `topk` regions with the largest product of mean queries and mean keys, summed over the heads.
    The first `extra` keys are always seen, and the first `extra` queries see every key.

    A query that sees at most `dense_below` keys sees all of them. Everything that the mask hides
    stays hidden.
    """

    by: Literal["query", "region"]
    topk: int
    block: int = 0
    position: Expr = field(default=sym.q + sym.M - sym.L)
    """Where query q stands on the key axis."""
    grid: tuple[int, int] = (0, 0)
    regions: int = 0
    extra: int = 0
    dense_below: int = 0

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise SpecError(f"topk is {self.topk}; at least one block is chosen")
        if self.by == "query" and self.block < 1:
            raise SpecError(f"block is {self.block}; a block has at least one key")
        if self.by == "region" and (min(self.grid) < 1 or self.regions < 1):
            raise SpecError(f"grid {self.grid} cannot be cut into {self.regions} regions a side")

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of a region."""
        return -(-self.grid[0] // self.regions), -(-self.grid[1] // self.regions)

    @property
    def region_counts(self) -> tuple[int, int]:
        """Regions along the rows and the columns of the grid; fewer than `regions` where rounding
        up leaves the last ones empty."""
        return -(-self.grid[0] // self.region[0]), -(-self.grid[1] // self.region[1])

    def __str__(self) -> str:
        rest = f", dense up to {self.dense_below} keys" if self.dense_below else ""
        if self.by == "query":
            return f"top {self.topk} blocks of {self.block}{rest}"
        rows, columns = self.region
        more = f" and the first {self.extra} keys" if self.extra else ""
        return f"top {self.topk} regions of {rows} × {columns}{more}{rest}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "topk": self.topk,
            "block": self.block,
            "position": encode(self.position),
            "grid": list(self.grid),
            "regions": self.regions,
            "extra": self.extra,
            "dense_below": self.dense_below,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Route:
        rows, columns = data["grid"]
        position = cast(Expr, decode(data["position"]))
        return Route(**{**data, "position": position, "grid": (int(rows), int(columns))})


# --- stage 7 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """Weights are multiplied by a factor of the key's group: `p'_j = a_g p_j` with `g = group(j)`.

    Before dropout. The normal form of `remove`, `redirect`, VAR, ACT and GIFT; its backward is
    closed (`d s_j = p_j (u_j - Δ)`), so nothing of size L x M is kept.
    """

    group: Expr
    """The group of a key, 0 to `len(factors) - 1`, in b, h, k and reads."""
    factors: tuple[Expr, ...]
    """The factor of each group, in b, h, q, reads, and the masses `m0, m1, ...` that the groups of
    the row have before the edit."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.factors) <= len(sym.masses):
            raise SpecError(f"{len(self.factors)} groups; there are 1 to {len(sym.masses)}")
        if self.group.has(sym.q, sym.s, *sym.masses):
            raise SpecError(f"the group of a key may not depend on the query: {self.group}")

    @property
    def formulas(self) -> tuple[Expr, ...]:
        return (self.group, *self.factors)

    def text(self, truths: Sequence[str] = ()) -> str:
        """`×(a0 | a1 ...) by group`, as part of a formula."""
        factors = ", ".join(formula_text(a, truths) for a in self.factors)
        return f"times ({factors})[{formula_text(self.group, truths)}]"

    def to_dict(self) -> dict[str, Any]:
        return {"group": encode(self.group), "factors": [encode(a) for a in self.factors]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Edit:
        factors = tuple(cast(Expr, decode(a)) for a in data["factors"])
        return Edit(cast(Expr, decode(data["group"])), factors)


# --- what happens to the output -------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """Rows of the output that are replaced: `T[b, h, q, :]` where `where` holds."""

    tensor: str
    """Name of a tensor `[B, Hq, L, Dv]`."""
    where: Boolean = field(default=sympy.true)
    """In b, h, q and reads."""

    def to_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "where": encode(self.where)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Patch:
        return Patch(str(data["tensor"]), cast(Boolean, decode(data["where"])))


@dataclass(frozen=True)
class Local:
    """A depthwise convolution of the values over the token grid, added to the output (the local
    context enhancement of arXiv 2303.08810): zero padding, the first `extra` tokens left out."""

    weight: str
    """Name of a tensor `[Hq · Dv, 1, n, n]`, n odd."""
    bias: str
    """Name of a tensor `[Hq · Dv]`."""
    grid: tuple[int, int]
    extra: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "bias": self.bias,
            "grid": list(self.grid),
            "extra": self.extra,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Local:
        rows, columns = data["grid"]
        return Local(str(data["weight"]), str(data["bias"]), (rows, columns), int(data["extra"]))
