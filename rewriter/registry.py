"""The passes that ship with rewriter. A new one is added to `PASSES`, by hand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rewriter.errors import PassError
from rewriter.passbase import Pass, Request, parse_request
from rewriter.passes.fuse import Fuse
from rewriter.passes.heads import HeadAblate, HeadGate, HeadPatch, HeadScale
from rewriter.passes.linear import FeatureMaps, Lightning, WindowTail
from rewriter.passes.moh import MixtureOfHeads
from rewriter.passes.routed import BiFormer, MoBA
from rewriter.passes.sinks import LearnedSinks, RedirectSinks, RemoveSinks
from rewriter.passes.sinks_visual import RedistributeVisual
from rewriter.passes.sparse import SlidingWindow

__all__ = ["PASSES", "find", "read_requests"]

PASSES: tuple[type[Pass], ...] = (
    Fuse,
    SlidingWindow,
    HeadScale,
    HeadAblate,
    HeadGate,
    HeadPatch,
    MixtureOfHeads,
    Lightning,
    FeatureMaps,
    WindowTail,
    MoBA,
    BiFormer,
    RemoveSinks,
    RedirectSinks,
    LearnedSinks,
    RedistributeVisual,
)


def find(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        PassError: there is none; the text lists those that exist, a similar one first.
    """
    names = {kind.name: kind for kind in PASSES}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise PassError(f"there is no pass called {name!r}{hint} (passes: {', '.join(names)})")


def read_requests(passes: Iterable[str | Pass | Request]) -> tuple[Request, ...]:
    """Requests from their texts; a pass that was made in Python is meant for every site.

    Raises:
        PassError, SelectorError: as `parse_request`, for the first text that cannot be read.
    """
    import sys

    found = []
    for item in passes:
        if isinstance(item, str):
            found.append(parse_request(item, sys.modules[__name__]))
        elif isinstance(item, Request | Pass):
            found.append(item if isinstance(item, Request) else Request(item))
        else:
            raise PassError(f"a pass is a text such as 'fuse @ 4-7' or a Pass, got {item!r}")
    return tuple(found)
