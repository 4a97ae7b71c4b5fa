"""Whether a formula and the graph that it was read from agree, also as another process found it.

A file in the folder `checks` of the cache says that one pair agreed. Its text is all that the check
depends on: versions, the formula, the nodes with their constants, the sizes. It counts only where
that is, to the letter, what this process would check; whatever else lies there is written anew. A
pair that does not agree, or could not be checked, leaves no file, and neither does one with code
other than torch's own, which may change.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch import fx

from rewriter.cache import cache_folder, write_atomically
from rewriter.check import disagreement
from rewriter.check_output import output_disagreement
from rewriter.frame import GraphFacts, Lifted
from rewriter.operands import Operand
from rewriter.reading import value_of
from rewriter.sample import Sample, Skip, hints

__all__ = ["verdict"]

log = logging.getLogger(__name__)

KEEPS = True
"""Files are read and written."""


def verdict(lifted: Lifted, facts: GraphFacts) -> tuple[str, str]:
    """How the formula and the graph differ, and what could not be checked; both empty if they
    agree."""
    text = _evidence(lifted, facts) if KEEPS else None
    if text is not None and _is_known(text):
        return "", ""
    found = _checked(lifted, facts)
    if text is not None and found == ("", ""):
        _remember(text)
    return found


def _checked(lifted: Lifted, facts: GraphFacts) -> tuple[str, str]:
    problem = disagreement(lifted, facts)
    if problem:
        return problem, ""
    try:
        return output_disagreement(lifted, facts), ""
    except Skip as reason:
        return "", f"its output was not checked against the graph: {reason}"


def _path(text: str) -> Path:
    return cache_folder("checks") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.txt"


def _is_known(text: str) -> bool:
    try:
        known = _path(text).read_bytes() == text.encode()
    except OSError:
        return False
    log.debug("a formula %s", "agreed in another process" if known else "has a file to replace")
    return known


def _remember(text: str) -> None:
    path = _path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:  # it is checked again, in the next process
        log.debug("%s was not written: %s", path, error)


def _evidence(lifted: Lifted, facts: GraphFacts) -> str | None:
    """All that the checks of a site depend on, as text; None if it cannot be said."""
    try:
        return "\n".join([*_surroundings(), *_formulas(lifted), *_nodes(lifted, facts), ""])
    except Exception as error:
        log.debug("a check is not remembered: %s: %s", type(error).__name__, error)
        return None


@lru_cache(maxsize=1)
def _surroundings() -> tuple[str, ...]:
    """Versions, and a digest of our own sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    python = f"python {platform.python_version()} {platform.machine()}"
    return python, f"torch {torch.__version__}, sympy {sympy.__version__}", digest.hexdigest()


def _formulas(lifted: Lifted) -> list[str]:
    assert lifted.bounds is not None
    operands = [cast(Operand, x) for x in (lifted.q, lifted.k, lifted.v)]
    said = (
        *((str(i), sympy.srepr(n)) for i, n in lifted.bounds.sizes.items()),
        *((str(x.steps), sympy.srepr(x.dim)) for x in operands),
        sympy.srepr(lifted.raw),
        sympy.srepr(lifted.product_index),
        sympy.srepr(lifted.factor),
        sympy.srepr(lifted.sizes),
        sympy.srepr(lifted.lead),
        [str(name) for name, _ in lifted.names],
        lifted.out_order,
    )
    return [cast(Any, lifted.site.spec).to_json(), *map(str, said)]


def _nodes(lifted: Lifted, facts: GraphFacts) -> list[str]:
    """What is run: every node from the operands and the tensors of the formula on."""
    found = lifted.found
    end = found.product if found.product is not None else found.anchor
    operands = [cast(Operand, x).node for x in (lifted.q, lifted.k, lifted.v)]
    roles = [*operands, *lifted.tensors, *(n for _, n in lifted.names)]
    ends = [x for x in (end, lifted.score, lifted.product) if x is not None]
    sample = Sample(lifted, facts, [*ends, *roles], [*operands, *lifted.tensors])
    places = {node: f"%{number}" for number, node in enumerate(sample.nodes)}
    lines = [f"ends {[places[x] for x in ends]}, roles {[places[x] for x in roles]}"]
    for node, place in places.items():
        lines.append(
            f"{place} {_kind(value_of(node))} {_constant(node, facts)} {_done(node, places)}"
        )
    graph = end.graph
    sizes = {x: n for m in graph.nodes for x, n in hints(m).items() if m.op == "placeholder"}
    sizes |= {x: n for node in sample.nodes for x, n in hints(node).items()}
    return [*lines, str(sorted((str(x), n) for x, n in sizes.items()))]


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value}"


def _constant(node: fx.Node, facts: GraphFacts) -> str:
    value = facts.constant(node)
    if value is None:
        return ""
    whole = value.detach().cpu().contiguous().flatten()
    return f"= {value.dtype} {hashlib.sha256(bytes(whole.view(torch.uint8).tolist())).hexdigest()}"


def _done(node: fx.Node, places: dict[fx.Node, str]) -> str:
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if not ours and getattr(target, "__module__", "") != "_operator":
        raise Skip(f"{target} is code of another library")
    args = fx.map_arg((node.args, dict(node.kwargs)), lambda x: _Place(places.get(x, "above")))
    return f"{target} {args}"


class _Place(str):
    __slots__ = ()
    __repr__ = str.__str__
