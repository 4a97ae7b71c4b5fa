"""What was checked in one process is not checked in the next, unless anything differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import verdicts


class Layers(nn.Module):
    """Causal attention, whose cap and table of numbers are constants of the graph."""

    def __init__(self, layers: int, cap: float = 5.0, table: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 24) for _ in range(layers))
        self.cap, self.table = cap, table

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        for layer in self.inner:
            q, k, v = layer(x).unsqueeze(1).chunk(3, -1)
            scores = torch.tanh(q @ k.transpose(-1, -2) / self.cap) * self.cap
            scores = scores + torch.tensor([self.table, 0.5, 1.0])[place % 3]
            scores = scores.masked_fill(place[None] > place[:, None], -torch.inf)
            x = x + (scores.softmax(-1) @ v).squeeze(1)
        return x


def rewritten(layers: int, **options: Any) -> int:
    model = rewriter.optimize(Layers(layers, **options), "fuse(from_scores=0)")
    with torch.no_grad():
        model(torch.zeros(2, 6, 8))
    torch._dynamo.reset()
    return len(rewriter.inspect(model).rewritten)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """One entry for each check that ran; files lie in a folder of the test's own."""
    ran: list[Any] = []
    plain = verdicts._checked
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "KEEPS", True)

    def counted(*args: Any) -> tuple[str, str]:
        ran.append(args)
        return plain(*args)

    monkeypatch.setattr(verdicts, "_checked", counted)
    return ran


def processes(folder: Path, count: int) -> list[dict[str, int]]:
    """That many at the same time: how many checks each ran, and how many sites it rewrote."""
    environment = os.environ | {"REWRITER_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    found = [process.communicate()[0] for process in started]
    return [json.loads(text.splitlines()[-1]) for text in found]


def test_processes_at_once_and_a_later_one(tmp_path: Path) -> None:
    assert [p["rewritten"] for p in processes(tmp_path, 2)] == [3, 3]
    files = list((tmp_path / "checks").iterdir())
    assert {f.suffix for f in files} == {".txt"}  # nothing half written is left
    assert processes(tmp_path, 1) == [{"checks": 0, "rewritten": 3}]


def test_equal_layers_are_checked_once_however_many_there_are(
    checks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rewritten(3) == 3
    few = len(checks)
    assert few <= 2  # the first layer reads an input, the others a result
    monkeypatch.setattr(verdicts, "KEEPS", False)
    assert rewritten(40) == 40
    assert len(checks) == 2 * few


def test_another_formula_or_another_constant_is_checked(checks: list[Any]) -> None:
    for number, options in enumerate(({}, {"cap": 6.0}, {"table": 2.0}), start=1):
        assert rewritten(1, **options) == 1
        assert len(checks) == number
        assert rewritten(1, **options) == 1
        assert len(checks) == number


def test_other_versions_and_other_sources_are_checked(
    checks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(1)
    monkeypatch.setattr(verdicts, "_surroundings", lambda: ("torch 0.1",))
    rewritten(1)
    assert len(checks) == 2


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"agreed", b"half"])
def test_a_damaged_file_is_not_believed(checks: list[Any], tmp_path: Path, text: bytes) -> None:
    rewritten(1)
    (file,) = (tmp_path / "checks").iterdir()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] if text == b"half" else text)
    assert rewritten(1) == 1
    assert len(checks) == 2
    assert file.read_bytes() == good


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    checks: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "checks").write_text("a file")
    assert rewritten(1) == rewritten(1) == 1
    assert len(checks) == 2


def test_what_does_not_agree_is_not_remembered(
    checks: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verdicts, "_checked", lambda *_: ("they differ", ""))
    assert rewritten(1) == 0
    assert not (tmp_path / "checks").exists()


def main() -> None:
    ran = []
    plain = verdicts._checked
    verdicts._checked = lambda *args: (ran.append(args), plain(*args))[1]
    print(json.dumps({"rewritten": rewritten(3), "checks": len(ran)}))


if __name__ == "__main__":
    main()
