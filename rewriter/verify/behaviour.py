"""How far a model behaves otherwise than its original: for passes that change it on purpose.

`verify` judges whether two models compute one function. Here nothing is judged, all is measured:
how the predictions move (KL divergence, top-1 agreement), how hidden states turn (cosine), and
whatever a probe of the user's reads from the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.capture import uncompiled
from rewriter.errors import InputError
from rewriter.isolation import evaluating, is_compiled, seeded
from rewriter.verify.call import Call, one_line
from rewriter.verify.leaves import copied, leaves_of
from rewriter.verify.measures import Behaviour, Predictions, Probed, Vectors

__all__ = ["Probe", "behaviour"]

Probe = Callable[[Any], "float | Tensor"]
"""Reads one number, or a tensor of numbers, from the outputs of a model."""

_OTHER = ("past_key_values", "attentions", "loss")
"""Outputs that are neither predictions nor states: their names end so, or begin so."""


def behaviour(
    original: nn.Module,
    model: nn.Module,
    inputs: Any,
    probes: Mapping[str, Probe] | None = None,
    *,
    logits: str | None = None,
    seed: int = 0,
) -> Behaviour:
    """Measure how the outputs of `model` differ from the original's on one call.

    Both run in eval mode without gradients, from the same random seed; nothing of them changes.
    Places that an attention mask of the inputs hides are left out.

    Args:
        original: as in `verify`; may be the same object as `model`.
        model: the model that is measured.
        inputs: a mapping of keyword arguments, a tuple of arguments, or one tensor.
        probes: by name, functions of the model's outputs. A tensor is compared element by element.
        logits: path of the output that holds logits, `"output"` where the model returns one
            tensor. Default: every output whose name ends with `logits`. Other floating outputs are
            compared as vectors.
        seed: of what the models draw.

    Raises:
        InputError: if there is nothing to measure, or a probe fails.
    """
    call = Call.of(inputs, seed, gradients=False)
    try:
        with uncompiled(original):
            expected = _outputs(original, call)
    except Exception as error:
        raise InputError(
            f"the original cannot be run on these inputs: {one_line(error)}; check `inputs`"
        ) from error
    found = _outputs(model, call)
    notes: list[str] = []
    if original is model and not any(is_compiled(m) for m in model.modules()):
        notes.append("original and model are one object on which nothing is installed")
    old, new = (leaves_of(x).tensors for x in (expected, found))
    _check_name(logits, old)
    predictions, vectors = [], []
    for name, x in old.items():
        is_logits = name == logits if logits else name.endswith("logits")
        if not x.is_floating_point() or x.dim() < 2 or _is_other(name):
            continue
        y = new.get(name)
        if y is None or y.shape != x.shape:
            shape = "nothing" if y is None else list(y.shape)
            notes.append(f"{name} is {list(x.shape)} in the original, {shape} in the model")
            continue
        keep = _kept(name, x, call, notes)
        if not bool(keep.any()):
            raise InputError(f"the attention mask hides every place of {name}: nothing is left")
        if is_logits:
            predictions.append(_predictions(name, x[keep], y[keep], notes))
        else:
            vectors.append(_vectors(name, x[keep], y[keep], notes))
    probed = tuple(
        _probed(name, probe, expected, found, notes) for name, probe in (probes or {}).items()
    )
    if not predictions and not vectors and not probed:
        raise InputError(_nothing(old, notes))
    return Behaviour(tuple(predictions), tuple(vectors), probed, tuple(notes))


def _outputs(module: nn.Module, call: Call) -> Any:
    devices = {t.device for t in (*module.parameters(), *call.tensors.values())}
    with torch.no_grad(), evaluating(module), seeded(call.seed, devices):
        args, kwargs = copied((call.args, call.kwargs), lambda _, t: t.detach().clone())
        return module(*args, **kwargs)


def _check_name(logits: str | None, outputs: Mapping[str, Tensor]) -> None:
    if logits is not None and logits not in outputs:
        raise InputError(f"there is no output {logits!r}; the outputs are {', '.join(outputs)}")


def _is_other(name: str) -> bool:
    return any(part.endswith(_OTHER) for part in name.split("."))


def _nothing(outputs: Mapping[str, Tensor], notes: list[str]) -> str:
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in outputs.items()) or "no tensor"
    return "; ".join(
        [
            f"nothing to measure: the original gives {shapes}",
            *notes,
            "give probes={'name': lambda outputs: ...}, or the path of the output that holds "
            "logits as logits=",
        ]
    )


def _kept(name: str, x: Tensor, call: Call, notes: list[str]) -> Tensor:
    """Which places of an output count, in the shape of all its axes but the last."""
    keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    decodes = "decoder_input_ids" in call.kwargs and not name.startswith("encoder_")
    mask = call.kwargs.get("decoder_attention_mask" if decodes else "attention_mask")
    if not isinstance(mask, Tensor) or x.dim() != 3:
        return keep
    B, L = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < L:
        notes.append(f"{name} {list(x.shape)} does not fit the mask {list(mask.shape)}: all count")
        return keep
    return mask[:, mask.shape[1] - L :].to(x.device).bool()  # a mask covers cached keys as well


def _predictions(name: str, x: Tensor, y: Tensor, notes: list[str]) -> Predictions:
    """Logits `[N, V]` of N places."""
    x, y = (t.double().flatten(0, -2) for t in (x, y))
    usable, places = _usable(name, x, y, notes), len(x)
    x, y = x[usable], y[usable]
    if not len(x):
        return Predictions(name, places, 0, float("nan"), float("nan"), float("nan"))
    if len(x) > 1 and bool((x == x[0]).all()):
        notes.append(f"{name} is the same at every place of the original: it shows little")
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).clamp_min(0.0)
    if bool(kl.isinf().any()):
        notes.append(f"{name}: the model rules out what the original does not, so KL is infinite")
    same = (x.argmax(-1) == y.argmax(-1)).double()
    return Predictions(name, places, len(x), float(kl.mean()), float(kl.max()), float(same.mean()))


def _vectors(name: str, x: Tensor, y: Tensor, notes: list[str]) -> Vectors:
    """States `[N, E]` of N places."""
    x, y = (t.double().flatten(0, -2) for t in (x, y))
    usable, places = _usable(name, x, y, notes, infinite=False), len(x)
    x, y = x[usable], y[usable]
    if not len(x):
        return Vectors(name, places, 0, float("nan"), float("nan"), float("nan"))
    cosine = functional.cosine_similarity(x, y, dim=-1, eps=0.0)
    sizes = x.norm(dim=-1), y.norm(dim=-1)
    # no direction: alike if neither has one
    cosine = torch.where((sizes[0] == 0) & (sizes[1] == 0), 1.0, cosine.nan_to_num(0.0))
    moved = (x - y).norm(dim=-1).mean() / sizes[0].mean()
    return Vectors(name, places, len(x), float(cosine.mean()), float(cosine.min()), float(moved))


def _usable(name: str, x: Tensor, y: Tensor, notes: list[str], infinite: bool = True) -> Tensor:
    """The rows in which both are numbers; the others are counted in a note.

    Args:
        name: of the output.
        x: of the original.
        y: of the model.
        notes: where it is said.
        infinite: minus infinity is a number: a logit that rules a token out.
    """

    def bad(t: Tensor) -> Tensor:
        wrong = t.isnan() | t.isposinf() | (t.isneginf() & (not infinite))
        return wrong.any(-1) | t.isneginf().all(-1)

    sides = {"original": bad(x), "model": bad(y)}
    for side, wrong in sides.items():
        if bool(wrong.any()):
            count = f"{int(wrong.sum())} of {len(x)} places"
            notes.append(f"{name}: NaN or infinity in {count} of the {side}, which are left out")
    return ~(sides["original"] | sides["model"])


def _probed(name: str, probe: Probe, expected: Any, found: Any, notes: list[str]) -> Probed:
    x, y = (_read(name, probe, outputs) for outputs in (expected, found))
    if x.shape != y.shape:
        raise InputError(
            f"probe {name!r} gives {list(x.shape)} for the original and {list(y.shape)} for the "
            "model; let it give one number, or tensors of one shape"
        )
    for side, values in (("original", x), ("model", y)):
        if not bool(values.isfinite().all()):
            notes.append(f"probe {name}: NaN or infinity in the {side}")
    apart = (y - x).abs()
    signed = float((y - x).mean())
    return Probed(name, x.numel(), float(x.mean()), float(y.mean()), signed, float(apart.max()))


def _read(name: str, probe: Probe, outputs: Any) -> Tensor:
    try:
        with torch.no_grad():
            value: Any = probe(outputs)
    except Exception as error:
        raise InputError(f"probe {name!r} raises {one_line(error)}") from error
    if isinstance(value, (bool, int, float)):
        return torch.tensor([float(value)], dtype=torch.float64)
    if isinstance(value, Tensor) and not value.is_complex() and value.numel():
        return value.detach().double()
    what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(f"probe {name!r} gives {what}; it has to give a number or a tensor of some")
