"""Which sites, and which heads of them, a request speaks of: the text after `@`.

    @ 4-7             layers 4, 5, 6 and 7          @ even, @ odd     every second layer
    @ 4-              layer 4 and all later ones    @ path=encoder    paths in which the regular
    @ -1              the last layer                                  expression is found
    @ 0,3,5           these layers                  @ heads=0,3       only these heads

Terms combine, and all of them have to hold: `@ 2-9 heads=1` and `@ 2-9 @ heads=1` are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewriter.errors import SelectorError

if TYPE_CHECKING:
    from rewriter.sites import Site

__all__ = ["Indices", "Selector"]

_RANGE = re.compile(r"(-?\d{1,9})(?:(-)(-?\d{1,9})?)?")
_TERM = re.compile(
    r"""\s*(?:@\s*)*                                  # terms may repeat the sign
        (?: (?P<key>path|heads)\s*=\s* )?
        (?P<value> "[^"]*" | '[^']*'
          | \[[^\]]*\]
          | [^\s,@]+ (?:\s*,\s*(?=[-\d])[^\s,@]+)* ) # "0, 3" is one value
        \s*""",
    re.VERBOSE,
)
_HELP = "write layers as 4-7, 4-, -1, 0,3 or even, and path=REGEX or heads=0,3"


@dataclass(frozen=True)
class Indices:
    """Integers from 0 to `count - 1`, described before `count` is known; -1 is the last one."""

    ranges: tuple[tuple[int, int | None], ...] = ()
    """First and last, both included; a last of None is the end."""
    parity: int | None = None
    """0 for even, 1 for odd."""

    @staticmethod
    def parse(text: str) -> Indices:
        """Reads `4-7`, `4-`, `-1`, `0,3,5`, `even` or `odd`.

        Raises:
            SelectorError: if the text is none of these.
        """
        if text in ("even", "odd"):
            return Indices(parity=int(text == "odd"))
        ranges = []
        for part in text.strip("[]").split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None:
                raise SelectorError(f"selector {text!r} cannot be read; {_HELP}")
            first = int(match[1])
            last = int(match[3]) if match[3] else None if match[2] else first
            if last is not None and last < first and (last < 0) == (first < 0):
                raise SelectorError(f"selector {text!r}: the range {part.strip()} is empty")
            ranges.append((first, last))
        return Indices(tuple(ranges))

    @property
    def text(self) -> str:
        if self.parity is not None:
            return ("even", "odd")[self.parity]
        return ",".join(
            f"{a}" if a == z else f"{a}-" if z is None else f"{a}-{z}" for a, z in self.ranges
        )

    def resolve(self, count: int) -> tuple[int, ...]:
        """The indices below `count`, in ascending order."""
        if self.parity is not None:
            return tuple(range(self.parity, count, 2))
        found: set[int] = set()
        for first, last in self.ranges:
            start = first % count if -count <= first < 0 else first
            stop = count - 1 if last is None else last + count if last < 0 else last
            found |= (
                set(range(max(start, 0), min(stop, count - 1) + 1)) if first >= -count else set()
            )
        return tuple(sorted(found))

    def outside(self, count: int) -> tuple[int, ...]:
        """The integers that the text names and that do not exist, in the order of the text."""
        named = (n for pair in self.ranges for n in dict.fromkeys(pair) if n is not None)
        return tuple(n for n in named if not -count <= n < count)


@dataclass(frozen=True)
class Selector:
    """Conditions on a site, all of which have to hold; an empty one holds for every site."""

    layers: Indices | None = None
    path: str | None = None
    """A regular expression that is searched in the path or in the name of the site."""
    heads: Indices | None = None
    """Not a condition: the heads to which the pass is limited."""

    @staticmethod
    def parse(text: str) -> Selector:
        """Reads what follows the first `@`; an empty text selects everything.

        Raises:
            SelectorError: if the text cannot be read, or gives a condition twice.
        """
        found: dict[str, str] = {}
        position = 0
        while position < len(text):
            match = _TERM.match(text, position)
            if match is None:
                raise SelectorError(f"selector {text.strip()!r} cannot be read; {_HELP}")
            key, position = match["key"] or "layers", match.end()
            if key in found:
                raise SelectorError(f"selector {text.strip()!r} gives {key} twice")
            found[key] = match["value"].strip("\"'") if key == "path" else match["value"]
        layers = Indices.parse(found["layers"]) if "layers" in found else None
        heads = Indices.parse(found["heads"]) if "heads" in found else None
        if "path" in found:
            try:
                re.compile(found["path"])
            except re.error as error:
                raise SelectorError(
                    f"selector path={found['path']} is not a regular expression: {error}"
                ) from None
        return Selector(layers, found.get("path"), heads)

    @property
    def text(self) -> str:
        """Canonical text without the leading `@`; empty if every site is selected."""
        terms = [] if self.layers is None else [self.layers.text]
        if self.path is not None:
            quote = "'" if '"' in self.path else '"'
            plain = re.fullmatch(r"[^\s@\"',\[\]]+", self.path)
            terms.append(f"path={self.path}" if plain else f"path={quote}{self.path}{quote}")
        if self.heads is not None:
            terms.append(f"heads={self.heads.text}")
        return " ".join(terms)

    def matches(self, site: Site, layer_count: int) -> bool:
        """The site is selected. `layer_count` is one more than the largest layer of the model."""
        if self.layers is not None and (
            site.layer is None or site.layer not in self.layers.resolve(layer_count)
        ):
            return False
        if self.path is None:
            return True
        return any(re.search(self.path, text) for text in (site.path, site.name))
