"""The benchmarks run at one small size, and what they measure are the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_variants_are_measured_and_targets_without_a_measurement_are_not_met(
    tmp_path: Path,
) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "variants.py"), "--lengths", "64", "--quick"]
    command += ["--only", "sdpa,linear.features", "--check", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(file.read_text())
    assert found["rows"]["linear.features"]["64"]["min_s"] > 0
    assert {t["met"] for t in found["targets"]} == {"not measured"}
    assert "peak memory, MiB" in done.stdout


def test_columns_on_a_cpu_compute_the_same_and_are_timed_in_turns(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "cpu.py"), "--lengths", "64", "--only", "soft cap"]
    command += ["--budget", "0.01", "--memory", "64", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(file.read_text())
    row, step = found["rows"]
    assert set(row["seconds"]) == {"eager", "ours", "flex", "compiled"}  # SDPA has no soft cap
    assert (step["q_len"], step["kv_len"]) == (1, 1024)
    assert set(found["memory_mib"]) == {"ours", "eager"}
    assert "causal, soft cap" in done.stdout


def test_a_missed_target_is_said() -> None:
    from variants_targets import table_of_targets

    slow = {"sparse.moba": {16384: {"min_s": 2.0}}, "sdpa": {16384: {"min_s": 3.0}}}
    targets = {t["name"]: t for t in table_of_targets(slow, {"sparse.moba": 1.0})}
    assert targets["sparse.moba of sdpa, 16384 tokens"]["met"] == "MISSED"
    assert targets["growth of sparse.moba"]["met"] == "met"


def test_the_eager_edit_is_what_the_variant_computes() -> None:
    import variants_rows

    rows = {row.name: row for row in variants_rows.ROWS}
    got, want = (rows[name].build(512)() for name in ("sinks.var", "eager edit"))
    plain = rows["sdpa"].build(512)()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize("request_", ["linear.features(map=elu)", "linear.window_tail(window=9)"])
def test_a_step_of_decoding_is_the_last_row_of_the_whole(request_: str) -> None:
    import variants_rows

    with torch.no_grad():
        step, whole = (
            build(request_)(300)() for build in (variants_rows.decode, variants_rows.variant)
        )
    torch.testing.assert_close(step, whole[:, :, -1:], rtol=1e-4, atol=1e-5)


def test_the_first_call_misses_a_target_by_cost_by_share_or_by_growth() -> None:
    from compile_time import missed

    def row(layers: int, ms_a_site: float, on_top: float) -> dict[str, object]:
        return {"model": "stack", "layers": layers, "ms_a_site": ms_a_site, "on_top": on_top}

    assert missed([row(4, 19.0, 0.3), row(16, 12.0, 0.1), row(80, 13.0, 0.09)]) == []
    assert len(missed([row(16, 12.0, 0.1), row(80, 21.0, 0.2)])) == 3
