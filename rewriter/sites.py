"""Sites: the places where a graph computes attention, described without a graph node in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rewriter.spec import SoftmaxSpec

__all__ = ["RELATIVES", "Kind", "Site"]

Kind = Literal[
    "attention",
    # relatives of attention
    "channel",
    "sampling",
    "product",
    "linear",
    "recurrence",
    "gate",
    # softmaxes that are for something else
    "pooling",
    "router",
    "pointer",
    "draw",
    "unknown",
]
"""What a place computes. Only `attention` is ever rewritten.

channel: attention among channels, not tokens. sampling: the weights of values sampled at places
that a query chooses. product: queries, keys and values under no softmax. linear: the same, keys and
values first. recurrence: a state-space layer or a linear recurrence. gate: squeeze-and-excite and
its kin. pooling: learned scores of tokens, without queries and keys. router: a choice of experts.
pointer: a distribution that is returned. draw: one that is drawn from.
"""

RELATIVES: tuple[Kind, ...] = (
    "channel",
    "sampling",
    "product",
    "linear",
    "recurrence",
    "gate",
)
"""Kinds that are named in a report, and left alone."""


@dataclass(frozen=True)
class Site:
    """One place where a graph computes attention or a relative of it, and what was understood."""

    path: str
    """The module that computes it, `"model.layers.3.self_attn"`; `""` if the graph does not say."""
    layer: int | None
    """The first number in the path."""
    ordinal: int = 0
    """Position among the sites of the same path in one graph."""
    kind: Kind = "attention"
    spec: SoftmaxSpec | None = None
    """What it computes; None if it was not understood."""
    heads: int = 0
    """Query heads; 0 if unknown."""
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    is_cross: bool = False
    """Keys come from another sequence than queries."""
    q_len: int = 0
    """Queries; 0 if that is known only when the graph runs."""
    kv_len: int = 0
    input_dim: int = 0
    """Width of what feeds the projection of the queries; 0 if it was not found in the graph."""
    residual_dim: int = 0
    """Width of the hidden state that enters the layer; 0 if it was not found in the graph."""
    layers: int = 0
    """How many layers the model has; 0 if unknown."""
    origins: tuple[tuple[str, str], ...] = ()
    """Where each tensor that the formulas read comes from: `("slopes", "buffer
    decoder.slopes")`."""
    reason: str = ""
    """Why the site has no spec, or stays as it is although it has one."""
    notes: tuple[str, ...] = ()
    """What a reader should know, such as a mask that could not be read as logic."""

    @property
    def name(self) -> str:
        """The path, with `#1` for the second site of that path."""
        return f"{self.path or '(no module)'}{f'#{self.ordinal}' if self.ordinal else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "layer": self.layer,
            "ordinal": self.ordinal,
            "kind": self.kind,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "is_cross": self.is_cross,
            "formula": str(self.spec) if self.spec is not None else None,
            "spec": self.spec.to_dict() if self.spec is not None else None,
            "origins": dict(self.origins),
            "opaque_reads": len(self.spec.opaque_reads()) if self.spec is not None else 0,
            "reason": self.reason,
            "notes": list(self.notes),
        }
