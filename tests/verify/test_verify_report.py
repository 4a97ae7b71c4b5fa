"""The report: as text, JSON, page and exception."""

from __future__ import annotations

import copy
import html.parser
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import InputError, NotEquivalent
from rewriter.passbase import Pass
from rewriter.verify import VerifyReport, verify
from rewriter.verify.plots import heat_map
from rewriter.verify.rows import VerifyRow, detail_of
from verify.faults import FUSE, Lie, pair
from verify.small_models import Shape, Tower, batch


def reports() -> tuple[VerifyReport, VerifyReport]:
    torch.manual_seed(0)
    original = Tower(Shape(layers=1))
    inputs = batch(0)
    good = verify(original, copy.deepcopy(original).set(form="sdpa"), inputs)
    wrong = copy.deepcopy(original).set(fault="scale missing")
    return good, verify(original, wrong, inputs, raises=False)


def test_the_verdict_is_the_first_line_of_the_text() -> None:
    good, bad = reports()
    assert str(good).splitlines()[0] == (
        "verify: equivalent: 1 output and 17 gradients against the original in float64"
    )
    assert str(bad).splitlines()[0].startswith("verify: NOT EQUIVALENT: ")
    assert "blocks.0.attention.query.weight" in str(bad)
    assert "FAIL hidden: max error" in str(bad)


def test_worst_is_the_row_with_the_largest_share_of_its_allowance() -> None:
    _, bad = reports()
    assert bad.worst is not None
    assert bad.worst.used == max(row.used for row in bad.rows) > 1
    assert not bad.worst.ok


def test_json_holds_every_row_and_nothing_that_json_lacks(tmp_path: Path) -> None:
    _, bad = reports()
    bad.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found == bad.to_dict()
    assert [row["name"] for row in found["rows"]] == [row.name for row in bad.rows]
    assert found["failed"] == len(bad.failures)
    assert set(found["rows"][0]["err_new"]) == {"mean", "max"}


def test_json_of_rows_without_numbers_has_none() -> None:
    report = verify(nn.Identity(), nn.Flatten(0), torch.ones(2, 2), raises=False)
    row = report.to_dict()["rows"][0]
    assert row["err_new"] is None
    assert row["ratio"] is None
    json.dumps(report.to_dict(), allow_nan=False)


class Reader(html.parser.HTMLParser):
    """Collects text, and every tag that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.rows, self.loads = "", 0, set[str]()
        self.drawings: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.drawings += [str(value) for name, value in attrs if name == "aria-label"]
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & {
            name for name, _ in attrs
        }:
            self.loads.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_row_and_loads_nothing(tmp_path: Path) -> None:
    for report, verdict in zip(reports(), ("equivalent", "not equivalent"), strict=True):
        report.save(tmp_path / "report.html")
        page = Reader((tmp_path / "report.html").read_text())
        assert not page.loads
        headings, elements = 3, 5  # tables of elements, outputs, gradients; of one output
        assert page.rows == len(report.rows) + headings + elements
        assert f"verify: {verdict}" in page.text
        assert all(row.name in page.text for row in report.rows)


def full_report(*passes: str | Pass, layers: int) -> VerifyReport:
    original, model = pair(*passes, shape=Shape(layers=layers))
    return verify(original, model, batch(0), gradients=False, raises=False)


def test_the_page_of_an_optimized_model_draws_sites_heads_and_errors(tmp_path: Path) -> None:
    report = full_report(FUSE, Lie(layer=1), "sparse.window(window=4) @ 2", layers=3)
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert not page.loads
    assert "http" not in text.replace("http-equiv", "")
    assert page.drawings == [
        "error ratio of each site",
        "largest difference of each head",
        "errors of outputs",
        "errors of sites",
    ]
    for words in (
        "blocks.1.attention[",  # a worst element
        "blocks.2.attention, head 3: ",  # a cell of the map
        "s = 0.353553·q·k",  # before
        "s = 0.360624·q·k",  # after
        "q - k < 4",
        "3 of 3 sites rewritten",
        "rewritten by fuse(from_scores=0), test.lie",
        torch.__version__,
    ):
        assert words in page.text, words
    assert "nan" not in text.lower().replace("tenant", "")


def test_the_report_of_an_optimized_model_is_json_with_all_its_parts() -> None:
    report = full_report(FUSE, layers=1)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["structure"] == {
        "sites": 1,
        "rewritten": 1,
        "softmaxes": 0,
        "graphs": 1,
        "recompiles": 0,
        "breaks": 0,
    }
    assert [s["name"] for s in found["sites"]] == [f"blocks.{i}.attention" for i in range(1)]
    site = next(row for row in found["rows"] if row["kind"] == "site")
    assert len(site["detail"]["heads"]) == 4
    assert sum(site["detail"]["errors_new"]) == site["count"]
    assert set(site["detail"]["worst"][0]) == {"index", "gold", "ref", "new"}
    assert found["environment"]["seed"] == "0"
    assert found["memory"] is None


def test_what_is_not_finite_has_no_place_in_json_and_the_last_one_in_a_drawing() -> None:
    gold = torch.tensor([1.0, 2.0, float("inf"), 0.5]).view(1, 2, 2, 1)
    new = torch.tensor([float("nan"), 2.0, float("inf"), 0.5 + 1e-4]).view(1, 2, 2, 1)
    detail = detail_of(gold, gold, new, heads=True)
    assert [e.place for e in detail.worst[:2]] == [(0, 0, 0, 0), (0, 1, 1, 0)]
    assert detail.heads[0] == float("inf")
    assert detail.heads[1] == pytest.approx(1e-4, rel=1e-3)
    assert detail.errors_new[-1] == 1  # the one that is no number
    assert detail.errors_new[0] == 2  # exact
    json.dumps(detail.to_dict(), allow_nan=False)
    row = VerifyRow("x", "site", "float32", False, detail=detail)
    assert "red: not finite" in heat_map([row])


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"<b>&": x}

    verify(Odd(), Odd(), torch.ones(1, 2)).save(tmp_path / "report.html")
    assert "<code>&lt;b&gt;&amp;</code>" in (tmp_path / "report.html").read_text()


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = reports()
    path = tmp_path / "report.json"
    good.save(path)
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"report\.json cannot be written: No space left"):
        bad.save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.pdf: a report is saved as \.json or \.html"):
        reports()[0].save(tmp_path / "report.pdf")


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/report\.html: the directory .*none does not exist"):
        reports()[0].save(tmp_path / "none" / "report.html")


def test_the_exception_carries_the_report() -> None:
    good, bad = reports()
    good.raise_if_failed()
    with pytest.raises(NotEquivalent) as info:
        bad.raise_if_failed()
    assert info.value.report is bad


def test_the_function_hides_the_package_only_as_an_attribute() -> None:
    from rewriter.verify.report import VerifyReport as Again

    assert rewriter.verify is verify
    assert Again is rewriter.VerifyReport is VerifyReport
