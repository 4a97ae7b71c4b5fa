"""Faults of decoding: a tiny decoder that keeps its keys and values, with one step replaced.

`token_agreement` compares it with the honest one: its text, its logits, its steps with its own
cache against one call, and padded prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mutants.catalogue import Mutant

__all__ = ["MUTANTS", "Decoder", "decoder", "prompt"]

MUTANTS: list[Mutant] = []

WORDS, H, D = 53, 2, 8


class Decoder(nn.Module):
    """One layer of causal attention over learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, H * D), nn.Embedding(64, H * D)
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, WORDS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> dict[str, Any]:
        decoding = past_key_values is not None
        position_ids = self.positions(position_ids, decoding, use_cache)
        x = self.words(input_ids) + self.places(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
        if decoding:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_values, (k, v), strict=True))
        place = torch.arange(k.shape[2])
        causal = place <= place[k.shape[2] - q.shape[2] :, None]
        seen = self.padding(attention_mask, decoding)[:, None, None, :].bool() & causal
        s = (q @ k.mT * D**-0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
        y = (s.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return {"logits": self.out(x + y), "past_key_values": self.kept((k, v), decoding)}

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any
    ) -> Any:
        """As that of transformers, as far as `token_agreement` needs it."""
        text, mask, cache, logits = input_ids, attention_mask, None, []
        for step in range(max_new_tokens):
            new = text if cache is None else text[:, -1:]
            position = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
            found = self(
                input_ids=new,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            cache = found["past_key_values"]
            logits.append(found["logits"][:, -1].float())
            text = torch.cat([text, self.chosen(logits[-1], step)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return SimpleNamespace(sequences=text, logits=tuple(logits))

    # --- the steps --------------------------------------------------------------------------------

    def positions(self, position_ids: Tensor, decoding: bool, use_cache: bool) -> Tensor:
        return position_ids

    def padding(self, mask: Tensor, decoding: bool) -> Tensor:
        return mask

    def kept(self, cache: tuple[Tensor, Tensor], decoding: bool) -> tuple[Tensor, Tensor]:
        return cache

    def chosen(self, logits: Tensor, step: int) -> Tensor:
        return logits.argmax(-1, keepdim=True)


def decoder(kind: type[Decoder] = Decoder) -> Decoder:
    """With the weights that every other one has, wide enough for attention to matter."""
    torch.manual_seed(0)
    made = kind().eval()
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(torch.randn(x.shape) * 0.5)
    return made


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(1, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(method: str, name: str, expected: str, breaks: str = "") -> Callable[[Any], Any]:
    """A decoder in which the function takes the place of a step."""

    def add(function: Any) -> Any:
        kind = type(function.__name__, (Decoder,), {method: function})
        MUTANTS.append(Mutant(name, "generation", breaks, expected, kind))
        return function

    return add


# --- the cache ------------------------------------------------------------------------------------


@step("positions", "positions of decoding off by one", "generation: cache", "the cache counted +1")
def late(model: Any, position_ids: Tensor, decoding: bool, use_cache: bool) -> Tensor:
    return position_ids + 1 if decoding else position_ids


@step("positions", "positions of one call off", "generation: cache", "decoding itself is right")
def late_in_one_call(model: Any, position_ids: Tensor, decoding: bool, use_cache: bool) -> Tensor:
    return position_ids if use_cache else position_ids + 1


@step("padding", "first cached key lost", "generation: cache", "a window one key too short")
def first_key_lost(model: Any, mask: Tensor, decoding: bool) -> Tensor:
    return torch.cat([0 * mask[:, :1], mask[:, 1:]], 1) if decoding else mask


@step("kept", "cache in bfloat16", "generation: cache", "rounded on its way in")
def rounded(model: Any, cache: Any, decoding: bool) -> Any:
    return tuple(x.to(torch.bfloat16).to(x.dtype) for x in cache)


@step("kept", "last cached key is stale", "generation: cache", "written before it is computed")
def stale(model: Any, cache: Any, decoding: bool) -> Any:
    return tuple(torch.cat([x[:, :, :-1], x[:, :, -2:-1]], 2) for x in cache)


@step("chosen", "second best token in one step", "generation: tokens", "the logits are right")
def second_best(model: Any, logits: Tensor, step: int) -> Tensor:
    return logits.topk(2).indices[:, 1:] if step == 3 else logits.argmax(-1, keepdim=True)


# --- padding --------------------------------------------------------------------------------------


@step("padding", "padding ignored by a decoder", "left padding")
def padding_ignored(model: Any, mask: Tensor, decoding: bool) -> Tensor:
    return torch.ones_like(mask)


@step("padding", "padding taken for that of the other side", "left padding", "a mask as a length")
def padding_on_the_right(model: Any, mask: Tensor, decoding: bool) -> Tensor:
    return mask.sort(descending=True).values


@step("padding", "padding on the right read as on the left", "right padding")
def padding_on_the_left(model: Any, mask: Tensor, decoding: bool) -> Tensor:
    return mask.sort().values


@step("padding", "padding of the last row for all", "left padding", "a mask shared by the batch")
def padding_of_last_row(model: Any, mask: Tensor, decoding: bool) -> Tensor:
    return mask[-1:].expand_as(mask)


@step("positions", "a prompt alone is placed elsewhere", "alone", "a batch axis squeezed away")
def alone(model: Any, position_ids: Tensor, decoding: bool, use_cache: bool) -> Tensor:
    return position_ids if len(position_ids) > 1 else position_ids + 1
