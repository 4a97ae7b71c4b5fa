"""Rewritten checkpoints: a Hugging Face directory plus `rewriter.json`, the plan.

The directory stays what it was for everybody else: plain transformers loads the original model from
it. `load` loads that model and applies the plan again. Writing is atomic: files go to a hidden
directory beside the new one, which gets its name when everything is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rewriter.additions import restored_additions, saved_additions, without_additions
from rewriter.errors import CheckpointError
from rewriter.hub import check_device, check_directory, load_model, read_json
from rewriter.optimize import optimize, report_of, requests_of, target_of
from rewriter.passbase import Request
from rewriter.plan import FILE, Plan, config_of, parameters_of
from rewriter.report import Report

ADDED = "rewriter.safetensors"
"""The parameters that passes added."""

__all__ = ["apply_plan", "changed_sites", "check_output", "load", "open_directory", "save"]

_LEFT = (
    *(
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.pkl",
        "*.pickle",
        "*.h5",
        "*.msgpack",
    ),
    *("*.onnx", "*.onnx.data", "*.gguf", "*.tflite", "*.npz", "*.index.json", "*.py", FILE, ".*"),
)
"""What is not copied from a source directory: weights in any format, code, plans, hidden files."""


def save(model: nn.Module, directory: str | Path, *, source: str | Path | None = None) -> None:
    """Writes an optimized Hugging Face model and its plan to a new directory.

    Args:
        model: a model that `optimize` returned; its weights are written as they are now.
        directory: must not exist yet; its parent must.
        source: a directory whose tokenizer and other small files are copied. Default: the one that
            the model was loaded from, if that is a local one.

    Raises:
        CheckpointError: the model cannot be saved, the output exists, or the disk is full. Nothing
            is left behind then, and neither after Ctrl-C.
    """
    directory = Path(directory)
    config, write = (getattr(model, name, None) for name in ("config", "save_pretrained"))
    if config is None or not callable(write):
        raise CheckpointError(
            f"{type(model).__name__} is not a Hugging Face model; save its state_dict with "
            "safetensors, and call rewriter.optimize with the same passes after loading it"
        )
    if not requests_of(model):
        raise CheckpointError(
            "the model is not optimized, so there is no plan to save; call rewriter.optimize(model)"
            " first, or model.save_pretrained for a plain checkpoint"
        )
    check_output(directory)
    origin = _source_of(config, source)
    added, buffers = saved_additions(model)
    with _new_directory(directory) as partial, without_additions(model):
        write(str(partial))
        if added:
            save_file(added, partial / ADDED, metadata={"buffers": json.dumps(buffers)})
        if origin is not None:
            _copy_rest(origin, partial)
        plan = Plan(
            passes=requests_of(model),
            target=target_of(model),
            sites=_sites(report_of(model)),
            kind=type(model).__name__,
            config=config_of(read_json(partial / "config.json")),
            parameters=parameters_of(model),
            added={name: list(value.shape) for name, value in added.items()},
        )
        text = json.dumps(plan.to_dict(), indent=1, ensure_ascii=False)
        (partial / FILE).write_text(text + "\n", encoding="utf-8")


def load(directory: str | Path, *, device: str = "cpu") -> nn.Module:
    """The model of a directory that `save` wrote, optimized again by its plan.

    Args:
        directory: as `save` wrote it.
        device: where the model is put, "cpu" or "cuda".

    Raises:
        CheckpointError: the directory is not a checkpoint, not safe to load, or has no plan.
        PlanError: the plan does not fit the model; the text names the first difference.
    """
    if not (Path(directory) / FILE).exists():
        check_directory(Path(directory))
        raise CheckpointError(
            f"{directory} has no {FILE}: it is a plain checkpoint; load it with transformers and "
            "call rewriter.optimize(model)"
        )
    model, plan = open_directory(directory, device=device)
    return apply_plan(directory, plan, model)


def apply_plan(
    directory: str | Path, plan: Plan, model: nn.Module, passes: Sequence[Request] | None = None
) -> nn.Module:
    """Optimizes a model that was opened, with what its passes had learned when it was saved.

    Args:
        directory, plan, model: as `open_directory` took and gave them.
        passes: in the place of the plan's.

    Raises:
        CheckpointError, PlanError: the saved parameters are not there, or are others.
    """
    requests = plan.passes if passes is None else passes
    if requests:
        optimize(model, *requests, target=plan.target)
    _load_additions(Path(directory), plan, model)
    return model


def _load_additions(directory: Path, plan: Plan, model: nn.Module) -> None:
    """Puts the saved parameters of passes in their places."""
    file = directory / ADDED
    if not plan.added:
        return
    if not file.exists():
        raise CheckpointError(f"{directory} has no {ADDED}, which holds what its passes added")
    try:
        values = load_file(file)
        with safe_open(file, framework="pt") as opened:
            buffers = json.loads((opened.metadata() or {}).get("buffers", "[]"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    plan.check_added(file, {name: list(x.shape) for name, x in values.items()})
    restored_additions(model, values, buffers)


def open_directory(directory: str | Path, *, device: str = "cpu") -> tuple[nn.Module, Plan]:
    """The model of a directory before any rewriting, and its plan; without one, an empty plan.

    Raises:
        CheckpointError, PlanError: as `load`.
    """
    directory = Path(directory)
    check_device(device)
    config = check_directory(directory)
    plan = Plan(())
    if (directory / FILE).exists():
        plan = Plan.read(directory / FILE)
        plan.check_config(directory, config)
    model = load_model(directory, device=device)
    if plan.passes:
        plan.check_model(directory, model)
    return model, plan


def changed_sites(directory: str | Path, model: nn.Module) -> list[str]:
    """One sentence for each site that is computed by another formula than the plan records.

    Args:
        directory: as `save` wrote it.
        model: what `load` returned for it, after a run. Sites that did not run are not compared.
    """
    plan, now = Plan.read(Path(directory) / FILE), _sites(report_of(model))
    changed = []
    for name, found in now.items():
        recorded = {entry["after"]: entry["formula"] for entry in plan.sites.get(name, [])}
        new = [e for e in found if e["after"] not in recorded and recorded and e["after"]]
        changed += [
            f"{name}: {e['formula']}, recorded {' or '.join(recorded.values())}" for e in new
        ]
    return changed


def _sites(report: Report) -> dict[str, list[dict[str, Any]]]:
    """What was done to each site, by name; one entry for each formula that it was found with."""
    sites: dict[str, list[dict[str, Any]]] = {}
    for line in report.attention:
        before, after = line.site.spec, line.after
        entry = {
            "decision": line.decision,
            "before": before.digest() if before is not None else None,
            "after": after.digest() if after is not None else None,
            "formula": str(after if after is not None else before),
            "passes": list(line.passes),
            "reason": line.reason,
            "spec": after.to_dict() if after is not None else None,
        }
        found = sites.setdefault(line.site.name, [])
        if entry not in found:
            found.append(entry)
    return sites


# --- files ---------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Refuses an output path that exists, or whose parent does not.

    Raises:
        CheckpointError: nothing is overwritten, ever.
    """
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists, and nothing is overwritten; give a new path")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory; create it first")


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """A hidden directory that becomes `directory` when the block ends well, else vanishes."""
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        os.rename(partial, directory)
        _to_disk(directory.absolute().parent)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(
            f"{directory} could not be written: {reason}; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _source_of(config: Any, source: str | Path | None) -> Path | None:
    if source is not None:
        if not Path(source).is_dir():
            raise CheckpointError(f"{source} is not a directory to copy files from")
        return Path(source)
    name = str(getattr(config, "_name_or_path", "") or "")
    return Path(name) if name and Path(name).is_dir() else None


def _copy_rest(source: Path, target: Path) -> None:
    """Copies tokenizer and other small files that are not there yet."""
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            copy = target / path.relative_to(source)
            if any(Path(name).match(p) for p in _LEFT) or not path.is_file() or copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
