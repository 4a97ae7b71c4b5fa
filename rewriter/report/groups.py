"""Sites that are alike, as one line: the layers of a model mostly differ in their number alone."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from rewriter.errors import SpecError
from rewriter.sites import Site
from rewriter.spec import Spec

if TYPE_CHECKING:
    from rewriter.report.report import SiteReport

__all__ = ["SiteGroup", "groups_of", "ranges"]

_WHERE = ("path", "layer", "formula", "after_formula", "digest_before", "digest_after")
"""What differs between sites that are alike, or follows from what is compared."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites of one graph that are alike in everything but the numbers in their paths and the names
    of the tensors that they read."""

    sites: tuple[SiteReport, ...]
    """In the order of the graph; at least one."""

    @property
    def first(self) -> SiteReport:
        """The site that stands for all of them."""
        return self.sites[0]

    @property
    def layers(self) -> str:
        """Their layer numbers: `"0-11"`, `"0, 2, …, 22"`; `""` if they have none."""
        return ranges(s.site.layer for s in self.sites if s.site.layer is not None)

    @property
    def path(self) -> str:
        """Their path: `"model.layers.*.self_attn"`, where `*` is the layer. Other numbers that
        differ are named, `"stages.{0-2}"`, if every combination is there; else they are `*` too."""
        sites = [s.site for s in self.sites]
        if len({site.path for site in sites}) == 1:
            return sites[0].name
        columns = list(zip(*(site.path.split(".") for site in sites), strict=True))
        layers = [str(site.layer) for site in sites]
        moving = {i: {*column} for i, column in enumerate(columns) if len({*column}) > 1}
        all_there = math.prod(len(x) for x in moving.values()) == len({*zip(*columns, strict=True)})
        parts = [column[0] for column in columns]
        for i, values in moving.items():
            named = all_there and [*columns[i]] != layers
            parts[i] = f"{{{ranges(map(int, values))}}}" if named else "*"
        return replace(sites[0], path=".".join(parts)).name

    @property
    def origins(self) -> tuple[tuple[str, str], ...]:
        """Where their tensors come from: `Site.origins` under the names that the first site has,
        with `*` for numbers that differ."""
        columns = zip(*(s.site.origins for s in self.sites), strict=True)
        return tuple((column[0][0], _merged([where for _, where in column])) for column in columns)

    def said(self, text: str) -> str:
        """What is said of the first site, as it is true of all of them."""
        site = self.first.site
        return text if self.path == site.name else _named(text, site, self.path)


def groups_of(sites: Iterable[SiteReport]) -> tuple[SiteGroup, ...]:
    """The sites in groups, in the order of the first of each."""
    found: dict[str, list[SiteReport]] = {}
    for line in sites:
        try:
            key = _key(line)
        except SpecError:  # a formula that JSON cannot hold is like no other
            key = f"site {len(found)}"
        found.setdefault(key, []).append(line)
    return tuple(SiteGroup(tuple(group)) for group in found.values())


def ranges(numbers: Iterable[int]) -> str:
    """The numbers in short: `"0-3, 7"`; more than four at one distance are `"0, 2, …, 8"`."""
    left = sorted(set(numbers))
    steps = {y - x for x, y in itertools.pairwise(left)}
    if len(left) > 4 and len(steps) == 1 and steps != {1}:
        return f"{left[0]}, {left[1]}, …, {left[-1]}"
    texts: list[str] = []
    while left:
        run = 1
        while run < len(left) and left[run] == left[0] + run:
            run += 1
        texts += [f"{left[0]}-{left[run - 1]}"] if run > 1 else [str(left[0])]
        left = left[run:]
    return ", ".join(texts)


def _key(line: SiteReport) -> str:
    """Equal for sites that are alike: all that is known of them, without where they stand."""
    site, data = line.site, line.to_dict()
    data = {name: value for name, value in data.items() if name not in _WHERE}
    names = _short_names(site.spec)
    data["spec"] = _renamed(data["spec"], names)
    data["after"] = _renamed(data["after"], _short_names(line.after))
    data["origins"] = [[names.get(n, n), _starred(where)] for n, where in site.origins]
    data["where"] = _starred(site.path)
    data["lengths"] = [site.q_len, site.kv_len]
    for told in ("why", "reason", "notes"):
        texts = [data[told]] if isinstance(data[told], str) else data[told]
        data[told] = [_named(t, site, "*") for t in texts]
    return json.dumps(data, sort_keys=True, default=str)


def _starred(text: str) -> str:
    """The text with the numbers left out that are a part of a path."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|(?<![\w.])\d+(?=\.)", "*", text)


def _merged(texts: Sequence[str]) -> str:
    """One text for several that differ in numbers alone."""
    columns = zip(*(re.split(r"(\d+)", text) for text in texts), strict=True)
    return "".join(column[0] if len({*column}) == 1 else "*" for column in columns)


def _named(text: str, site: Site, name: str) -> str:
    """The text with another name for the site's path."""
    if not site.path:
        return text
    return re.sub(rf"(?<![\w.]){re.escape(site.path)}(?!\w)", lambda _: name, text)


def _short_names(spec: Spec | None) -> dict[str, str]:
    return {} if spec is None else {t.name: f"tensor {i}" for i, t in enumerate(spec.tensors)}


_NAMED = {"patch": ("tensor",), "local": ("weight", "bias")}


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """A spec as JSON values, its tensors under other names."""
    if data is None or not names:
        return data
    found = {field: _renamed_reads(value, names) for field, value in data.items()}
    found["tensors"] = [[names[n], *rest] for n, *rest in data["tensors"]]
    for field in ("q_map", "k_map"):
        if field in data:
            found[field] = [data[field][0], *(names.get(n, n) for n in data[field][1:])]
    for stage, fields in _NAMED.items():
        if stage in data:
            found[stage] |= {f: names[data[stage][f]] for f in fields}
    return found


def _renamed_reads(data: Any, names: dict[str, str]) -> Any:
    if isinstance(data, dict):
        return {field: _renamed_reads(value, names) for field, value in data.items()}
    if not isinstance(data, list):
        return data
    if data[:1] == ["read"]:
        tensor, *index = cast("Sequence[Any]", data[1:])
        return ["read", names.get(tensor, tensor), *(_renamed_reads(i, names) for i in index)]
    return [_renamed_reads(x, names) for x in data]
