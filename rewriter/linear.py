"""Linear attention as a value: a feature map of queries and keys, a decay, a normaliser.

    w(q, k) = decay from k to q · query_weight · key_weight · φ(q) · φ(k)      for keys that q sees

The products are computed without scores: a state `Σ φ(k) v` of fixed size runs along the keys. The
parallel, the chunkwise and the recurrent form are one function (Lightning Attention-2, arXiv
2401.04658, in the end-of-block convention: the state after a key is the state that decoding
needs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean, BooleanTrue

from rewriter import symbols as sym
from rewriter.errors import SpecError
from rewriter.spec import Spec, TensorArg, ending, stages_from_dict, stages_to_dict
from rewriter.stages import Patch
from rewriter.symbols import Formula, decode, encode, formula_text

__all__ = ["Features", "LinearSpec", "Map", "Near", "Norm"]

Map = Literal["identity", "silu", "relu", "elu", "exp"]
MAPS: tuple[Map, ...] = ("identity", "silu", "relu", "elu", "exp")
Norm = Literal["none", "sum", "rms"]
NORMS: tuple[Norm, ...] = ("none", "sum", "rms")

POSITIVE: tuple[Map, ...] = ("relu", "elu", "exp")
"""Maps whose features are never negative, so that a sum of products can be divided by."""

EPS_SUM = 1e-12
EPS_RMS = 1e-6
VERSION = 1


@dataclass(frozen=True)
class Features:
    """φ of rows x `[B, H, N, D]`, in float32: `map(y)` with `y = x W + b`.

    `identity`: y. `silu`: y sigmoid(y). `relu`: max(y, 0). `elu`: 1 + ELU(y). `exp`: the two halves
    `[exp(y - max y), exp(min y - y)]`, the extremes over the features of the row. Of the last three
    no feature is below 1e-12.
    """

    map: Map = "identity"
    weight: str = ""
    """Name of a tensor `[H, D, P]` with a matrix for each head of x; none: y = x."""
    bias: str = ""
    """Name of a tensor `[H, P]`."""

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise SpecError(f"there is no feature map {self.map!r}; one of {', '.join(MAPS)}")
        if self.bias and not self.weight:
            raise SpecError("a feature map has a bias only beside a weight")

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    def text(self, of: str) -> str:
        inside = of + (f" {self.weight}" if self.weight else "")
        inside += f" + {self.bias}" if self.bias else ""
        return inside if self.map == "identity" else f"{self.map}({inside})"


@dataclass(frozen=True)
class Near:
    """Keys near a query that keep their softmax weights beside the linear ones of the others, over
    one common denominator (LoLCATs, arXiv 2410.10254, sliding form):

        y = (Σ_near f e^(z - c) v + Σ_far w v) / (Σ_near f e^(z - c) + Σ_far w),  c = max of z near

    A window that holds every key is the softmax itself, whatever the factor f.
    """

    window: int
    """Keys that are near, the query's own included, counted among those that are `seen`."""
    scale: Expr = Integer(1)
    """`s = scale · (q_row · k_row)`, as in a softmax spec."""
    score: Expr = sym.s
    """z, in s, indices and reads."""
    factor: Expr = Integer(1)
    """f, in h and reads; positive."""


@dataclass(frozen=True)
class LinearSpec(Spec):
    """Linear attention: `heads · norm( Σ_k w(q, k) v )`."""

    family: ClassVar[str] = "linear"

    q_map: Features = Features()
    k_map: Features = Features()
    position: Expr | None = None
    """Where query q stands on the key axis, `q` plus something that does not depend on q: it sees
    the keys up to there. None: it sees all of them."""
    seen: Boolean = sympy.true
    """Keys that take part, in b, h, k and reads. One that does not adds nothing to the state, and
    does not make it decay either: padding counts for nothing."""
    decay: Expr = Integer(0)
    """What the state is multiplied by at each key, as a logarithm <= 0, in h. Without a position it
    is 0."""
    query_weight: Expr = Integer(1)
    """In b, h, q and reads."""
    key_weight: Expr = Integer(1)
    """In b, h, k and reads."""
    norm: Norm = "none"
    """`"sum"`: divided by `Σ_k w(q, k) + 1e-12`; `"rms"`: by the root of the mean square over the
    features of all heads of a token, + 1e-6 under the root (SRMSNorm, arXiv 2405.17381)."""
    near: Near | None = None
    heads: Expr = Integer(1)
    tensors: tuple[TensorArg, ...] = ()
    sizes: tuple[str, ...] = ()
    active: int | None = None
    patch: Patch | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise SpecError(f"norm is {self.norm!r}; it is one of {', '.join(NORMS)}")
        if self.position is None and (self.decay != 0 or self.near is not None):
            raise SpecError("a decay or a window needs positions")
        if self.near is not None and self.norm != "sum":
            raise SpecError("softmax weights and linear ones are added over one sum: norm='sum'")
        if self.decay.has(sym.q, sym.k, sym.s):
            raise SpecError(f"the decay may differ between heads only, got {self.decay}")
        self._check_reads()

    @property
    def formulas(self) -> tuple[Formula, ...]:
        position = () if self.position is None else (self.position,)
        n = self.near
        near = () if n is None else (n.scale, n.score, n.factor)
        patch = () if self.patch is None else (self.patch.where,)
        weights = (self.decay, self.query_weight, self.key_weight)
        return (*position, self.seen, *weights, *near, self.heads, *patch)

    @property
    def whole(self) -> tuple[str, ...]:
        return (*super().whole, *self.q_map.tensors, *self.k_map.tensors)

    @property
    def is_causal(self) -> bool:
        return self.position is not None

    @property
    def kept(self) -> tuple[Any, ...]:
        window = 0 if self.near is None else self.near.window
        return (self.family, self.k_map, self.decay, self.key_weight, self.norm, window)

    def __str__(self) -> str:
        truths = self.truths
        text = f"{self.q_map.text('q')} · {self.k_map.text('k')}"
        for weight in (self.query_weight, self.key_weight):
            if weight != 1:
                text = f"{formula_text(weight, truths)}·{text}"
        if self.decay != 0:
            distance = cast(Expr, self.position) - sym.k
            text = f"exp({formula_text(self.decay * distance, truths)})·{text}"
        terms = [] if self.position is None else [sym.k <= self.position]
        terms += [] if isinstance(self.seen, BooleanTrue) else [self.seen]
        if terms:
            text += f" | {formula_text(sympy.And(*terms), truths)}"
        if self.near is not None:
            near = formula_text(self.near.score, truths)
            factor = "" if self.near.factor == 1 else f"{formula_text(self.near.factor, truths)}·"
            text += f" ; {factor}exp({near}) of the last {self.near.window}"
        norm = {"none": "", "sum": " / sum", "rms": " / rms"}[self.norm]
        text = f"linear( {text} ) · v{norm}{ending(self)}"
        if self.near is not None and self.near.scale != 1:
            text += f", s = {formula_text(self.near.scale * Symbol('q·k'), truths)}"
        return text if self.heads == 1 else f"{formula_text(self.heads, truths)} · {text}"

    # --- JSON -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        near = self.near
        return {
            "family": self.family,
            "version": VERSION,
            "q_map": [self.q_map.map, self.q_map.weight, self.q_map.bias],
            "k_map": [self.k_map.map, self.k_map.weight, self.k_map.bias],
            "position": None if self.position is None else encode(self.position),
            "seen": encode(self.seen),
            "decay": encode(self.decay),
            "query_weight": encode(self.query_weight),
            "key_weight": encode(self.key_weight),
            "norm": self.norm,
            "near": None
            if near is None
            else [near.window, encode(near.scale), encode(near.score), encode(near.factor)],
            "heads": encode(self.heads),
            "tensors": [[t.name, t.dtype, t.rank] for t in self.tensors],
            "sizes": list(self.sizes),
        } | stages_to_dict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LinearSpec:
        """The spec that `to_dict` wrote.

        Raises:
            SpecError: if the data is of another family or version, or not a spec.
        """

        def expr(name: str) -> Expr:
            return cast(Expr, decode(data[name]))

        try:
            if data["family"] != "linear" or data["version"] != VERSION:
                got = f"{data['family']} {data['version']}"
                raise SpecError(f"a linear spec of version {VERSION} was expected, got {got}")
            near = data["near"]
            return LinearSpec(
                q_map=Features(*data["q_map"]),
                k_map=Features(*data["k_map"]),
                position=None if data["position"] is None else expr("position"),
                seen=cast(Boolean, decode(data["seen"])),
                decay=expr("decay"),
                query_weight=expr("query_weight"),
                key_weight=expr("key_weight"),
                norm=data["norm"],
                near=None
                if near is None
                else Near(int(near[0]), *(cast(Expr, decode(x)) for x in near[1:])),
                heads=expr("heads"),
                tensors=tuple(TensorArg(str(n), str(d), int(r)) for n, d, r in data["tensors"]),
                sizes=tuple(str(n) for n in data["sizes"]),
                **stages_from_dict(data),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"not a linear spec: {error}") from error
