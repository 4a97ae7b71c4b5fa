"""`__all__` says what is public: it is sorted, and nothing else without an underscore is there."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import rewriter

README = Path(__file__).parents[1] / "README.md"


def test_all_is_sorted_and_complete() -> None:
    assert list(rewriter.__all__) == sorted(set(rewriter.__all__))


def test_the_names_that_the_readme_uses_are_public() -> None:
    text = README.read_text(encoding="utf-8")
    names = set(re.findall(r"\brewriter\.([a-z_]+)\b", text))
    modules = {path.stem for path in README.parent.glob("rewriter/*")} | {"json"}  # `rewriter.json`
    assert "head_outputs" in names
    assert names - modules - set(rewriter.__all__) == set()


def test_nothing_public_is_missing_from_all() -> None:
    things = vars(rewriter).items()
    names = {n for n, x in things if n[0] != "_" and not isinstance(x, types.ModuleType)}
    assert names - set(rewriter.__all__) == set()


@pytest.mark.parametrize("name", rewriter.__all__)
def test_each_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(rewriter, name)
    assert thing.__doc__


def test_importing_rewriter_takes_no_heavy_library_along() -> None:
    heavy = {"transformers", "onnx", "onnxruntime", "onnxscript", "triton", "torch._dynamo"}
    code = f"import sys, rewriter; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
