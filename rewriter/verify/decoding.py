"""Greedy decoding taken apart: what `generate` writes and calls, and the same text in one call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import InputError
from rewriter.isolation import COMPILED, evaluating, precise, seeded
from rewriter.logs import logging_at
from rewriter.verify.leaves import copied, leaves_of

__all__ = ["Gold", "OneCall", "Text", "padded_prompts", "recorded", "written"]

_STATE = ("past_key_values", "cache_position", "encoder_outputs", "logits_to_keep", "num_logits")
"""Arguments of a step that one call over the whole text does not take."""
_PROMPT = ("input_ids", "inputs", "attention_mask")
_PADS = 3
"""How many places the padded prompt gets."""


@dataclass(frozen=True)
class Text:
    """What one model wrote."""

    tokens: Tensor
    """The new ones, `[B, n]`."""
    logits: Tensor
    """From which each of them was chosen, `[B, n, V]`: of the steps, with the model's cache."""


def written(
    module: nn.Module, arguments: Mapping[str, Any], new_tokens: int, seed: int = 0
) -> Text:
    """The greedy continuation of exactly `new_tokens` tokens.

    Raises:
        InputError: if the module has no `generate`.
    """
    generate = getattr(module, "generate", None)
    if generate is None:
        raise InputError(
            f"{type(module).__name__} has no `generate`: leave out `generate=` for this model"
        )
    with _running(module, arguments, seed):
        result = generate(
            **copied(dict(arguments), lambda _, t: t.detach().clone()),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Text(result.sequences[:, -new_tokens:], torch.stack(list(result.logits), 1))


@contextlib.contextmanager
def recorded(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of each call of `module`, filled in while the block runs."""
    before = module.__dict__.get(COMPILED)
    calls: list[dict[str, Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append({n: x for n, x in kwargs.items() if n not in _STATE[:2]})
        return (before or module._call_impl)(*args, **kwargs)

    module.__dict__[COMPILED] = call
    try:
        yield calls
    finally:
        module.__dict__.pop(COMPILED)
        if before is not None:
            module.__dict__[COMPILED] = before


@dataclass(frozen=True)
class OneCall:
    """How a model is called once over a finished text, whichever model wrote it."""

    kwargs: Mapping[str, Any]
    ids: str
    """The argument that holds the text."""
    steps: int
    cached: bool
    """The steps after the first were given one token, and a cache for the others."""

    @classmethod
    def of(
        cls,
        calls: Sequence[Mapping[str, Any]],
        text: Text,
        arguments: Mapping[str, Any],
        main_input: str,
    ) -> OneCall | str:
        """Join the calls of a generation, so that positions and masks are those that `generate`
        made; a text says why that cannot be done.

        Args:
            calls: as `recorded`, of the model that wrote `text`.
            text: what it wrote.
            arguments: what `generate` was given.
            main_input: name of the argument that an encoder reads.
        """
        if not calls:
            return "generate does not call the model itself"
        first, last = calls[0], calls[-1]
        ids = "decoder_input_ids" if "decoder_input_ids" in first else "input_ids"
        if any(not isinstance(call.get(ids), Tensor) for call in calls):
            return f"the model is called without {ids}"
        kwargs = {n: x for n, x in {**first, **last}.items() if x is not None and n not in _STATE}
        cached = len(calls) > 1 and last[ids].shape[1] == 1
        if cached:
            kwargs |= _joined(calls, ids)
        if "encoder_outputs" in first:
            kwargs[main_input] = arguments.get(main_input, arguments.get("inputs"))
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        n = text.tokens.shape[1]
        if n > 1 and not torch.equal(kwargs[ids][:, 1 - n :], text.tokens[:, :-1]):
            return "the calls of generate do not add up to the text"
        return cls(kwargs, ids, n, cached)

    def logits(
        self, module: nn.Module, tokens: Tensor, seed: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The logits of the places from which `tokens` `[B, n]` were chosen, `[B, n, V]`."""
        prompt = self.kwargs[self.ids][:, : self.kwargs[self.ids].shape[1] + 1 - self.steps]
        kwargs = {**self.kwargs, self.ids: torch.cat([prompt, tokens[:, :-1]], 1)}

        def fresh(_: str, x: Tensor) -> Tensor:
            x = x.detach().clone()
            return x.to(dtype) if dtype is not None and x.is_floating_point() else x

        with _running(module, kwargs, seed):
            output = module(**copied(kwargs, fresh))
        found: Tensor = output["logits"] if isinstance(output, Mapping) else output.logits
        found = found[:, -self.steps :]
        return found if dtype == torch.float64 else found.float()


def _joined(calls: Sequence[Mapping[str, Any]], ids: str) -> dict[str, Tensor]:
    """What has one entry a token: tokens, positions, types, each in one tensor over all calls."""

    def counts(name: str) -> bool:
        found = [call.get(name) for call in calls]
        return all(
            isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == call[ids].shape[1]
            for x, call in zip(found, calls, strict=True)
        )

    names = [n for n in calls[0] if not n.endswith("attention_mask") and counts(n)]
    return {name: torch.cat([call[name] for call in calls], 1) for name in names}


class Gold:
    """The original in the widest dtype in which it runs; loses it for good when it fails."""

    def __init__(self, original: nn.Module, dtype: torch.dtype) -> None:
        half = dtype in (torch.float16, torch.bfloat16)
        self.original = original
        self.twin: nn.Module | None = None
        self.wides = [torch.float64, torch.float32] if half else [torch.float64]
        self.reason = ""

    def logits(self, call: OneCall, tokens: Tensor, seed: int) -> Tensor | None:
        """As `OneCall.logits`; None where only the original itself runs, and `reason` says why."""
        while self.wides:
            wide = self.wides[0]
            try:
                with precise(wide):
                    self.twin = self.twin or _twin(self.original, wide)
                    return call.logits(self.twin, tokens, seed, wide).double()
            except Exception as error:
                text = " ".join(str(error).split())
                self.reason = f"{type(error).__name__}: {text[:200]}"
                self.wides.pop(0)
                self.twin = None
        return None


def _twin(original: nn.Module, dtype: torch.dtype) -> nn.Module:
    twin = copy.deepcopy(original)
    for module in twin.modules():
        module.__dict__.pop(COMPILED, None)
    return twin.to(dtype)


def padded_prompts(arguments: Mapping[str, Any], pad: int) -> dict[str, dict[str, Any]] | str:
    """One prompt alone, and in a batch where it is padded on the left and on the right; the other
    row of the batch is not padded. A text says why the arguments cannot be padded.

    Args:
        arguments: of `generate`.
        pad: the token that stands at padded places.
    """
    tensors = [n for n, x in leaves_of(dict(arguments)).values.items() if isinstance(x, Tensor)]
    ids = arguments.get("input_ids", arguments.get("inputs"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return "the prompt is no tensor of token numbers"
    other = [name for name in tensors if name not in _PROMPT]
    if other:
        return f"{other[0]} would have to be padded as well"
    mask = arguments.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        return "the attention mask is no table of places"
    prompts = [row[seen.bool()] for row, seen in zip(ids, mask, strict=True) if bool(seen.any())]
    if not prompts:
        return "every place of the prompt is padded"
    prompt = prompts[0]
    size = len(prompt) + _PADS
    partner = prompts[-1].flip(0) if len(prompts) == 1 else prompts[-1]
    partner = partner.repeat(-(-size // len(partner)))[:size]
    pads, ones = prompt.new_full((_PADS,), pad), torch.ones_like(prompt)
    rest = {n: x for n, x in arguments.items() if n not in _PROMPT}

    def padded(place: int) -> dict[str, Any]:
        order = (pads, prompt) if place == 0 else (prompt, pads)
        seen = (0 * pads, ones) if place == 0 else (ones, 0 * pads)
        rows = torch.stack([torch.cat(order), partner])
        return {
            "input_ids": rows,
            "attention_mask": torch.stack([torch.cat(seen), torch.ones_like(partner)]),
            **rest,
        }

    alone = {"input_ids": prompt[None], "attention_mask": ones[None], **rest}
    return {"alone": alone, "left padding": padded(0), "right padding": padded(1)}


@contextlib.contextmanager
def _running(module: nn.Module, arguments: Any, seed: int) -> Iterator[None]:
    tensors = [*leaves_of(dict(arguments)).tensors.values(), *module.parameters()]
    with (
        torch.no_grad(),
        evaluating(module),
        seeded(seed, {t.device for t in tensors}),
        logging_at("transformers"),  # it advises against padding on the right, tried on purpose
    ):
        yield
