"""Every example runs, prints something, and its own assertions hold."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LONG = ("demo", "four_kinds")
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if p.stem not in LONG)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_can_be_read_in_a_minute(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 80
    assert "assert " in text
    assert text.startswith('"""')


def test_the_four_kinds_are_converted_and_tuned_and_tabled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "four_kinds.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    rows = runpy.run_path(str(script))["main"]()
    assert [r.kind for r in rows] == ["linear", "sparse-routed", "head-mixed", "sink-redistributed"]
    linear = rows[0]  # the one that a model of 150 steps is already hurt by
    assert linear.original < linear.tuned < linear.converted
    assert linear.recovered > 0.1
    table = capsys.readouterr().out
    for row in rows:
        assert row.tuned != row.converted != row.trained
        line = next(x for x in table.splitlines() if row.request in x)
        cells = [x.split() for x in line.split("│")][3:6]
        losses = (row.original, row.tuned, row.converted)
        assert [x[0] for x in cells] == [f"{loss:.3f}" for loss in losses]
