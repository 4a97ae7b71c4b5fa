"""What a user hands to passes at run time: labels of tokens, and head outputs of another run."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.additions import Gift, given_to
from rewriter.errors import InputError
from rewriter.isolation import kept_buffers
from rewriter.optimize import call_arguments, reinstalled, report_of, requests_of
from rewriter.watch import Watched

__all__ = ["Handed", "give", "head_outputs", "label_spans"]


@dataclass(frozen=True)
class Handed:
    """What was given; as a context manager, it is taken back at the end."""

    model: nn.Module
    gift: Gift

    def __enter__(self) -> Handed:
        return self

    def __exit__(self, *error: object) -> None:
        self.take_back()

    def take_back(self) -> None:
        """The model has what others gave it before and since."""
        given = given_to(self.model)
        given.gifts = [x for x in given.gifts if x is not self.gift]


def give(
    model: nn.Module,
    *,
    labels: Tensor | None = None,
    patches: Mapping[str, Tensor] | None = None,
) -> Handed:
    """Hands tensors to the passes of an optimized model, for the calls that follow.

        with rewriter.give(model, labels=rewriter.label_spans([(5, 581)], length=600)):
            model.generate(...)

    Args:
        model: the optimized model.
        labels: integers `[B, M]` (or `[1, M]` for every row), one for each token of the prompt: 0
            for ordinary tokens and 1, 2, ... for the groups that passes name. `sinks.var` takes
            those of 1 for an image. Tokens that come later are ordinary.
        patches: head outputs `[B, H, L, Dv]` by the name of the site, as `head_outputs` gives them.

    Without `with`, they last until others are given.

    Raises:
        InputError: labels of another shape or with other values, or without an image; a name that
            is no site, where the model has run.
    """
    if patches is not None:
        _check_names(model, patches)
    gift = Gift(
        None if labels is None else _checked(labels), None if patches is None else dict(patches)
    )
    handed = Handed(model, gift)
    gift.handle = weakref.ref(handed)
    given_to(model).add(gift)
    return handed


def _check_names(model: nn.Module, patches: Mapping[str, Tensor]) -> None:
    """Raises InputError for a name that is no site of a model that has run.

    A part of the model that has not, such as an encoder, has sites that are not known: of its lists
    of layers, every module is taken.
    """
    sites = [line.site.name for line in report_of(model).attention]
    stacks, modules = {_stack(name) for name in sites}, {name for name, _ in model.named_modules()}
    for name in patches if sites else ():
        is_elsewhere = _stack(name) not in (*stacks, name)
        if name in sites or (is_elsewhere and name.partition("#")[0] in modules):
            continue
        close = difflib.get_close_matches(name, sites, n=1)
        what = f"did you mean {close[0]!r}?" if close else "print(rewriter.report_of(model))"
        raise InputError(f"{name!r} is no site of {type(model).__name__}; {what}")


def _stack(site: str) -> str:
    """The path as far as the number of the layer."""
    return re.split(r"\d", site, maxsplit=1)[0]


def _checked(labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        got = (
            f"{labels.dtype} of shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise InputError(f"labels are integers [B, M], one for each token of the prompt; got {got}")
    labels = labels.long()
    if bool((labels < 0).any()):
        raise InputError(f"labels are 0, 1, 2, ...; got {int(labels.min())}")
    if not bool(labels.any()):
        raise InputError(
            "every token is labelled 0, so no group and no image span is named; for prompts "
            "without one use the model without this pass, or rewriter.restore(model)"
        )
    return labels


def label_spans(spans: Sequence[tuple[int, int]], *, length: int, label: int = 1) -> Tensor:
    """Labels `[1, length]` with `label` at the tokens `start` to `stop - 1` of each span, else 0.

    Raises:
        InputError: without a span, or with one that is empty or not inside the prompt.
    """
    labels = torch.zeros(1, length, dtype=torch.int64)
    if label < 1:
        raise InputError(f"a label of a span is 1 or more, got {label}")
    if not spans:
        raise InputError("no image span: give at least one (start, stop)")
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise InputError(f"span ({start}, {stop}) is not inside a prompt of {length} tokens")
        labels[:, start:stop] = label
    return labels


def head_outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The outputs of all heads of every site, `[B, H, L, Dv]` by its name, in one call.

    Those of the model with its passes, but for passes that replace heads by what is given: they
    need no gift here, and what has been given to them is not seen.

    Args:
        model: an optimized model, or a plain one; it is the same afterwards.
        inputs: what one call takes: a mapping, a sequence of arguments, or one tensor.

    Raises:
        InputError: if no attention was found.
    """
    found: dict[str, Tensor] = {}

    def watcher(form: Watched, args: tuple[Any, ...]) -> Any:
        result, calls = form.ours(args)
        found.update({call.name: call.out for call in calls})
        return result

    args, kwargs = call_arguments(inputs)
    requests = [r for r in requests_of(model) if r.action.stage != "patch"]
    with (
        torch.no_grad(),
        kept_buffers(model),
        reinstalled(model, requests=requests, watcher=watcher),
    ):
        model(*args, **kwargs)
    if not found:
        raise InputError("no attention of the model was understood, so there are no head outputs")
    return found
