"""Dependencies point one way, and the compiler knows no model by name.

Read from the source; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rewriter/report", "rewriter/verify", "rewriter/testing")
FOLDERS = ("rewriter", *PACKAGES, "passes", "kernels")

DRAWING = {
    # what a module may import directly; it may also import what those may
    "errors": "",
    "trees": "",
    "cache": "",
    "logs": "",
    "symbols": "errors",
    "stages": "symbols",
    "spec": "stages",
    "linear": "spec",
    "families": "linear",
    "evaluate": "spec",
    "reference_linear": "evaluate linear",
    "reference_routes": "evaluate",
    "reference": "reference_linear reference_routes",
    "sites": "spec",
    # passes
    "options": "errors",
    "selectors": "errors",
    "passbase": "options selectors sites",
    "passes": "linear passbase",
    "registry": "passes",
    "datasheet": "passbase",
    # reading graphs
    "indices": "symbols",
    "tables": "indices",
    "reading": "tables",
    "rules_layout": "reading",
    "rules_arithmetic": "reading",
    "rules": "contraction rules_arithmetic",
    "contraction": "rules_layout",
    "operands": "contraction",
    "formulas": "reading spec",
    "find": "contraction sites",
    "frame": "find operands rules",
    "scores": "frame",
    "finish": "formulas frame",
    "lift_sdpa": "finish",
    "lift_softmax": "finish scores",
    "lift": "lift_sdpa lift_softmax",
    "relatives": "frame",
    "recompute": "",
    "transforms": "recompute",
    "retrace": "transforms",
    "handed": "reading",
    "inplace": "rules_layout",
    "capture": "find handed inplace logs retrace",
    "sample": "frame",
    "check": "reference sample",
    "check_output": "reference sample",
    "verdicts": "cache check check_output",
    "taps": "capture frame",
    "additions": "stages",
    "programs": "additions beside taps",
    "insert": "programs",
    # running specs
    "kernels": "beside cache families reference",
    "beside": "",
    "isolation": "",
    "lowering": "kernels",
    "op": "lowering",
    # the front
    "cost": "linear sites",
    "report": "cost evaluate",
    "decide": "capture check lift op passbase relatives report taps verdicts",
    "assemble": "decide insert",
    "watch": "assemble",
    "optimize": "isolation registry watch",
    "giving": "optimize",
    "hub": "errors",
    "plan": "registry",
    "checkpoint": "hub optimize plan",
    "runtime": "errors",
    "program": "optimize runtime trees",
    "export_given": "program",
    "export_state": "export_given",
    "export": "export_state",
    # proving
    "verify": "optimize",
    "testing": "export checkpoint giving verify",
    "examples": "errors",
    "kernel_text": "op report selectors",
    "cli": "checkpoint datasheet examples export kernel_text verify",
    "rewriter": "checkpoint export giving verify",
    "__main__": "cli",
}
"""Style 8.2. A folder is one entry; so is `rewriter` itself, what the package gives away."""

LAZY = {"triton", "onnx", "onnxscript", "onnxruntime", "transformers"}
"""Imported inside the function that needs them, or in a module that is imported there."""

MODEL_NAMES = re.compile(
    r"(?<![a-z])(bert|roberta|deberta|gpt_?2|gpt_?oss|llama|mistral|mixtral|gemma|qwen|bloom|mpt|t5|whisper|vit|swin|phi3|llava)"
    r"(?![a-z])",
    re.IGNORECASE,
)


MODULES = sorted(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))


def _entry(path: Path) -> str:
    """The entry of the drawing that a module belongs to."""
    if path.parent != ROOT / "rewriter":
        return path.parent.name
    return "rewriter" if path.stem == "__init__" else path.stem


def _imports(tree: ast.Module) -> Iterator[str]:
    """The full names that a module imports, those for type checking alone left out."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _reachable(entry: str) -> set[str]:
    """The entries that one entry may import, itself included."""
    seen, todo = {entry}, [entry]
    while todo:
        for below in DRAWING[todo.pop()].split():
            if below not in seen:
                seen.add(below)
                todo.append(below)
    return seen


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_dependencies_point_the_way_of_the_drawing(path: Path) -> None:
    entry = _entry(path)
    assert entry in DRAWING, f"{entry} is new: give it a place in the drawing"
    names = [n for n in _imports(ast.parse(path.read_text())) if n.startswith("rewriter.")]
    used = {n.split(".")[1] for n in names}
    known = {n for n in used if n in DRAWING}
    assert used - known == set(), "imports of what the drawing does not show"
    assert known - _reachable(entry) == set(), "imports against the arrows"


def test_passes_and_kernels_do_not_know_each_other() -> None:
    assert "kernels" not in _reachable("passes")
    assert "passes" not in _reachable("kernels")


def test_verify_and_report_name_no_pass_and_no_kernel() -> None:
    for path in [p for p in MODULES if _entry(p) in ("verify", "report")]:
        names = {n.split(".")[1] for n in _imports(ast.parse(path.read_text())) if "." in n}
        assert not {"passes", "kernels", "registry"} & names, path.name


def test_the_drawing_has_no_circle_and_no_forgotten_module() -> None:
    for entry in DRAWING:
        below = [e for e in _reachable(entry) if e != entry]
        assert not [e for e in below if entry in _reachable(e)], entry


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and texts of a module with their lines.

    Docstrings and comments are left out: they may name papers and models.
    """
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in documentation:
                yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_the_compiler_knows_no_model_by_name(path: Path) -> None:
    names = _names(ast.parse(path.read_text()))
    assert [f"line {line}: {name}" for line, name in names if MODEL_NAMES.search(name)] == []


WORDS = {"align", "aria", "bit", "clip", "beam", "phi", "codegen", "minimax"}
"""Model types that are words of the field or of HTML; `minimax` is the rule of a paper's decay."""


def test_the_compiler_knows_no_model_type_of_transformers() -> None:
    """Identifiers and texts of the code, word by word, against every name that the library has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in CONFIG_MAPPING_NAMES} - WORDS
    assert len(types) > 300
    found = [
        f"{_id(path)}, line {line}: {word}"
        for path in MODULES
        for line, name in _names(ast.parse(path.read_text()))
        for word in re.split(r"[^a-z0-9]+", name.lower())
        if word in types
    ]
    assert found == []


@pytest.mark.parametrize("path", [p for p in MODULES if _entry(p) != "kernels"], ids=_id)
def test_heavy_libraries_are_imported_where_they_are_needed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.split(".")[0] for n in _imports(tree)} & LAZY == set()
