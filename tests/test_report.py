"""The report: sites that are alike in one row, masks in words, and the page with its pictures."""

from __future__ import annotations

import html.parser
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from rich.console import Console
from sympy import Abs, And, Eq, Expr, Integer, Ne, Or, Symbol
from sympy.logic.boolalg import Boolean
from torch import nn

import rewriter
from rewriter import LinearSpec, Report, Site, SiteReport, SoftmaxSpec, TensorArg
from rewriter.errors import InputError
from rewriter.report import SiteGroup
from rewriter.report.grid import grid_of
from rewriter.report.groups import ranges
from rewriter.report.positions import position_words
from rewriter.report.words import mask_words
from rewriter.stages import Route
from rewriter.symbols import IDiv, IMod, L, M, Minimum, Read, Where, b, h, k, q, s, size_symbol
from rewriter.testing import strategies

CAUSAL = k <= q
n0 = size_symbol("n0")


def read(name: str, *index: Any) -> Read:
    return Read(Symbol(name), *index)


def spec(mask: Boolean = CAUSAL, score: Expr = s, **options: Any) -> SoftmaxSpec:
    """A spec with the tensors that it reads, each of as many dimensions as it is read at."""
    reads = {r.tensor: len(r.index) for f in (mask, score) for r in f.atoms(Read)}
    tensors = tuple(TensorArg(n, "int64", rank) for n, rank in sorted(reads.items()))
    return SoftmaxSpec(mask=mask, score=score, tensors=tensors, **options)


def line(layer: int = 0, what: SoftmaxSpec | None = None, **changes: Any) -> SiteReport:
    """The report of a rewritten site; changes are fields of the site, or of its report."""
    what = spec() if what is None else what
    site = Site(
        path=f"model.layers.{layer}.attn",
        layer=layer,
        spec=what,
        heads=8,
        kv_heads=2,
        head_dim=64,
        value_dim=64,
    )
    told = SiteReport(site, 0, what, "rewritten", "torch.blocked", "", ("fuse",))
    of_site = {n: x for n, x in changes.items() if n in vars(site) and n != "reason"}
    of_report = {n: x for n, x in changes.items() if n not in of_site}
    return replace(told, site=replace(site, **of_site), **of_report)


def report_of(*lines: SiteReport, **options: Any) -> Report:
    return Report(lines, graphs=1 + max((x.graph for x in lines), default=0), **options)


# --- groups --------------------------------------------------------------------------------------


def test_layers_that_are_alike_are_one_group() -> None:
    report = report_of(*(line(i) for i in range(12)))
    [group] = report.groups
    assert isinstance(group, SiteGroup)
    assert (group.layers, group.path, len(group.sites)) == ("0-11", "model.layers.*.attn", 12)


def test_alternating_layers_are_two_groups() -> None:
    window = spec(CAUSAL & (q - k < 4))
    report = report_of(*(line(i, window if i % 2 else None) for i in range(10)))
    assert [g.layers for g in report.groups] == ["0, 2, …, 8", "1, 3, …, 9"]


def test_the_name_and_the_place_of_a_tensor_make_no_difference() -> None:
    lines = [
        line(
            i,
            spec(score=s + read(name, h)),
            origins=((name, f"parameter model.layers.{i}.attn.slopes"),),
        )
        for i, name in enumerate(("slopes", "slopes_1"))
    ]
    [group] = report_of(*lines).groups
    assert group.origins == (("slopes", "parameter model.layers.*.attn.slopes"),)


def test_a_tensor_that_all_layers_share_keeps_its_name() -> None:
    """The relative bias table of some models is that of their first layer."""
    origins = (("w", "parameter model.layers.0.attn.bias"),)
    [group] = report_of(*(line(i, origins=origins) for i in range(3))).groups
    assert group.origins == origins


def test_tensors_in_other_places_of_a_formula_make_a_difference() -> None:
    """Renaming alone would make the two equal: one hides keys by the first, one by the second."""
    masks = Ne(read("a", b, k), 0) & Ne(read("c", b, q), 0)
    other = Ne(read("c", b, k), 0) & Ne(read("a", b, q), 0)
    assert len(report_of(line(0, spec(masks)), line(1, spec(other))).groups) == 2


UNLIKE: dict[str, dict[str, Any]] = {
    "graph": {"graph": 1},
    "ordinal": {"ordinal": 1},
    "query heads": {"heads": 4},
    "key heads": {"kv_heads": 8},
    "head dimension": {"head_dim": 32},
    "value dimension": {"value_dim": 32},
    "cross": {"is_cross": True},
    "lengths": {"kv_len": 16},
    "formula": {"what": spec(CAUSAL & (q - k < 5))},
    "formula afterwards": {"after": spec(CAUSAL & (q - k < 5))},
    "masked rows": {"what": spec(masked="nan")},
    "decision": {"decision": "kept"},
    "lowering": {"lowering": "triton"},
    "reason": {"reason": "too short"},
    "passes": {"passes": ("fuse", "heads.gate")},
    "notes": {"notes": ("a mask is read as a tensor",)},
    "module": {"path": "model.layers.1.cross"},
    "number in a name": {"path": "model.layers.1.attn2"},
    "origin": {"origins": (("m", "input mask"),)},
}


@pytest.mark.parametrize("changes", UNLIKE.values(), ids=UNLIKE)
def test_sites_that_differ_are_never_one_group(changes: dict[str, Any]) -> None:
    assert len(report_of(line(0), line(1)).groups) == 1
    assert len(report_of(line(0), line(1, **changes)).groups) == 2


def test_reasons_that_differ_in_the_own_path_alone_are_alike() -> None:
    lines = [line(i, reason=f"model.layers.{i}.attn: too short") for i in range(2)]
    [group] = report_of(*lines).groups
    assert group.said(group.first.reason) == "model.layers.*.attn: too short"
    far = [line(i, reason=f"model.layers.{9 - i}.attn: too short") for i in range(2)]
    assert len(report_of(*far).groups) == 2


def test_every_site_is_in_one_group_and_in_the_json() -> None:
    lines = [line(i, path=f"blocks.{i % 3}.attn", heads=2 + 2 * (i % 2)) for i in range(9)]
    report = report_of(*lines)
    assert sorted(map(id, (s for g in report.groups for s in g.sites))) == sorted(map(id, lines))
    assert [s["path"] for s in report.to_dict()["sites"]] == [x.site.path for x in lines]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), ""),
        ((3,), "3"),
        (range(12), "0-11"),
        ((0, 1, 5), "0-1, 5"),
        ((0, 2, 4, 6), "0, 2, 4, 6"),
        (range(0, 24, 2), "0, 2, …, 22"),
        ((0, 1, 2, 4, 5, 6, 9), "0-2, 4-6, 9"),
        ((5, 5, 4), "4-5"),
    ],
)
def test_layer_numbers_in_short(numbers: Any, text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (("h.0.attn", "h.1.attn"), "h.*.attn"),
        (("enc.0.blocks.0.attn", "enc.0.blocks.2.attn"), "enc.0.blocks.{0, 2}.attn"),
        (("enc.0.b.0", "enc.0.b.1", "enc.1.b.0", "enc.1.b.1"), "enc.*.b.{0-1}"),
        (("enc.0.b.0", "enc.1.b.1"), "enc.*.b.*"),
        (("", ""), "(no module)"),
    ],
)
def test_the_path_of_a_group(paths: tuple[str, ...], text: str) -> None:
    def first(path: str) -> int | None:
        return next((int(x) for x in path.split(".") if x.isdigit()), None)

    [group] = report_of(*(line(path=p, layer=first(p)) for p in paths)).groups
    assert group.path == text


# --- words ---------------------------------------------------------------------------------------

PADDING = Ne(read("m", b, k), 0)
MASKS: dict[str, tuple[Boolean, tuple[str, ...]]] = {
    "nothing": (sympy.true, ()),
    "no key": (sympy.false, ("no key",)),
    "causal": (CAUSAL, ("causal",)),
    "causal, turned around": (q >= k, ("causal",)),
    "strictly": (k < q, ("keys at least 1 back",)),
    "at the last key": (k <= q + M - L, ("causal, aligned at the last key",)),
    "strictly, at the last key": (
        k < q + M - L,
        ("keys at least 1 back, aligned at the last key",),
    ),
    "ahead": (k <= q + 3, ("keys up to 3 ahead",)),
    "anti-causal": (k >= q, ("keys from the query on",)),
    "back, at the last key": (
        q + M - L - k < 4,
        ("keys at most 3 back, aligned at the last key",),
    ),
    "both sides, at the last key": (
        Abs(k - q - M + L) <= 4,
        ("window of 5 on both sides, aligned at the last key",),
    ),
    "both sides, shifted": (Abs(k - q - 2) <= 4, ("|q - k + 2| ≤ 4",)),
    "lengths": (k < read("n", b), ("keys up to n[b] - 1",)),
    "last keys": (k < M - 4, ("keys up to M - 5",)),
    "first keys hidden": (k >= 4, ("not the first 4 keys",)),
    "behind a cache": (k <= q + n0, ("causal, query 0 at key n0",)),
    "window": (CAUSAL & (q - k < 4096), ("causal", "sliding window of 4,096")),
    "window, with its last key": (CAUSAL & (q - k <= 4095), ("causal", "sliding window of 4,096")),
    "window behind a cache": (
        (k <= q + n0) & (k > q + n0 - 4),
        ("causal, query 0 at key n0", "sliding window of 4"),
    ),
    "window of one token": ((k <= n0) & (k > n0 - 4), ("keys up to n0", "sliding window of 4")),
    "back, not causal": (q - k < 4, ("keys at most 3 back",)),
    "both sides": (Abs(q - k) < 8, ("window of 8 on both sides",)),
    "sinks": (
        CAUSAL & ((k < 4) | (q - k < 8)),
        ("causal", "the first 4 keys or sliding window of 8"),
    ),
    "prefix": (CAUSAL | (k < 5), ("causal or the first 5 keys",)),
    "padding": (PADDING, ("padding (m)",)),
    "padding, marked": (Eq(read("m", b, k), 0), ("padding (m)",)),
    "padding of both": (PADDING & Ne(read("m", b, q), 0), ("padding of keys and queries (m)",)),
    "padding of both, a product": (
        Ne(read("m", b, k) * read("m", b, q), 0),
        ("padding of keys and queries (m)",),
    ),
    "segments": (CAUSAL & Eq(read("d", b, q), read("d", b, k)), ("causal", "same segment (d)")),
    "chunks": (
        CAUSAL & Eq(IDiv(q, Integer(8192)), IDiv(k, Integer(8192))),
        ("causal", "chunks of 8,192"),
    ),
    "causal by blocks": (
        IDiv(k, Integer(16)) <= IDiv(q, Integer(16)),
        ("causal by blocks of 16",),
    ),
    "tensor": (Ne(read("t", b, 0, q, k), 0), ("a tensor of queries × keys (t)",)),
    "keys by head": (Ne(read("t", h, k), 0), ("keys chosen by t[h, k]",)),
    "unknown": (Eq(IMod(q + k, Integer(3)), 0), ("((k + q) mod 3) = 0",)),
}


@pytest.mark.parametrize(("mask", "words"), MASKS.values(), ids=MASKS)
def test_a_mask_in_words(mask: Boolean, words: tuple[str, ...]) -> None:
    assert mask_words(spec(mask)) == words


def test_a_window_that_starts_elsewhere_than_the_causal_bound_is_not_called_one() -> None:
    """The keys that are seen are not 4, or not the last 4."""
    for other in (k <= q + n0, k <= n0, k < q, k < 11, k <= q + 2):
        assert mask_words(spec(other & (q - k < 4)))[-1] == "keys at most 3 back"
    assert mask_words(spec((k <= q + n0) & (k > n0 - 4)))[-1] == "k > n0 - 4"


def test_blocks_that_are_chosen_are_part_of_the_words() -> None:
    words = mask_words(spec(route=Route("query", topk=2, block=64)))
    assert words == ("causal", "top 2 blocks of 64, chosen at run time")


BIASES: dict[str, tuple[Expr, tuple[str, ...]]] = {
    "none": (s, ()),
    "capped": (50 * sympy.tanh(s / 50), ()),
    "ALiBi": (
        s + read("slopes", h) * (k - q),
        ("ALiBi-like: a slope for each head times the distance",),
    ),
    "ALiBi of keys, in a cap": (
        50 * sympy.tanh((s + sympy.Rational(1, 4) ** (h + 1) * (k - 127)) / 50),
        ("ALiBi-like: a slope for each head times the position of the key",),
    ),
    "symmetric ALiBi": (
        s - Abs(q - k) * read("slopes", h),
        ("a bias by distance, for each head",),
    ),
    "ALiBi of counted keys": (
        s + sympy.Rational(1, 4) ** (h + 1) * (read("n", b, k) - 1),
        ("ALiBi-like: a slope for each head times the position of the key",),
    ),
    "one slope": (s - 0.5 * k, ("a slope times the position of the key",)),
    "buckets": (
        s + read("w", Minimum(Abs(q - k), Integer(7)) + Where(k > q, 8, 0), h),
        ("relative bias table w, by distance",),
    ),
    "table": (
        s + read("t", read("i", 16 * q + k), h),
        ("bias table t, by an index of query and key",),
    ),
    "other table": (s + read("t", 2 * q + k, h), ("bias table t, by query and key",)),
    "query and distance": (
        s + read("c", b, q, Minimum(q - k, Integer(3))),
        ("a term of the query and the distance (c)",),
    ),
    "opaque": (s + read("t", b, h, q, k), ("a tensor of queries × keys (t)",)),
    "of keys": (s + read("t", b, k), ("a bias of the key (t)",)),
}


def test_values_of_keys_times_a_slope_are_no_positions() -> None:
    what = spec(score=s + read("slopes", h) * read("v", b, k))
    what = replace(what, tensors=tuple(replace(t, dtype="float32") for t in what.tensors))
    assert position_words(what) == ("a bias of the key (v)",)


@pytest.mark.parametrize(("score", "words"), BIASES.values(), ids=BIASES)
def test_positions_in_words(score: Expr, words: tuple[str, ...]) -> None:
    assert position_words(spec(score=score)) == words


def test_linear_attention_in_words() -> None:
    tensors = (TensorArg("m", "int64", 2),)
    what = LinearSpec(position=q, seen=PADDING, decay=-(0.5 ** (h + 1)), tensors=tensors)
    assert mask_words(what) == ("causal", "padding (m)")
    assert position_words(what) == ("decay by distance, a rate for each head",)


# --- pictures ------------------------------------------------------------------------------------


def drawn(what: Any) -> list[list[int]]:
    grid = grid_of(what)
    assert grid is not None
    return [[int(x > 0) for x in row] for row in grid.cells]


def dense(seen: Callable[[int, int], bool], step: int = 1) -> list[list[int]]:
    return [[int(seen(i * step, j * step)) for j in range(16)] for i in range(16)]


@pytest.mark.parametrize(
    ("mask", "step", "seen"),
    [
        (CAUSAL, 1, lambda i, j: j <= i),
        (CAUSAL & (q - k < 4), 1, lambda i, j: i - 4 < j <= i),
        (CAUSAL & (q - k < 4096), 512, lambda i, j: i - 4096 < j <= i),
        (CAUSAL & (q - k <= 4095), 512, lambda i, j: i - 4096 < j <= i),
        (Abs(q - k) < 100, 20, lambda i, j: abs(i - j) < 100),
        (k <= q + M - L, 1, lambda i, j: j <= i),
        (Eq(IDiv(q, Integer(96)), IDiv(k, Integer(96))), 12, lambda i, j: i // 96 == j // 96),
        (CAUSAL & PADDING, 1, lambda i, j: j <= i),
        (CAUSAL & Eq(read("pad", b, k), 0), 1, lambda i, j: j <= i),
        (CAUSAL & Eq(read("kind", b, k), 2), 1, lambda i, j: j <= i),
        (CAUSAL & (k < read("n", b)), 1, lambda i, j: j <= i and j < 8),
        (CAUSAL & (k <= q + n0), 1, lambda i, j: j <= i),
    ],
)
def test_the_cells_of_a_mask(mask: Boolean, step: int, seen: Callable[[int, int], bool]) -> None:
    what = spec(mask, sizes=("n0",) if mask.has(n0) else ())
    grid = grid_of(what)
    assert grid is not None
    assert grid.keys == tuple(range(0, 16 * step, step))
    assert drawn(what) == dense(seen, step)


def test_assumptions_are_told() -> None:
    grid = grid_of(spec(CAUSAL & PADDING & Eq(read("d", b, q), read("d", b, k))))
    assert grid is not None
    assert set(grid.assumed) == {"no padding (m)", "three segments (d)"}
    assert [row.count(1.0) for row in grid.cells] == [
        1,
        2,
        3,
        4,
        5,
        6,
        1,
        2,
        3,
        4,
        5,
        1,
        2,
        3,
        4,
        5,
    ]


def test_one_token_is_one_row_at_the_last_key() -> None:
    grid = grid_of(spec((k <= n0) & (k > n0 - 4), sizes=("n0",)))
    assert grid is not None
    assert [int(x) for x in grid.cells[0]] == [0] * 12 + [1] * 4
    assert len(grid.cells) == 1
    assert grid.assumed == ("n0 = 15",)


def test_a_bias_is_a_shade_that_grows_towards_the_query() -> None:
    grid = grid_of(spec(score=s + read("slopes", h) * (k - q)))
    assert grid is not None
    assert grid.is_shaded
    last = grid.cells[-1]
    assert list(last) == sorted(set(last))
    assert {row[i] for i, row in enumerate(grid.cells)} == {1.0}


def test_tensors_of_queries_and_keys_are_opaque() -> None:
    for what in (spec(score=s + read("t", b, h, q, k)), spec(Ne(read("t", b, 0, q, k), 0))):
        grid = grid_of(what)
        assert grid is not None
        assert grid.opaque
    assert not grid_of(spec()).opaque  # type: ignore[union-attr]


# --- the page ------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The text of a page, what describes its pictures, the cells of each, and what would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.labels: list[str] = []
        self.grids: list[list[list[int]]] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: str(value) for name, value in attrs}
        self.tags.append(tag)
        if given.get("role") == "img":
            self.labels.append(given["aria-label"])
        if tag == "svg" and given.get("class") == "grid":
            self.grids.append([[0] * 16 for _ in range(16)])
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & given.keys():
            self.loads.append(tag)
        if given.get("class") == "seen":
            left, top, wide = (int(given[n]) for n in ("x", "y", "width"))
            row = self.grids[-1][(top - 18) // 10]
            row[(left - 48) // 10 : (left - 48 + wide) // 10] = [1] * (wide // 10)

    def handle_data(self, data: str) -> None:
        self.text += data


def page(report: Report, folder: Path) -> Page:
    report.save(folder / "page.html")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


def test_the_page_has_a_picture_for_each_group_with_the_right_cells(tmp_path: Path) -> None:
    window = spec(CAUSAL & (q - k < 4))
    shown = page(report_of(*(line(i, window if i % 2 else None) for i in range(6))), tmp_path)
    assert shown.grids == [
        dense(lambda i, j: j <= i),
        dense(lambda i, j: i - 4 < j <= i),
    ]
    assert shown.tags.count("section") == 2
    assert shown.loads == []
    assert "causal, sliding window of 4; 58 of 256 cells are seen" in shown.labels[2]
    assert "8 query heads, 4 for each of 2 key heads" in shown.labels
    for i in range(6):  # none is lost in the groups
        assert f"model.layers.{i}.attn" in shown.text


def test_the_page_draws_what_a_site_was_beside_what_it_is(tmp_path: Path) -> None:
    shown = page(report_of(line(after=spec(CAUSAL & (q - k < 4)))), tmp_path)
    assert shown.grids == [dense(lambda i, j: i - 4 < j <= i), dense(lambda i, j: j <= i)]
    assert str(spec()) in shown.text
    assert "q - k < 4" in shown.text


def test_sites_without_a_formula_are_shown_with_their_reason(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"spec": None, "after": None}
    kept = line(0, decision="kept", reason="its weights are returned", **plain)
    gate = line(1, kind="router", decision="not attention", reason="chooses experts", **plain)
    shown = page(report_of(kept, gate), tmp_path)
    assert shown.grids == []
    for text in ("not understood", "its weights are returned", "(router)", "chooses experts"):
        assert text in shown.text


def test_an_opaque_site_is_hatched(tmp_path: Path) -> None:
    shown = page(report_of(line(0, spec(score=s + read("t", b, h, q, k)))), tmp_path)
    assert "hatched: a tensor of queries × keys" in shown.text
    assert any("a tensor of queries × keys takes part" in x for x in shown.labels)
    assert shown.grids == [[[0] * 16] * 16]


def test_an_empty_report_says_so(tmp_path: Path) -> None:
    assert "No attention was found" in page(Report(), tmp_path).text
    assert str(Report()).startswith("0 attention sites in 0 graphs")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    bad = '<script>alert("1")</script>'
    report = report_of(
        line(
            path=bad,
            layer=None,
            reason=bad,
            notes=(bad,),
            passes=(bad,),
            origins=((bad, bad),),
            what=spec(Ne(read(bad, b, k), 0)),
        ),
        line(path=f"{bad}.gate", kind="router", spec=None, after=None, decision="not attention"),
        notes=(bad,),
    )
    shown = page(report, tmp_path)
    assert shown.loads == []
    assert shown.text.count(bad) >= 8
    assert f"padding ({bad})" in shown.labels[0]


def test_a_formula_that_cannot_be_drawn_is_still_printed(tmp_path: Path) -> None:
    what = spec(CAUSAL, sizes=("a", "c", "d", "e"))
    what = replace(what, mask=And(*(k <= q + size_symbol(n) for n in "acde")))
    shown = page(report_of(line(0, what)), tmp_path)
    assert shown.grids == []
    assert "not drawn" in shown.text
    assert str(what) in shown.text


def test_a_long_formula_is_cut_in_the_table_and_whole_on_the_page(tmp_path: Path) -> None:
    what = spec(Or(*(Eq(IMod(q + n * k, Integer(97)), n) for n in range(60))))
    report = report_of(line(0, what))
    assert len(str(what)) > 1000
    assert str(what) not in str(report).replace("\n", "")
    assert "JSON and the page have all" in re.sub(r"\s+", " ", str(report))
    assert str(what) in page(report, tmp_path).text


# --- saving and printing -------------------------------------------------------------------------


def test_a_report_is_saved_as_json(tmp_path: Path) -> None:
    report = report_of(line(0), line(1))
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report.to_dict()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("page.pdf", "saved as .json or .html"),
        ("none/page.html", "make it"),
        ("a.html", "is a dir"),
    ],
)
def test_a_bad_path_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InputError, match=words):
        report_of(line()).save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def printed(view: Any, width: int) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(view)
    return out.getvalue()


@pytest.mark.parametrize("width", [100, 160])
def test_the_table_keeps_to_its_width_and_loses_no_word(width: int) -> None:
    report = report_of(*(line(i, what=spec(CAUSAL & (q - k < 4096) & PADDING)) for i in range(3)))
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("0-2", "model.layers.*.attn", "3 sites alike", "GQA 8/2", "FLOP", "4,096", "(m)"):
        assert word in text


def test_a_model_of_equal_layers_is_one_row_and_every_row_on_request() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    report = rewriter.inspect(Model(), torch.randn(1, 2, 8, 4))
    assert [g.layers for g in report.groups] == ["0-2"]
    assert "layers.*" in str(report)
    text = printed(report.table(every=True), 160)
    assert all(f"layers.{i}" in text for i in range(3))


def test_whatever_is_drawn_at_random_is_printed_and_drawn(tmp_path: Path) -> None:
    """The parts that random specs are put together from, each in a report."""
    lines = []
    for parts in (strategies.MASKS, strategies.BIASES, strategies.SCORES):
        for name, part in sorted(parts.items()):
            drawn_reads = strategies._Reads()
            formula: Any = part(drawn_reads, s if parts is strategies.SCORES else 4)
            given = {"mask": formula} if parts is strategies.MASKS else {"score": formula}
            if parts is strategies.BIASES:
                given = {"score": s + formula}
            what = SoftmaxSpec(
                **given,
                tensors=tuple(drawn_reads.names.values()),
                sizes=tuple(drawn_reads.sizes),
            )
            assert grid_of(what) is not None, name
            lines.append(line(len(lines), what))
    shown = page(report_of(*lines), tmp_path)
    assert len(shown.grids) == len(lines) > 30
    assert "not drawn: " not in shown.text
    assert str(report_of(*lines)).count("mask: ") == len(lines)
