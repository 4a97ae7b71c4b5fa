"""What becomes of one architecture: its softmaxes counted, found, lifted, rewritten, compared."""

from __future__ import annotations

import copy
import importlib
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from coverage_count import counted, place_of
from coverage_reviewed import left_alone, never_read, not_attention
from coverage_zoo import Architecture, build, inputs_of
from torch import nn

import rewriter
from rewriter import symbols as sym
from rewriter.report import Report
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Read

__all__ = ["Row", "measure"]

pipeline = importlib.import_module("rewriter.optimize")  # its name is that of a function, too

WITHOUT_SOFTMAX = ("recurrence", "linear", "product", "gate")
FUSE = "fuse(from_scores=0)"
"""The exact rewriting at any size: the default leaves sites as small as these alone."""


@dataclass
class Row:
    """One architecture in one implementation and dtype. Counts are of one forward."""

    name: str
    implementation: str
    dtype: str
    status: str = "crash"
    """`measured`; `no such form`: the model refuses the implementation; `not built`; `crash`."""
    why: str = ""
    counted: int = 0
    """Softmaxes and fused attentions that the original computes."""
    others: int = 0
    """Those of them that are no attention, by the reviewed list."""
    found: int = 0
    """Attention that the report has a line for."""
    named: int = 0
    """Attention that is left alone, or taken for something else, for a reviewed reason."""
    lifted: int = 0
    opaque_masks: int = 0
    opaque_biases: int = 0
    rewritten: int = 0
    graphs: int = 0
    breaks: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    """Attention that runs and has no line, by place."""
    other_reasons: list[str] = field(default_factory=list)
    """What the softmaxes are for that are no attention."""
    unreviewed: dict[str, str] = field(default_factory=dict)
    """Softmaxes that the report calls no attention and the reviewed list does not know."""
    left: dict[str, str] = field(default_factory=dict)
    """Places of attention that is not lifted or not rewritten, and the reason."""
    relatives: dict[str, str] = field(default_factory=dict)
    """Relatives of attention without a softmax, by place: no part of the counts."""
    formulas: dict[str, list[str]] = field(default_factory=dict)
    """What was read, by place."""
    equal: bool | None = None
    difference: str = ""
    notes: list[str] = field(default_factory=list)
    trace: str = ""
    """Where it failed; printed, and kept in no file: it names paths of the machine."""
    rewrite_ms: float = 0.0
    """Finding, lifting and checking, without torch's capture."""
    inductor: int | None = None
    """Attentions that torch's own pattern matcher fuses; of the eager form."""

    @property
    def sites(self) -> int:
        """Attention that one forward computes."""
        return self.counted - self.others

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sites": self.sites}


def measure(
    name: str, library: str, implementation: str, dtype: str, *, verify: bool, inductor: bool
) -> dict[str, Any]:
    """The row of one architecture; never raises."""
    row = Row(name, implementation, dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure(row, Architecture(name, library), verify=verify, inductor=inductor)
    except Exception as error:
        row.why = f"{type(error).__name__}: {error}"[:300]
        row.trace = traceback.format_exc()[-1500:]
    return row.to_dict()


def _measure(row: Row, architecture: Architecture, *, verify: bool, inductor: bool) -> None:
    row.status = "not built"
    try:
        model = build(architecture, row.implementation)
    except (ValueError, NotImplementedError) as error:
        refused = (row.implementation, "does not support an attention implementation")
        if any(x in str(error) for x in refused) or isinstance(error, NotImplementedError):
            row.status, row.why = "no such form", str(error)[:160]
            return
        raise
    inputs = inputs_of(architecture, model)
    if row.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
        inputs = {n: _narrow(x) for n, x in inputs.items()}
    try:
        with torch.no_grad(), counted(model) as calls:
            torch.manual_seed(0)
            model(**copy.deepcopy(inputs))
    except RuntimeError as error:
        if row.dtype == "float32":
            raise
        row.status, row.why = "no such form", f"the model fails in {row.dtype}: {error}"[:160]
        return
    row.status = "crash"
    _others(row, calls)
    twin = copy.deepcopy(model)
    with _tallied() as (runs, seconds), torch.no_grad():
        rewriter.optimize(twin, FUSE)
        torch.manual_seed(0)
        twin(**copy.deepcopy(inputs))
    row.rewrite_ms = round(1e3 * sum(seconds), 1)
    _read(row, pipeline.report_of(twin), runs, calls)
    if verify:
        row.difference = _difference(model, twin, inputs)
        row.equal = not row.difference
        if "nothing can be said" in row.difference:
            _at_its_sites(row, model, twin, inputs)
        elif row.difference and _by_chance(row, architecture):
            row.notes.append(f"equal with other weights, with these not: {_reasons(row)}")
            row.equal, row.difference = True, ""
    torch._dynamo.reset()
    if inductor:
        row.inductor = inductor_count(model, inputs)
    row.status = "measured"


def _difference(model: nn.Module, twin: nn.Module, inputs: dict[str, Any]) -> str:
    """What the harness says against a rewritten model; empty if it says nothing."""
    result = rewriter.verify(model, twin, inputs, sites=False, gradients=False, raises=False)
    return "" if result.ok else str(result)[:1500]


def _at_its_sites(row: Row, model: nn.Module, twin: nn.Module, inputs: dict[str, Any]) -> None:
    """The original's outputs are as far from float64 as they are large, because rounding decides
    what it chooses: they say nothing of another model. What goes in and out of its sites does."""
    if not row.rewritten:
        row.notes.append(f"nothing is rewritten, and not comparable: {_reasons(row)}")
        row.equal, row.difference = None, ""
        return
    result = rewriter.verify(model, twin, inputs, sites=True, gradients=False, raises=False)
    sites = [r for r in result.rows if r.kind == "site"]
    if sites and all(r.ok for r in sites):
        row.notes.append(f"compared at its {len(sites)} sites: {_reasons(row)}")
        row.equal, row.difference = True, ""


def _reasons(row: Row) -> str:
    """What the harness says, without its table."""
    lines = row.difference.splitlines()
    return " ".join(x.removeprefix("FAIL ") for x in lines if x.startswith("FAIL "))


def _by_chance(row: Row, architecture: Architecture) -> bool:
    """The model is equal with four other draws of its weights. The bound is a ratio of errors:
    where an output has a few elements, the original's may happen to be small; what is wrong is
    wrong with all weights."""
    for seed in range(1, 5):
        torch._dynamo.reset()
        model = build(architecture, row.implementation, seed=seed)
        inputs = inputs_of(architecture, model)
        if row.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
            inputs = {n: _narrow(x) for n, x in inputs.items()}
        twin = copy.deepcopy(model)
        with torch.no_grad():
            rewriter.optimize(twin, FUSE)
        if _difference(model, twin, inputs):
            return False
    return True


def _narrow(x: Any) -> Any:
    is_float = isinstance(x, torch.Tensor) and x.dtype == torch.float32
    return x.to(torch.bfloat16) if is_float else x


@contextmanager
def _tallied() -> Iterator[tuple[Counter[int], list[float]]]:
    """How often each graph runs, and the seconds of finding and lifting."""
    runs: Counter[int] = Counter()
    seconds: list[float] = []
    call, plan = pipeline._Backend.__call__, pipeline.plan_of

    def counting(self: Any, gm: Any, example_inputs: Any) -> Any:
        number = self.state.graphs
        run = call(self, gm, example_inputs)

        def counted_run(*args: Any) -> Any:
            runs[number] += 1
            return run(*args)

        return counted_run

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return plan(*args)
        finally:
            seconds.append(time.perf_counter() - start)

    pipeline._Backend.__call__, pipeline.plan_of = counting, timed  # type: ignore[method-assign]
    try:
        yield runs, seconds
    finally:
        pipeline._Backend.__call__, pipeline.plan_of = call, plan  # type: ignore[method-assign]


def _others(row: Row, calls: Counter[str]) -> None:
    row.counted = calls.total()
    for place, times in calls.items():
        reason = not_attention(row.name, place)
        row.others += times * bool(reason)
        row.other_reasons = sorted({*row.other_reasons, *([reason] if reason else [])})


def _read(row: Row, report: Report, runs: Counter[int], calls: Counter[str]) -> None:
    row.graphs, row.breaks = report.graphs, report.breaks
    row.notes = [note[:300] for note in report.notes]
    found: Counter[str] = Counter()
    for line in report.sites:
        times = runs[line.graph]
        place = place_of(line.site.path)
        if line.site.kind in WITHOUT_SOFTMAX:
            row.relatives[place] = line.reason
            continue
        found[place] += times
        if not_attention(row.name, place):
            continue
        spec = line.site.spec
        if line.decision != "rewritten":
            row.left[place] = line.reason
            row.named += times * bool(spec is None and left_alone(row.name, place))
        if not line.is_attention and not left_alone(row.name, place):
            row.unreviewed[place] = f"{line.site.kind}: {line.reason}"
            del row.left[place]
            continue
        row.found += times
        if spec is None:
            continue
        row.lifted += times
        row.rewritten += times * (line.decision == "rewritten")
        if str(spec) not in row.formulas.setdefault(place, []):
            row.formulas[place].append(str(spec))
        masks = [_is_mask(read, spec) for read in spec.opaque_reads()]
        row.opaque_masks += times * any(masks)
        row.opaque_biases += times * (not all(masks))
    for place, times in (calls - found).items():
        if not_attention(row.name, place):
            continue
        unread = min(times, never_read(row.name, place))
        row.others += unread
        times -= unread
        if not times:
            continue
        if left_alone(row.name, place):
            row.named += times
            row.left[place] = "in no graph"
        else:
            row.missing[place] = times
    if row.found + row.named >= row.sites:  # a graph without parameters does not know its place
        row.missing = {}


def _is_mask(read: Read, spec: SoftmaxSpec) -> bool:
    """A tensor of queries and keys that all heads share: a mask, whatever its values are; one that
    says which row of a table of biases to take is none."""
    tables = [r for f in spec.formulas for r in sym.reads(f) if r.has(sym.h)]
    return not read.has(sym.h) and not any(i.has(read) for r in tables for i in r.index)


def inductor_count(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many attentions the pattern matcher of torch's inductor fuses; no code is generated. 0
    for a model that torch's compiler cannot run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    def compiler(gm: torch.fx.GraphModule, args: Any) -> Any:
        mode = next(
            (
                n.meta["val"].fake_mode
                for n in gm.graph.nodes
                if hasattr(n.meta.get("val"), "fake_mode")
            ),
            FakeTensorMode(),
        )
        with V.set_fake_mode(mode):
            joint_graph_passes(gm)
        return gm

    backend = aot_autograd(
        fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    counters.clear()
    with (
        suppress(Exception),
        torch.no_grad(),
    ):  # fails: what was fused counts
        torch.compile(model, backend=backend)(**copy.deepcopy(inputs))
    torch._dynamo.reset()
    return int(counters["inductor"]["fuse_attention"])
