"""The pipeline: capture, find, lift, check, rewrite, lower; and its public doors."""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx, nn

from rewriter import lowering
from rewriter.additions import (
    additions_of,
    discard,
    forget,
    given_to,
    not_asked_for,
    without_additions,
)
from rewriter.assemble import as_tensors, assembled, insert_all
from rewriter.capture import Captured, capturing, first_line, from_dynamo
from rewriter.decide import Planned, State, layer_count, plan_of, split_request
from rewriter.errors import (
    CaptureError,
    InputError,
    NotAppliedWarning,
    PassError,
    RewriterError,
    SelectorError,
)
from rewriter.find import softmaxes
from rewriter.handed import recipes_of
from rewriter.isolation import COMPILED, kept_buffers
from rewriter.passbase import Pass, Request, unmatched
from rewriter.registry import read_requests
from rewriter.report import Report, SiteReport
from rewriter.tables import TakenForGranted, band_of
from rewriter.watch import Watched, watched

__all__ = [
    "auxiliary_loss",
    "inspect",
    "optimize",
    "reinstalled",
    "report_of",
    "requests_of",
    "restore",
    "rewrite_graph",
    "target_of",
]

DEFAULT = ("fuse",)


_STATES: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()


def optimize(
    model: nn.Module, *passes: str | Pass | Request, target: str = "auto", inputs: Any = None
) -> nn.Module:
    """Rewrites the attention of a model, in place and lazily: graphs are captured when the model is
    next called.

    Args:
        model: any module. The same object is returned; `generate`, training and `state_dict` keep
            working.
        passes: requests such as `"sparse.window(window=256) @ 4-7"`, passes made in Python, or
            nothing, which means `"fuse"`: only exact rewrites, no function changes. Sites that no
            request selects stay as they are.
        target: `"auto"` picks an implementation by device and shape; a name (`"reference"`,
            `"torch"`, `"triton"`) asks for it, and the first call of the model raises LoweringError
            where it cannot be had.
        inputs: one call's inputs, with which the model is run once, without gradients; its buffers
            stay as they are. Passes that add parameters (routers, feature maps, gates, sinks) make
            them at the first call: give inputs, or call the model once, before you make an
            optimiser.

    The model runs compiled from then on, by what rewrites it: `torch.compile` around it and
    `model.compile()` add nothing.

    On a model that is optimized already the new requests stand in the place of the old ones. What
    passes added stays, trained, where the new requests ask for it too; the rest is gone.

    Raises:
        PassError: an unknown pass or option, or a value out of range.
        SelectorError: a selector that cannot be read or, at the first call of the model, one that
            matches no site.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"optimize takes a torch.nn.Module, got {type(model).__name__}")
    requests = read_requests(passes or DEFAULT)
    lowering.check_target(target)
    _check_layers(requests, model)
    before = {r.action.name for r in requests_of(model)}
    if before and before.isdisjoint(r.action.name for r in requests):
        discard(model)
    _uninstall(model)
    given_to(model).losses.clear()
    held = additions_of(model)
    if held is not None:
        held.asked.clear()
    _install(model, State(requests, target, prunes=bool(before)))
    if inputs is not None:
        args, kwargs = call_arguments(inputs)
        with torch.no_grad(), kept_buffers(model):
            model(*args, **kwargs)
    return model


def _run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What is compiled: a frame of ours, because Dynamo does not start at one of `torch.nn`."""
    call: Any = self._call_impl
    return call(*args, **kwargs)


def _install(model: nn.Module, state: State) -> None:
    alive = weakref.ref(model)
    # A code object of its own: Dynamo keeps graphs and counts recompilations by code object.
    run = FunctionType(_run.__code__.replace(), _run.__globals__)
    compile_: Any = torch.compile
    compiled = compile_(run, backend=_Backend(alive, state), dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        module = cast(nn.Module, alive())
        _keep_image_size(module, args, kwargs)
        reasons = torch._dynamo.utils.graph_break_reasons
        known = len(reasons)
        given_to(module).losses.clear()
        held = additions_of(module)
        if held is not None:
            held.fresh.clear()
        if state.gave_up:
            return cast(Any, module)._call_impl(*args, **kwargs)
        with capturing() as lost:
            try:
                out = compiled(module, *args, **kwargs)
            except Exception as error:
                if not _may_run_again(module, state, error, args, kwargs):
                    raise
                # what is wrong with the inputs is said here once more, by the model itself
                out = cast(Any, module)._call_impl(*args, **kwargs)
                state.gave_up, lost = True, [f"compiled it fails, {first_line(error)}"]
        for why in lost:
            state.notes.append(f"torch cannot trace all of the model, that runs as it was: {why}")
        out = _with_losses(module, out)
        state.breaks |= {str(r.user_stack[-1:]) for r in reasons[known:]}
        failure = state.failure or (None if state.checked else _unmatched(state, module))
        if failure is not None:
            _uninstall(module)
            held = additions_of(module)
            if held is not None:
                discard(module, held.fresh)
            raise failure
        if not state.checked:
            state.checked = True
            if not state.graphs:
                state.notes.append("torch captured no graph, so the model runs as it was")
            if state.prunes:
                discard(module, not_asked_for(module, {s.site.name for s in state.sites}))
            for message in _idle(state):
                warnings.warn(message, NotAppliedWarning, stacklevel=2)
        return out

    known = _STATES.get(model)
    state.replaced = model.__dict__.get(COMPILED) if known is None else known.replaced
    _STATES[model] = state
    model._compiled_call_impl = call
    model.__dict__ |= _hooks(model)


def _hooks(model: nn.Module) -> dict[str, Any]:
    """What torch and Python find on an optimized model in the place of their own."""
    alive = weakref.ref(model)
    return {"__deepcopy__": _Copier(alive), "compile": _Compiler(alive)}


def _may_run_again(
    model: nn.Module, state: State, error: Exception, args: Any, kwargs: Any
) -> bool:
    """After a call that failed under torch's compiler the original may run: nothing that was asked
    for is lost but speed, and no cache or running statistic sees the tokens twice."""
    exact = all(r.action.contract == "exact" for r in state.requests)
    if isinstance(error, RewriterError) or not exact or model.training or state.watcher is not None:
        return False
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return all(isinstance(x, torch.Tensor | int | float | str | None) for x in leaves)


@dataclass(frozen=True)
class _Compiler:
    """What `model.compile()` finds: torch's own would put the original in the place of the
    rewritten model."""

    model: weakref.ref[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        state = _STATES[cast(nn.Module, self.model())]
        state.notes.append("model.compile() did nothing: an optimized model is compiled already")


@dataclass(frozen=True)
class _Copier:
    """What `copy.deepcopy` finds on an optimized model: torch forgets how a module was compiled,
    and a copy would be the original with parameters that nothing reads."""

    model: weakref.ref[nn.Module]

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        model = cast(nn.Module, self.model())
        state = _STATES[model]
        own = {name: model.__dict__.pop(name) for name in _hooks(model)}
        try:
            twin = copy.deepcopy(model, memo)
        finally:
            model.__dict__ |= own
        if model._compiled_call_impl is None:  # set aside, to run the original for a while
            return twin
        _install(twin, State(state.requests, state.target, only=state.only))
        given_to(twin).gifts.extend(given_to(model).gifts)
        return twin

    def __reduce__(self) -> Any:
        raise InputError(
            "an optimized model cannot be pickled: what it computes is compiled; use "
            "rewriter.save(model, DIR), its state_dict(), or rewriter.restore(model) first"
        )


def _keep_image_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes every dimension of an image but the batch a constant of the graph; each image size gets
    its own.

    With symbolic heights and widths, torch spends minutes on the guards of a model that pads and
    windows its input.
    """
    name = getattr(model, "main_input_name", None)
    given = (
        kwargs.get(name)
        if isinstance(name, str) and name in kwargs
        else next(iter((*args, *kwargs.values())), None)
    )
    if isinstance(given, torch.Tensor) and given.is_floating_point() and given.dim() >= 4:
        torch._dynamo.mark_static(given, list(range(1, given.dim())))


def _with_losses(model: nn.Module, out: Any) -> Any:
    """The outputs, with the loss terms of the call's passes added to the loss that the model
    returns, so that every trainer reaches them."""
    if not given_to(model).losses:
        return out
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return out
    loss = loss + auxiliary_loss(model).to(loss)
    if isinstance(out, MutableMapping):
        out["loss"] = loss
    elif isinstance(out, tuple):  # with names
        return cast(Any, out)._replace(loss=loss)
    elif dataclasses.is_dataclass(out):
        return dataclasses.replace(cast(Any, out), loss=loss)
    else:
        out.loss = loss
    return out


def auxiliary_loss(model: nn.Module) -> torch.Tensor:
    """The loss terms of the last training call, such as the load balance of routers: a scalar.

    Where a model returns its loss by that name, as Hugging Face models do, the terms are part of it
    already; add them to a loss of your own.
    """
    losses = list(given_to(model).losses.values())
    return torch.stack([x.float() for x in losses]).sum() if losses else torch.zeros(())


def restore(model: nn.Module) -> nn.Module:
    """Gives the model back as it was, bit for bit; what passes added is gone, and what was given to
    them. Harmless on a model that was not optimized."""
    _uninstall(model)
    discard(model)
    forget(model)
    return model


def _uninstall(model: nn.Module) -> None:
    state = _STATES.pop(model, None)
    if state is None:
        return
    for name in (*_hooks(model), COMPILED):
        model.__dict__.pop(name, None)
    if state.replaced is not None:
        model.__dict__[COMPILED] = state.replaced


@contextmanager
def reinstalled(
    model: nn.Module,
    *,
    requests: Sequence[Request] | None = None,
    target: str | None = None,
    only: Collection[str] | None = None,
    watcher: Callable[[Watched, tuple[Any, ...]], Any] | None = None,
) -> Iterator[Callable[[], Report]]:
    """For a while, the model is optimized anew, another way; afterwards it is as it was before.

    Args:
        model: an optimized model, or a plain one.
        requests: what to optimize it with; None for what it was optimized with.
        target: None for the one it was optimized for.
        only: names of the sites that may be rewritten; None for all.
        watcher: runs each captured graph; its result is the graph's.

    Yields:
        What gives the report of the temporary state.
    """
    before = _STATES.get(model), model.__dict__.get(COMPILED)
    state = State(
        requests_of(model) if requests is None else tuple(requests),
        target_of(model) if target is None else target,
        only=None if only is None else frozenset(only),
        watcher=watcher,
    )
    _install(model, state)
    try:
        yield state.report
    finally:
        _uninstall(model)
        if before[0] is not None:
            _STATES[model] = before[0]
            model.__dict__ |= _hooks(model)
        if before[1] is not None:
            model.__dict__[COMPILED] = before[1]


def requests_of(model: nn.Module) -> tuple[Request, ...]:
    """The requests that the model was optimized with; none if it was not."""
    state = _STATES.get(model)
    return state.requests if state is not None else ()


def target_of(model: nn.Module) -> str:
    """The implementation that was asked for; `"auto"` if none was."""
    state = _STATES.get(model)
    return state.target if state is not None else "auto"


def report_of(model: nn.Module) -> Report:
    """What has been found and done so far. Empty before the first call of an optimized model."""
    state = _STATES.get(model)
    return state.report() if state is not None else Report()


def inspect(model: nn.Module, inputs: Any = None, *passes: str | Pass | Request) -> Report:
    """Every attention of a model, with its formula, and what `optimize` does about it.

    Args:
        model: a plain module, which is the same afterwards, or an optimized one.
        inputs: one call's inputs: a mapping of keyword arguments, a sequence of arguments, or one
            tensor. May be left out for an optimized model that has run.
        passes: what to inspect the model with. Nothing means those that it is optimized with, and
            `"fuse"` for a plain model.

    Raises:
        InputError: if there is nothing to run the model with.
        CaptureError: if no graph of the model could be captured.
    """
    state = _STATES.get(model)
    if state is not None and state.graphs and inputs is None and not passes:
        return state.report()
    if inputs is None:
        raise InputError("inspect needs inputs to run the model with: a dict, a tuple, or a tensor")
    args, kwargs = call_arguments(inputs)
    with torch.no_grad(), kept_buffers(model):
        if state is not None and not passes:
            model(*args, **kwargs)
            return _nonempty(state.report(), model)
        requests = read_requests(passes or DEFAULT)
        _check_layers(requests, model)
        with without_additions(model), reinstalled(model, requests=requests) as report:
            model(*args, **kwargs)
            return _nonempty(report(), model)


def _nonempty(report: Report, model: nn.Module) -> Report:
    if not report.graphs:
        raise CaptureError(
            f"torch captured no graph of {type(model).__name__}; "
            "run with TORCH_LOGS=graph_breaks to see where it gives up"
        )
    return report


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what a user calls inputs."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), {str(k): v for k, v in inputs.items()}
    if isinstance(inputs, Sequence):
        return tuple(inputs), {}
    raise InputError(f"inputs are a dict, a tuple or a tensor, got {type(inputs).__name__}")


# --- requests against the model -------------------------------------------------------------------


def _check_layers(requests: Sequence[Request], model: nn.Module) -> None:
    """Refuses layers beyond every list of modules before anything is captured."""
    count = layer_count(model)
    for request in requests:
        layers = request.selector.layers
        outside = layers.outside(count) if layers is not None else ()
        if outside:
            has = (
                f"the model has layers 0 to {count - 1}"
                if count
                else "the model has no numbered layers"
            )
            raise SelectorError(f"{request.text}: layer {outside[0]} does not exist; {has}")


def _unmatched(state: State, model: nn.Module) -> SelectorError | None:
    """What is wrong if a selector matches no site."""
    sites = [s.site for s in state.sites if s.is_attention]
    asked = [r for r in state.requests if r.selector.text]
    if not state.graphs or not asked:
        return None
    messages = unmatched(asked, sites, layer_count(model, sites[0].path if sites else ""))
    return SelectorError(messages[0]) if messages else None


def _idle(state: State) -> list[str]:
    """One sentence for each pass that changes the function and was declined by every site."""
    sites = [s for s in state.sites if s.is_attention]
    changing = [r.text for r in state.requests if r.action.contract != "exact"]
    applied = {text for s in sites for text in s.passes}
    messages = []
    for text in (text for text in changing if text not in applied):
        if not sites:
            messages.append(f"{text} was applied nowhere: no attention was found in the model")
            continue
        first = next((s for s in sites if text in s.reason), sites[0])
        same = "" if applied & {*changing} else ", and the model computes what it did before"
        why = f"{first.site.name}: {first.reason.removeprefix(f'{text}: ')}"
        messages.append(f"{text} was applied nowhere{same}: {why}; print(rewriter.inspect(model))")
    return messages


# --- the backend ----------------------------------------------------------------------------------


@dataclass
class _Backend:
    """What Dynamo calls with each graph of the model."""

    model: weakref.ref[nn.Module]
    state: State

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        model = cast(nn.Module, self.model())
        number = self.state.graphs
        self.state.graphs += 1
        compiling = torch._guards.CompileContext.current_compile_id()
        self.state.frames.append(-1 if compiling is None else int(compiling.frame_id or 0))
        names = {id(p): n for n, p in (*model.named_parameters(), *model.named_buffers())}
        arguments = list(signature(model.forward).parameters)
        handed = self.state.handed
        return self._made(gm, lambda: from_dynamo(gm, names, arguments, handed), number)

    def _made(
        self, gm: fx.GraphModule, capture: Callable[[], Captured], number: int
    ) -> Callable[..., Any]:
        """What runs in the place of the graph."""
        model = cast(nn.Module, self.model())
        sites: list[SiteReport] = []
        try:
            captured = capture()
            planned = plan_of(captured, model, self.state, number)
            sites = planned.reports
            refusal = split_request(self.state.sites, sites, self.state.requests)
            if refusal is not None:
                return _refusing(refusal)
            guarded = self._guard(gm, captured, number)
            run = self._run(gm, captured, planned, number)
            self.state.notes.extend(captured.notes)
            self.state.sites.extend(sites)
            return guarded(run)
        except InputError as error:
            self.state.failure = error
            return cast(Callable[..., Any], gm)
        except CaptureError as error:
            why = str(error)
        except Exception as error:
            why = f"an internal error: {type(error).__name__}: {error}"
            kept = {"decision": "kept", "lowering": "original", "reason": "an internal error"}
            self.state.sites.extend(
                replace(s, passes=(), **cast(Any, kept)) if s.decision == "rewritten" else s
                for s in sites
            )
        meant = [r.text for r in self.state.requests if r.action.contract != "exact"]
        if meant and _has_softmax(gm):
            return _refusing(
                f"graph {number} cannot be rewritten ({why}), and {', '.join(meant)} changes what "
                "the model computes: as it is, this graph would be the original. "
                "rewriter.restore(model) gives the original"
            )
        self.state.notes.append(f"graph {number} runs as it was: {why}")
        return cast(Callable[..., Any], gm)

    def _guard(
        self, gm: fx.GraphModule, captured: Captured, number: int
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What makes the run of a graph look, in each call, at what was taken for granted of its
        inputs: the values of buffers, and how masks were made. When that is no longer so, the graph
        is planned anew. What the graph itself makes for others is remembered."""
        inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
        places = {n: captured.constants[x] for n, x in enumerate(inputs) if x in captured.constants}
        handed, recipes, makes = self.state.handed, captured.recipes, recipes_of(captured)
        granted = TakenForGranted(places)
        plain = as_tensors(captured) if places or recipes else captured

        def again(args: Sequence[Any]) -> Captured:
            new = [n for n in plain.graph.nodes if n.op == "placeholder"]
            plain.constants = {new[n]: args[n] for n in places if band_of(args[n]) is not None}
            return plain

        def remembering(run: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                out = run(*args)
                for n, recipe in makes.items():
                    handed.keep(out[n], recipe, args)
                return out

            return call if makes else run

        def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
            run = remembering(run)
            if not places and not recipes:
                return run
            other: list[Callable[..., Any]] = []

            def call(*args: Any) -> Any:
                if other:
                    return other[0](*args)
                leaves, changed = handed.leaves_of(args, recipes), granted.changed(args)
                if leaves is not None and changed is None:
                    return run(*args, *leaves)
                self.state.sites = [s for s in self.state.sites if s.graph != number]
                other.append(self._made(gm, lambda: again(args), number))
                what = next(iter(recipes)) if changed is None else changed
                origin = captured.inputs[inputs[what]][1]
                self.state.notes.append(f"graph {number}: {origin} changed, and was read anew")
                return other[0](*args)

            return call

        return guarded

    def _run(
        self, gm: fx.GraphModule, captured: Captured, planned: Planned, number: int
    ) -> Callable[..., Any]:
        model = cast(nn.Module, self.model())
        watcher, target = self.state.watcher, self.state.target
        if watcher is None:
            run = assembled(gm, captured, planned, target, model)
            self.state.softmaxes[number] = softmaxes(captured.graph)
            return run
        form = watched(captured, planned, target, model)
        return lambda *args: watcher(form, args)


def _has_softmax(gm: fx.GraphModule) -> bool:
    """The graph, or one inside it, normalises something: it may hold attention."""
    names = ("softmax", "scaled_dot_product", "flex_attention")
    nodes = (n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes)
    return any(
        any(name in str(getattr(n.target, "__name__", n.target)) for name in names)
        for n in nodes
        if n.op.startswith("call")
    )


def _refusing(message: str) -> Callable[..., Any]:
    """What runs in the place of a graph that does not fit the others of its model."""

    def refuse(*args: Any) -> Any:
        raise PassError(message)

    return refuse


def rewrite_graph(
    captured: Captured, model: nn.Module, requests: Sequence[Request], target: str = "auto"
) -> list[SiteReport]:
    """Rewrites a captured graph in place by the requests, whatever its lengths; used by the
    ahead-of-time door."""
    state = State(tuple(requests), target)
    planned = plan_of(captured, model, state, 0)
    insert_all(captured, [*planned.changed, *planned.fused], target, model)
    return planned.reports
