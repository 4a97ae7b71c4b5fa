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
from rewriter.verify import VerifyReport, verify
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
        "verify: equivalent: 1 outputs and 17 gradients against the original in float64"
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
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
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
        assert page.rows == len(report.rows) + 2  # a heading for outputs and one for gradients
        assert f"verify: {verdict}" in page.text
        assert all(row.name in page.text for row in report.rows)


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
    with pytest.raises(OSError, match="No space left"):
        bad.save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.pdf: a report is saved as \.json or \.html"):
        reports()[0].save(tmp_path / "report.pdf")


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
