"""Capture: from a model, or from the graph that Dynamo hands to a backend, to one dialect,
pre-dispatch ATen.

Pre-dispatch ATen is still differentiable and dynamic in shape, and composite operations such as
`aten.scaled_dot_product_attention` are intact. Both doors lead here: `retrace` for graphs of
`torch.compile`, and `export` for whole models through `torch.export`.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from sympy import Symbol
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.errors import CaptureError
from rewriter.find import clean_path, module_path
from rewriter.handed import Handed, Made
from rewriter.indices import as_size
from rewriter.inplace import is_view, normalize, same_memory, writes_of, written_nodes
from rewriter.logs import logging_at
from rewriter.reading import op_name, value_of
from rewriter.recompute import keep_random_state
from rewriter.retrace import Tracing
from rewriter.tables import band_of

__all__ = ["Captured", "capturing", "export", "first_line", "from_dynamo", "from_exported"]

log = logging.getLogger(__name__)

SAME_VALUE = frozenset(f"aten.{x}" for x in ["lift_fresh_copy", "lift_fresh", "detach", "detach_"])


@dataclass
class Captured:
    """A graph in the dialect, with what is known of its inputs."""

    module: fx.GraphModule
    inputs: dict[fx.Node, tuple[str, str]] = field(default_factory=dict)
    """The short name of each input and where it comes from, in words."""
    prefix: str = ""
    """The path of the module that the graph's own paths start from."""
    is_root: bool = True
    """The graph starts at the model itself. One that starts at a part of it, after a graph break,
    may serve several such parts, and its paths are those of the first."""
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    """Inputs whose value never changes, or is looked at in each call."""
    parameters: dict[str, fx.Node] | None = None
    """In an exported graph, the input that holds each parameter and buffer of the model; in a graph
    of the lazy door None."""
    recipes: dict[int, Made] = field(default_factory=dict)
    """How inputs of these positions were made, by another graph of the model."""
    remade: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Where the graph makes them anew, and the inputs themselves."""
    notes: list[str] = field(default_factory=list)
    """What went less well than the report of each site says."""
    written: frozenset[fx.Node] = frozenset()
    """Tensors whose memory an operation of the graph still writes to: their value is not a
    formula."""

    given: dict[str, fx.Node] = field(default_factory=dict)
    """Inputs of an exported graph that hold what the user gives to passes: `labels`, and
    `patches.<site>`."""
    past: dict[str, fx.Node] = field(default_factory=dict)
    """Inputs of an exported graph that hold the states of earlier calls, by name."""
    present: dict[str, fx.Node] | None = None
    """What passes leave in it for the next call, by name; None if it hands nothing on."""
    without_grad: frozenset[fx.Node] = frozenset()
    """Nodes in a region that records no gradient, in a graph that does."""
    autocast: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    """For each node in an autocast region of the graph, the dtype of its products; what the node's
    fake value says of it is not true there."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def is_exported(self) -> bool:
        """The graph is that of an exported program: it may hold operations of torch alone."""
        return self.parameters is not None

    def parameter(self, name: str) -> fx.Node | None:
        """The input of an exported graph that holds the parameter.

        Raises:
            CaptureError: if the graph has inputs for parameters, and none for this one.
        """
        if self.parameters is None:
            return None
        if name not in self.parameters:
            raise CaptureError(f"{name} was added after the model was exported; run it once first")
        return self.parameters[name]

    @property
    def fake_mode(self) -> FakeTensorMode | None:
        """The mode of the fake tensors that the nodes carry."""
        values = (value_of(n) for n in self.graph.nodes)
        return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a tensor that the graph itself holds."""
        if node.op == "call_function" and op_name(node) in SAME_VALUE:
            return self.constant(cast(fx.Node, node.args[0]))
        if node.op != "get_attr":
            return self.constants.get(node)
        value: Any = self.module
        for part in cast(str, node.target).split("."):
            value = getattr(value, part)
        plain = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter | FakeTensor)
        return value if plain else None

    def origin(self, node: fx.Node) -> tuple[str, str]:
        """A short name for a tensor, and where it comes from in words."""
        if node in self.inputs:
            return self.inputs[node]
        if node.op == "get_attr":
            return str(node.target).rpartition(".")[2].strip(
                "_"
            ) or "constant", f"constant {node.target}"
        name = op_name(node).removeprefix("aten.").strip("_") or node.name
        path = self.path(node)
        return name, f"{op_name(node) or node.name}{f' in {path}' if path else ''}"

    def path(self, node: fx.Node) -> str:
        """The module that computes the node, from the root of the model."""
        path = module_path(node)
        return ".".join(x for x in ("" if self.is_root else self.prefix, path) if x)

    def overwritten(self, node: fx.Node, end: fx.Node) -> bool:
        """The tensor is written to after it was first read on the way to `end`, and before
        `end`."""
        if node not in self.written:
            return False
        memory = same_memory(node)
        above, open_nodes = {end}, [end]
        while open_nodes:
            new = [x for x in open_nodes.pop().all_input_nodes if x not in above]
            above.update(new)
            open_nodes.extend(new)
        readers = {u for x in memory for u in x.users} & above
        first = min((u for u in readers if not is_view(u) and u >= node), default=end)
        return any(first <= w < end and memory & set(writes_of(w)) for w in self.graph.nodes)

    def shape_sources(self) -> dict[Symbol, tuple[int, int | None]]:
        """For each shape symbol, the position of an input that gives it: an integer input, or a
        dimension of a tensor."""
        found: dict[Symbol, tuple[int, int | None]] = {}
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        for position, node in enumerate(inputs):
            value = value_of(node)
            if isinstance(value, torch.SymInt) and isinstance(as_size(value), Symbol):
                found.setdefault(cast(Symbol, as_size(value)), (position, None))
        for position, node in enumerate(inputs):
            if isinstance(value_of(node), torch.Tensor):
                for dim, size in enumerate(value_of(node).shape):
                    if isinstance(as_size(size), Symbol):
                        found.setdefault(cast(Symbol, as_size(size)), (position, dim))
        return found


@contextmanager
def capturing(recompiles: int = 256) -> Iterator[list[str]]:
    """Dynamo's settings while one of our models is called; the process's own settings are back
    afterwards.

    `specialize_float` keeps float attributes such as a scale as numbers, which re-tracing needs.
    `suppress_errors` runs code that torch cannot trace as it is, as it ran before. The limit on
    recompilation is raised because Dynamo counts it per class of module, and falls back to eager
    silently beyond it.

    Yields:
        The reasons why torch could not trace a part of the model, one a part, as they come.
    """
    with (
        torch._dynamo.config.patch(
            specialize_float=True,
            suppress_errors=True,
            recompile_limit=max(recompiles, torch._dynamo.config.recompile_limit),
            accumulated_recompile_limit=max(
                4 * recompiles, torch._dynamo.config.accumulated_recompile_limit
            ),
        ),
        _quiet_tracing() as lost,
    ):
        yield lost


class _Lost(logging.Filter):
    """Takes what torch logs of code that it cannot trace, for the report to say; of all else it
    lets pass what is at the level that the logger shows."""

    def __init__(self, thread: int, level: int) -> None:
        super().__init__()
        self.reasons: list[str] = []
        self.thread = thread
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or record.thread != self.thread:
            return record.levelno >= self.level
        self.reasons.append(first_line(error))
        return False


OF_TRACING = (
    "Dynamo detected a call to a `functools.lru_cache`",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "<class 'torch.autograd.function.Function'> should not be instantiated",
)
"""What torch warns of while it traces a model: its own ways, about which a user can do nothing."""


_tracing = threading.local()


@contextmanager
def _quiet_tracing() -> Iterator[list[str]]:
    """No warnings of `OF_TRACING`, while torch traces; a call that traces nothing is left alone.
    Yields what torch says of code that it cannot trace.

    Python forgets which warnings it has shown whenever filters change, so they must not change in
    every call. Of calls within calls only the outermost does something.
    """
    if getattr(_tracing, "quiet", False):
        yield []
        return
    from torch._dynamo.callback import callback_handler  # Dynamo takes a second to import

    filters, own = ExitStack(), threading.get_ident()

    def start(_: Any) -> None:
        if threading.get_ident() != own:
            return
        filters.enter_context(warnings.catch_warnings())
        for text in OF_TRACING:
            warnings.filterwarnings("ignore", message=re.escape(text))

    def end(_: Any) -> None:
        if threading.get_ident() == own:
            filters.close()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    _tracing.quiet = True
    logger = logging.getLogger("torch._dynamo.convert_frame")
    shown = logger.getEffectiveLevel()
    lost = _Lost(own, shown)
    logger.addFilter(lost)
    quiet = logging_at(logger.name, logging.WARNING) if shown > logging.WARNING else nullcontext()
    try:
        with quiet:
            yield lost.reasons
    finally:
        logger.removeFilter(lost)
        _tracing.quiet = False
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
        filters.close()


def from_dynamo(
    gm: fx.GraphModule,
    names: Mapping[int, str],
    arguments: Sequence[str] = (),
    handed: Handed | None = None,
) -> Captured:
    """The graph that Dynamo gave to a backend, in pre-dispatch ATen.

    Args:
        gm: a graph of torch functions, whose inputs carry fake tensors.
        names: the path of each parameter and buffer of the model, by `id`.
        arguments: the names of the positional arguments of the model's forward.
        handed: masks that other graphs of the model have made. Where an input is one of them, the
            graph makes it anew, from inputs that come after its own.

    Raises:
        CaptureError: if torch cannot trace it; the message carries torch's reason.
    """
    keep_random_state(gm)
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["example_value"] for n in given]
    mode = next((x.fake_mode for x in fakes if isinstance(x, FakeTensor)), None)
    if mode is None:
        raise CaptureError("a graph without tensor inputs has no fake tensors to trace with")
    recipes = _recipes(given, handed)
    with torch.fx.traceback.preserve_node_meta(), enable_python_dispatcher():
        try:
            module = _traced(gm, fakes, recipes, mode)
        except Exception as error:
            if not recipes:
                raise _not_traced(error) from error
            recipes = {}
            try:
                module = _traced(gm, fakes, recipes, mode)
            except Exception as again:
                raise _not_traced(again) from again
    captured = Captured(module, is_root=False, recipes=recipes)
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, source in zip(inputs, given, strict=False):
        captured.inputs[node] = _described(source, names, arguments, captured)
    origins = [x for way in recipes.values() for x in way.recipe.origins]
    captured.inputs |= dict(zip(inputs[len(given) :], origins, strict=True))
    normalize(module)
    captured.remade = _remade(module.graph, [inputs[n] for n in recipes])
    captured.written = written_nodes(module.graph)
    captured.without_grad, captured.autocast = regions(module.graph)
    captured.constants = _bands(captured, given)
    return captured


def _not_traced(error: Exception) -> CaptureError:
    return CaptureError(f"torch could not re-trace a graph of the model: {first_line(error)}")


def _recipes(given: Sequence[fx.Node], handed: Handed | None) -> dict[int, Made]:
    """How each input was made that another graph has made, by position."""
    found = {}
    for place, source in enumerate(given):
        arg = source.meta.get("grapharg")
        made = handed.find(getattr(arg, "example", None)) if handed and arg is not None else None
        if made is not None:
            found[place] = made.way()
    return found


def _remade(graph: fx.Graph, masks: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node of each mask that the graph makes anew, with the input that it stands for; the graph
    gives them no longer."""
    if not masks:
        return {}
    (output,) = graph.find_nodes(op="output")
    results, remade = cast(Any, output.args[0])
    output.args = (results,)
    return dict(zip(remade, masks, strict=True))


def _bands(captured: Captured, given: Sequence[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The buffers, and other tensors that modules hold, whose values are those of a formula.

    Args:
        given: the inputs of the graph that Dynamo gave, in the same order.
    """
    found = {}
    inputs = (n for n in captured.graph.nodes if n.op == "placeholder")
    for node, source in zip(inputs, given, strict=False):
        arg = source.meta.get("grapharg")
        held = getattr(arg, "example", None) if arg is not None else None
        plain = isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter | FakeTensor)
        if not plain or node in captured.written or "L['self']" not in _source_text(arg):
            continue
        if band_of(cast(torch.Tensor, held)) is not None:
            found[node] = cast(torch.Tensor, held)
    return found


def _traced(
    gm: fx.GraphModule, fakes: Sequence[Any], ways: Mapping[int, Made], mode: FakeTensorMode
) -> fx.GraphModule:
    """The graph in ATen. Should writing what repeats itself fail, everything is traced.

    Where masks are made anew, their leaves are inputs after those of the graph, and the masks stand
    beside its results.
    """
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    leaves = [way.leaves_like(fakes[n], mode) for n, way in ways.items()]
    for repeats in (True, False):
        tracing = Tracing(gm, repeats)

        def run(*args: Any, tracing: Tracing = tracing) -> Any:
            own, more = list(args[: len(fakes)]), iter(args[len(fakes) :])
            for n, way in ways.items():
                own[n] = way.again(own[n], [next(more) for _ in way.recipe.leaves])
            versions = [own[n]._version for n in ways]
            results = tracing.run(*own)
            if versions != [own[n]._version for n in ways]:
                raise CaptureError("a mask that another graph made is written to")
            return (results, [own[n] for n in ways]) if ways else results

        try:
            module = make_fx(run, tracing_mode="fake", pre_dispatch=True)(
                *fakes, *(x for xs in leaves for x in xs)
            )
            log.debug("%d calls traced, %d repeated", tracing.traced, tracing.repeated)
            if any(isinstance(x, FakeTensor) for x in (*vars(module).values(), *module.buffers())):
                raise CaptureError("values of a transform such as vmap are hidden from its tracer")
            return module
        except Exception:
            # a transform that the graph had begun has to end with it
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            if not tracing.repeated:
                raise
    raise AssertionError


def _described(
    node: fx.Node, names: Mapping[int, str], arguments: Sequence[str], captured: Captured
) -> tuple[str, str]:
    """Name and origin of an input of a Dynamo graph; learns the prefix of the graph's paths on the
    way."""
    arg = node.meta.get("grapharg")
    text = _source_text(arg)
    local = clean_path(text)
    example = getattr(arg, "example", None) if arg is not None else None
    full = names.get(id(example)) if isinstance(example, torch.Tensor) else None
    if full is not None:
        if text.startswith("L['self']") and full == local:
            captured.is_root = True
        elif text.startswith("L['") and full.endswith(f".{local}"):
            captured.prefix = full[: -len(local)].strip(".")
        kind = "parameter" if isinstance(example, nn.Parameter) else "buffer"
        return full.rpartition(".")[2], f"{kind} {full}"
    position = re.match(r"L\['args'\]\[(\d+)\]$", text)
    if position is not None and int(position[1]) < len(arguments):
        name = arguments[int(position[1])]
        return name, f"input {name}"
    name = text.replace("L['kwargs']", "L").rpartition("['")[2].partition("'")[0] or node.name
    if not name.isidentifier():
        name = node.name.strip("_").removeprefix("l_")
    return name, f"input {name}"


def _source_text(arg: Any) -> str:
    source = getattr(arg, "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """The whole model as one graph, ahead of time.

    Raises:
        CaptureError: if torch cannot export it; the message carries torch's reason and what to try.
    """
    try:
        with warnings.catch_warnings(), uncompiled(model):
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}: {first_line(error)}. "
            "Try inputs of another shape, or the lazy door, rewriter.optimize(model)."
        ) from error


def from_exported(program: torch.export.ExportedProgram) -> Captured:
    """The graph of an exported program, with its inputs named."""
    captured = Captured(program.graph_module, parameters={})
    signature = program.graph_signature
    for node in captured.graph.nodes:
        if node.op != "placeholder":
            continue
        for kind, table in (
            ("parameter", signature.inputs_to_parameters),
            ("buffer", signature.inputs_to_buffers),
        ):
            if node.name in table:
                cast(Any, captured.parameters)[table[node.name]] = node
                captured.inputs[node] = (
                    table[node.name].rpartition(".")[2],
                    f"{kind} {table[node.name]}",
                )
        name = signature.inputs_to_lifted_tensor_constants.get(node.name)
        if name is not None and isinstance(program.constants[name], torch.Tensor):
            captured.constants[node] = program.constants[name]
        captured.inputs.setdefault(node, (node.name, f"input {node.name}"))
    normalize(captured.module)
    captured.written = written_nodes(captured.graph)
    return captured


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model as it is without a compiled call, of its own or of a part."""
    saved = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in saved:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in saved.items():
            module._compiled_call_impl = call


def regions(graph: fx.Graph) -> tuple[frozenset[fx.Node], dict[fx.Node, torch.dtype]]:
    """The nodes in regions without gradients, and those in regions with autocast."""
    without_grad: set[fx.Node] = set()
    casts: dict[fx.Node, torch.dtype] = {}
    may_record = records = torch.is_grad_enabled()
    entered: dict[fx.Node, torch.dtype | None] = {}
    for node in graph.nodes:
        match getattr(node.target, "__name__", ""):
            case "_set_grad_enabled":
                records = bool(node.args[0])
            case "_enter_autocast":
                device, dtype, enabled = cast("tuple[str, Any, bool]", node.args[:3])
                dtype = torch.get_autocast_dtype(device) if dtype is None else dtype
                entered[node] = dtype if enabled else None
            case "_exit_autocast":
                entered.pop(cast(fx.Node, node.args[0]), None)
            case _:
                if may_record and not records:
                    without_grad.add(node)
                inner = next(reversed(entered.values()), None)
                if inner is not None:
                    casts[node] = inner
    return frozenset(without_grad), casts


def first_line(error: BaseException) -> str:
    """torch's reason without its advice and traces."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return lines[0][:300] if lines else type(error).__name__
