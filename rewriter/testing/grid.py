"""Which cases the conformance suite runs: a fast choice, and the full grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from rewriter.spec import MASKED
from rewriter.testing.cases import BASES, LAYOUTS, Case, Dims, named
from rewriter.testing.families import grid_of

__all__ = ["DECODING", "Plan", "cases", "extremes", "plan", "sizes_of"]

SIZES = (1, 2, 63, 64, 65, 129)
HEAD_DIMS = (16, 60, 64, 128)
GROUPS = ((4, 4), (3, 1), (6, 2), (8, 1))
"""Query and key heads: 1, 3 and 8 to one."""
UNEQUAL = ((1, 65), (20, 65), (65, 20))
"""Queries and keys; the last one has rows that see no key, where the mask is causal."""
HALVES = (torch.bfloat16, torch.float16)

DECODING = (
    "causal",
    "window",
    "causal padding",
    "documents",
    "soft cap",
    "alibi",
    "cap, then bias",
    "sink",
    "gate",
    "size",
    "routed",
    "routed padding",
    "edit",
    "gated heads",
    "patched",
    "lightning",
    "lightning padding",
    "window tail",
)
"""Bases that are causal, and written so that a call with one query is a step of decoding."""

_NEEDS_EARLIER_KEYS = ("documents", "size")
"""They read the position of a query on the key axis, which has to be there: L is at most M."""


def _small(n: int, m: int | None = None, **more: int) -> Dims:
    return Dims(q_len=n, kv_len=n if m is None else m, **more)


def cases(*, full: bool = False) -> tuple[Case, ...]:
    """The cases at scores of a usual size; no two alike."""
    found = _fast() + (_further() if full else [])
    return tuple(named([c for c in found if _fits(c)]).values())


def _fits(case: Case) -> bool:
    """There are as many tokens as the spec has on a grid, if it has one."""
    size = grid_of(case.spec)
    return not size or case.dims.q_len == case.dims.kv_len == size


def _fast() -> list[Case]:
    of = Case.of
    found = [of(name, _small(n)) for name in ("plain", "causal") for n in SIZES]
    found += [of("plain", _small(65, 17))]
    found += [of("causal", _small(*sizes)) for sizes in UNEQUAL]
    found += [of("causal from the start", _small(20, 65))]
    found += [of("causal", _small(17, head_dim=d, value_dim=d)) for d in HEAD_DIMS]
    found += [of("causal", _small(17, head_dim=d, value_dim=e)) for d, e in ((64, 16), (16, 60))]
    found += [of("causal", _small(17, heads=n, kv_heads=m)) for n, m in GROUPS]
    for name in BASES:
        found += [of(name, _small(65)), of(name, _small(1, 65))]
    for masked in MASKED:
        found += [
            of("padding", _small(17), masked=masked, hidden="all"),
            of("causal padding", _small(33), masked=masked, hidden="left"),
            of("sink", _small(33, 17), masked=masked),
        ]
    for name in ("causal", "soft cap", "alibi", "causal padding", "sink"):
        found += [of(name, _small(33), dtype=dtype) for dtype in HALVES]
    for name in ("routed", "edit", "lightning"):
        found += [of(name, _small(33), dtype=torch.bfloat16)]
    for layout in LAYOUTS[1:]:
        found += [of(name, _small(33), layout=layout) for name in ("causal", "padding")]
    for name in ("routed padding", "edit, cap, sink", "lightning padding", "window tail"):
        found += [of(name, _small(20, 65), hidden="left"), of(name, _small(17), hidden="all")]
        found += [of(name, _small(33), layout=LAYOUTS[1])]
    return [*found, of("gated heads", _LONG), of("gated padding", _LONG, hidden="left")]


_LONG = Dims(batch=1, heads=8, kv_heads=4, q_len=520, kv_len=520)
"""From 2 million scores on, the work of heads that are off is left out."""


def _further() -> list[Case]:
    of, found = Case.of, []
    for name in BASES:
        found += [of(name, _small(n)) for n in SIZES]
        found += [
            of(name, _small(*sizes))
            for sizes in UNEQUAL
            if sizes[0] <= sizes[1] or name not in _NEEDS_EARLIER_KEYS
        ]
        found += [
            of(name, _small(n, heads=heads, kv_heads=kv)) for n in (2, 63) for heads, kv in GROUPS
        ]
        found += [
            of(name, _small(65, head_dim=d, value_dim=d), dtype=dtype)
            for d in HEAD_DIMS
            for dtype in (torch.float32, *HALVES)
        ]
        found += [of(name, _small(33, 40), layout=layout) for layout in LAYOUTS]
    for name in ("padding", "causal padding", "sink, padding", "buckets"):
        found += [
            of(name, _small(n, m), masked=masked, hidden=hidden, dtype=dtype)
            for masked in MASKED
            for hidden in ("left", "right", "all")
            for n, m in ((65, 65), (20, 65), (1, 64))
            for dtype in (torch.float32, torch.bfloat16)
        ]
    found += [
        of("causal", _small(65, 20), masked=masked, dtype=dtype)
        for masked in MASKED
        for dtype in (torch.float32, *HALVES)
    ]
    # long enough for blocks of queries to be cut
    found += [of(name, _small(300, batch=1, heads=8, kv_heads=2)) for name in BASES]
    return found


def extremes(*, full: bool = False) -> tuple[Case, ...]:
    """Cases whose scores are as large as ±1e4, and such of ±30.

    At 1e4 one key has all the weight: the gradients of q and k are what rounding leaves of them.
    At 30 they are bounded too.
    """
    names = tuple(BASES) if full else ("plain", "causal", "causal padding", "soft cap", "sink")
    found = [Case.of(name, _small(33), logits=1e4) for name in names]
    found += [replace(c, dtype=d) for c in found[:2] for d in HALVES]
    found += [Case.of("padding", _small(17), masked=m, hidden="all", logits=1e4) for m in MASKED]
    found += [Case.of(name, _small(33), logits=30.0) for name in names]
    found += [Case.of(name, _small(33), logits=30.0) for name in _MORE_EXTREMES]
    return tuple(named([c for c in found if _fits(c)]).values())


_MORE_EXTREMES = ("routed", "edit", "window tail")


def sizes_of(case: Case, *, few: bool = False) -> tuple[Case, ...]:
    """The same spec at further sizes, large and small in turn."""
    pairs: tuple[tuple[int, int], ...] = (
        (65, 65),
        (1, 1),
        (1, 66),
        (129, 129),
        (2, 2),
        (20, 65),
        (64, 64),
    )
    if few:
        pairs = ((20, 20), (1, 1), (1, 21), (2, 2), (17, 40))
    found = (replace(case, dims=replace(case.dims, q_len=n, kv_len=m)) for n, m in pairs)
    return tuple(c for c in found if _fits(c))


# --- what one lowering is put through -------------------------------------------------------------

Cost = Literal["call", "interpreter", "export"]
"""What a case costs: milliseconds; tenths of a second a call; seconds a spec."""


@dataclass(frozen=True)
class Plan:
    """The work of `check_lowering`."""

    cases: tuple[Case, ...]
    extremes: tuple[Case, ...]
    repeated: tuple[str, ...]
    """Bases that are called twice with the same, and at sizes that follow each other."""
    decoding: tuple[str, ...]
    steps: int
    """How many queries are decoded one by one."""
    laws: tuple[str, ...] | None = None
    """Names of laws; None for all of them."""
    gradients: bool = True
    few_sizes: bool = False

    def on(self, device: str) -> Plan:
        """The same work with tensors on another device."""
        found, far = (
            tuple(replace(c, device=device) for c in x) for x in (self.cases, self.extremes)
        )
        return replace(self, cases=found, extremes=far)


def plan(cost: Cost, *, full: bool = False) -> Plan:
    """What a lowering of that cost is put through."""
    repeated = ("causal", "causal padding", "alibi", "sink", "relative bias")
    if cost == "call":
        some = (*(repeated if full else repeated[:2]), "routed", "window tail")
        return Plan(cases(full=full), extremes(full=full), some, DECODING, 33 if full else 9)
    if cost == "interpreter" and full:
        # every sixth case of the grid, which is in the order of its specs
        grid = [c for c in _further() if c.dims.q_len <= SIZES[-1]]
        found = tuple(named([c for c in (*_fast(), *grid[::6]) if _fits(c)]).values())
        return Plan(found, extremes(), repeated, DECODING, 9, few_sizes=True)
    if cost == "interpreter":
        two = ("future", "batch")
        return Plan(_few(), extremes()[1:4], repeated[:1], ("alibi",), 5, two, False, True)
    if full:
        return Plan(_few(), extremes(), repeated, repeated[:4], 9, few_sizes=True)
    found = tuple(
        Case.of(name, _small(n, m))
        for name in ("buckets", "sink, padding")
        for n, m in ((17, 40), (1, 33))
    )
    return Plan(found, (), ("sink, padding",), (), 0, (), False, True)


def _few() -> tuple[Case, ...]:
    """Each base once at a size of two blocks, and what is likely to break."""
    of = Case.of
    found = [of(name, _small(17, 40, batch=1)) for name in BASES]
    found += [of(name, Dims(batch=1)) for name in BASES if grid_of(BASES[name])]
    found += [of(name, _small(1, 33, batch=1)) for name in ("causal", "gate")]
    found += [of("causal padding", _small(20), masked=m, hidden="left") for m in MASKED]
    found += [of("padding", _small(5), masked=m, hidden="all") for m in MASKED]
    found += [of("causal", _small(5, heads=n, kv_heads=m, batch=1)) for n, m in GROUPS[1:]]
    found += [of("causal", _small(20, batch=1), layout=layout) for layout in LAYOUTS[1:]]
    found += [of("causal", _small(5, head_dim=d, value_dim=d)) for d in HEAD_DIMS[1:]]
    found += [of("causal", _small(17), dtype=dtype) for dtype in HALVES]
    return tuple(named([c for c in found if _fits(c)]).values())
