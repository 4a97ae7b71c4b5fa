"""The wheel holds one top-level name, and every module of the three root folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rewriter": "rewriter", "passes": "rewriter/passes", "kernels": "rewriter/kernels"}


def _sources(folder: Path) -> set[str]:
    """The modules under a folder, symlinks not followed."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from a copy of the sources, symlinks left out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        links = ["passes", "kernels"] if name == "rewriter" else []
        ignored = shutil.ignore_patterns("__pycache__", *links)
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command = [*build, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_only_top_level_name_of_the_wheel_is_rewriter(wheel: list[str]) -> None:
    assert {n.split("/")[0] for n in wheel if ".dist-info/" not in n} == {"rewriter"}


def test_the_wheel_holds_every_module_of_the_three_folders(wheel: list[str]) -> None:
    expected = {
        f"{to}/{module}" for name, to in FOLDERS.items() for module in _sources(ROOT / name)
    }
    assert {n for n in wheel if n.endswith(".py")} == expected


def test_the_wheel_is_typed_and_carries_its_licence(wheel: list[str]) -> None:
    assert "rewriter/py.typed" in wheel
    assert [n for n in wheel if n.endswith("licenses/LICENSE")]


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_passes_and_kernels_are_no_packages_of_their_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert {p.name for p in (ROOT / folder).iterdir() if p.is_dir()} <= {"__pycache__"}
    assert (ROOT / "rewriter" / folder).resolve() == ROOT / folder
