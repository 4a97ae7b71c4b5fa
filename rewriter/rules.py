"""The rules by which tensors are read, one for each operation that has one."""

from __future__ import annotations

from rewriter.contraction import outer
from rewriter.reading import Rule
from rewriter.rules_arithmetic import ARITHMETIC
from rewriter.rules_layout import LAYOUT, getitem

__all__ = ["RULES"]


def _table(rules: dict[str, Rule]) -> dict[str, Rule]:
    """Names separated by spaces share a rule."""
    result = {}
    for names, rule in rules.items():
        for name in names.split():
            result[f"aten.{name}"] = rule
    return result


RULES: dict[str, Rule] = {
    **_table({"matmul bmm mm": outer, **LAYOUT, **ARITHMETIC}),
    "getitem": getitem,
}
