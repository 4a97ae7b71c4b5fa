"""The command `rewriter`: inspect, optimize, verify, export, passes.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 not equivalent, 2 a
usage or input error, 3 a mistake of ours, 130 interrupted. An error is one line; `--debug` adds
the traceback.
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from rewriter import registry
from rewriter.datasheet import data_sheet, list_view, sheet_view
from rewriter.errors import CaptureError, InputError, NotEquivalent, PassError, RewriterError
from rewriter.logs import logging_at

if TYPE_CHECKING:
    from torch import nn

    from rewriter.passbase import Request
    from rewriter.plan import Plan
    from rewriter.report import Report
    from rewriter.verify import VerifyReport

__all__ = ["app", "main"]

app = typer.Typer(
    name="rewriter",
    help="A compiler for attention: inspect, rewrite, verify and export Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Argument(help="A local Hugging Face directory.")]
Passes = Annotated[
    list[str] | None,
    typer.Option("--pass", help='For instance "sparse.window(window=64) @ 4-7"; may be repeated.'),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of the random text that is run.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report as a page, too.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the random batch that is run.")]


class Against(enum.Enum):
    """What `verify` compares with."""

    ORIGINAL = "original"
    REFERENCE = "reference"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    try:
        code = command.main(args=args, prog_name="rewriter", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except NotEquivalent as error:
        return _failed(args, error, 1)
    except RewriterError as error:
        return _failed(args, error, 2)
    except KeyboardInterrupt as error:
        return _failed(args, error, 130)
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            return _failed(args, error.__cause__, 130)
        return _failed(args, error, 2 if hasattr(error, "format_message") else 3)


def _failed(args: Sequence[str], error: BaseException, code: int) -> int:
    """Says what went wrong in one line. Usage errors of typer have `format_message`."""
    if "--debug" in args:
        traceback.print_exception(error)
    kind, text = type(error).__name__, str(error)
    if code == 130:
        kind, text = "Interrupted", "interrupted; nothing was left behind"
    elif hasattr(error, "format_message"):
        kind, text = "UsageError", f"{error.format_message()} (rewriter --help shows the usage)"
    elif code == 3:
        text = f"internal error, {kind}: {text}; run again with --debug and report it"
    line = " ".join(text.split())
    if "--json" in args:
        found: dict[str, Any] = {"error": line, "kind": kind}
        if isinstance(error, NotEquivalent):
            found["report"] = error.report.to_dict()
        print(json.dumps(found, ensure_ascii=False))
    print(f"rewriter: {line}", file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rewriter {version('rewriter')}")
        raise typer.Exit()


@app.callback()
def _options(
    show: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# --- commands ------------------------------------------------------------------------------------


@app.command("inspect")
def inspect_command(
    directory: Directory,
    passes: Passes = None,
    device: Device = "cpu",
    batch: Batch = 2,
    length: Length = 16,
    every: Annotated[
        bool, typer.Option("--every", help="A row for every site, those that are alike too.")
    ] = False,
    html: Html = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            metavar="SITE",
            help='Print the Triton kernels of one site instead: a layer, or "path=...".',
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the attention of a model: formula, mask, cost, and what the passes would do to it."""
    from rewriter.kernel_text import kernel_text
    from rewriter.optimize import inspect

    _check_page(html)
    requests = registry.read_requests(passes or ())
    with _working(debug) as step:
        model, plan = _open(directory, device, step)
        step("reading its attention")
        report = inspect(model, _inputs(model, batch, length), *plan.passes, *requests)
        if html is not None:
            report.save(html)
    if kernel is not None:
        text = kernel_text(report, kernel)
        print(json.dumps({"kernel": text}, ensure_ascii=False) if as_json else text, end="")
        return
    _emit(as_json, report.to_dict(), report.table(every=every))


@app.command("optimize")
def optimize_command(
    directory: Directory,
    out: Annotated[Path, typer.Option("--out", help="The new directory; must not exist.")],
    passes: Passes = None,
    verify: Annotated[bool, typer.Option(help="Compare with the original before saving.")] = True,
    device: Device = "cpu",
    batch: Batch = 2,
    length: Length = 16,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model and save it with its plan; without --pass, its function stays the same."""
    from rewriter import checkpoint
    from rewriter.optimize import inspect, optimize, requests_of
    from rewriter.verify import verify as compare

    requests = registry.read_requests(passes or ())
    checkpoint.check_output(out)
    compared = None
    with _working(debug) as step:
        model, plan = _open(directory, device, step)
        inputs = _inputs(model, batch, length)
        requests = (*plan.passes, *requests)
        changing = [r.text for r in requests if r.action.contract != "exact"]
        step("rewriting")
        checkpoint.apply_plan(directory, plan, model, requests or registry.read_requests(["fuse"]))
        report = inspect(model, inputs)
        _check_applied(requests_of(model), report)
        if verify:
            step("comparing with the original")
            forced = _everywhere(requests)
            if forced != requests:
                optimize(model, *forced, target=plan.target)
            compared = compare(model, model, inputs, gradients=False, raises=not changing)
            if forced != requests:
                optimize(model, *requests, target=plan.target)
                report = inspect(model, inputs)
        step(f"saving {out}")
        checkpoint.save(model, out, source=directory)
    found = report.to_dict() | {"out": str(out), "changes_function": changing}
    found["verify"] = compared.to_dict() if compared is not None else None
    _emit(as_json, found, report, *_verdict(changing, compared), f"saved {out}")


@app.command("verify")
def verify_command(
    directory: Annotated[Path, typer.Argument(help="The directory of the original.")],
    other: Annotated[Path, typer.Argument(help="The directory that is compared with it.")],
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = False,
    generate: Annotated[
        int | None, typer.Option(min=1, help="Compare this many greedy tokens too.")
    ] = None,
    against: Annotated[
        Against,
        typer.Option(help="Compare with the original, or with the dense reference of the passes."),
    ] = Against.ORIGINAL,
    memory: Annotated[
        bool,
        typer.Option(
            help="Measure what each site allocates; one is judged from 2^21 scores over batch and "
            "heads (2^28 on CUDA), and from a --length of 8 times its head dimension."
        ),
    ] = False,
    html: Html = None,
    device: Device = "cpu",
    batch: Batch = 2,
    length: Length = 16,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two models by the error-ratio rule; exit code 1 if they are not equivalent."""
    from rewriter import checkpoint
    from rewriter.verify import verify

    notes: list[str] = []
    changed: list[str] = []
    _check_page(html)
    with _working(debug) as step:
        original, first = _open(directory, device, step)
        if first.passes:
            notes.append(f"the plan of {directory} is left out: it is taken as the original model")
        model, plan = _open(other, device, step)
        if plan.passes:
            checkpoint.apply_plan(other, plan, model, _everywhere(plan.passes))
        step("comparing")
        inputs = _inputs(original, batch, length)
        report = verify(
            original,
            model,
            inputs,
            gradients=gradients,
            raises=False,
            generate=generate,
            against=cast(Any, against.value),
            memory=memory,
        )
        if html is not None:
            report.save(html)
        if plan.passes:
            changed = checkpoint.changed_sites(other, model)
            changed = [f"computed by another formula than the plan records: {x}" for x in changed]
    if report.ok or not as_json:
        found = report.to_dict() | {"changed_sites": changed, "command_notes": notes}
        _emit(as_json, found, report, *notes, *changed)
    report.raise_if_failed()


@app.command("export")
def export_command(
    directory: Directory,
    onnx: Annotated[Path, typer.Option("--onnx", help="The new ONNX file; must not exist.")],
    device: Device = "cpu",
    batch: Batch = 2,
    length: Length = 16,
    state: Annotated[
        bool,
        typer.Option(
            "--state", help="Hand states on, call by call: linear sums, block sums, labels."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model, rewritten or not, to ONNX, and check the file in ONNX Runtime."""
    from rewriter.checkpoint import apply_plan, check_output
    from rewriter.examples import continued
    from rewriter.export import export_onnx

    check_output(onnx)
    with _working(debug) as step:
        model, plan = _open(directory, device, step)
        apply_plan(directory, plan, model)
        step("exporting, and checking in ONNX Runtime")
        inputs = _inputs(model, batch, length)
        if state:
            inputs = continued(model, inputs)
        report = export_onnx(model, inputs, onnx, state=state)
    _emit(as_json, report.to_dict(), str(report))


@app.command("passes")
def passes_command(
    name: Annotated[str | None, typer.Argument(help="A pass; all of them if left out.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes, or show the data sheet of one."""
    if name is None:
        _emit(as_json, [data_sheet(kind) for kind in registry.PASSES], list_view(registry.PASSES))
    else:
        kind = registry.find(name)
        _emit(as_json, data_sheet(kind), sheet_view(kind))


# --- parts of commands ---------------------------------------------------------------------------


class _Step:
    """Shows what is being done, on a terminal only."""

    def __init__(self, console: Console) -> None:
        self.status = console.status("")

    def __call__(self, text: str) -> None:
        self.status.update(Text(f"{text} …"))


@contextlib.contextmanager
def _working(debug: bool) -> Iterator[_Step]:
    """Shows progress on stderr, and keeps what libraries print away from stdout."""
    with contextlib.ExitStack() as stack:
        step = _Step(Console(stderr=True))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not debug:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(logging_at("torch"))
        stack.enter_context(step.status)
        yield step


def _open(directory: Path, device: str, step: _Step) -> tuple[nn.Module, Plan]:
    """The model of a directory as it was before any rewriting, and its plan."""
    step(f"loading {directory}")
    from rewriter.checkpoint import open_directory

    with contextlib.suppress(ImportError):
        from transformers.utils import logging as hub_logging

        hub_logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
    return open_directory(directory, device=device)


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    from rewriter.examples import example_inputs

    return example_inputs(model, batch=batch, length=length)


def _check_page(html: Path | None) -> None:
    """Refuses a page that could not be written, before the work.

    Raises:
        InputError: the path is no .html file in a directory that exists.
    """
    if html is not None and (html.suffix != ".html" or not html.parent.is_dir() or html.is_dir()):
        raise InputError(f"--html {html}: give an .html file in a directory that exists")


def _everywhere(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The requests with fused code for the shortest inputs too, so that it is what is compared."""
    changes: dict[str, Any] = {"from_scores": 0}
    return tuple(
        replace(r, action=replace(r.action, **changes)) if "from_scores" in vars(r.action) else r
        for r in requests or registry.read_requests(["fuse"])
    )


def _check_applied(requests: Sequence[Request], report: Report) -> None:
    """Refuses to save what did not happen.

    Raises:
        CaptureError: no graph could be read; torch's reason is in the text.
        InputError: the model has no attention that is understood.
        PassError: a request was declined everywhere; the first reason is in the text.
    """
    if not report.attention:
        if not report.graphs or report.notes:
            reason = report.notes[0] if report.notes else "torch captured no graph of the model"
            raise CaptureError(f"{reason}; run with TORCH_LOGS=graph_breaks to see where it stops")
        raise InputError("no attention was found in the model, so there is nothing to rewrite")
    for request in requests:
        if any(request.text in line.passes for line in report.attention):
            continue
        reasons = [line.reason for line in report.attention if request.text in line.reason]
        why = reasons[0] if reasons else f"{request.text} selects no site that was understood"
        raise PassError(f"a pass was applied nowhere: {why}")


def _verdict(changing: Sequence[str], compared: VerifyReport | None) -> list[str]:
    if compared is None:
        return []
    if compared.ok:
        return ["equivalent to the original"]
    return [f"not equivalent to the original, as asked for by {'; '.join(changing)}"]


def _emit(as_json: bool, found: Any, *views: RenderableType) -> None:
    """The result on stdout."""
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for view in views:
        console.print(view, highlight=False, markup=False)
