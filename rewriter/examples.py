"""Inputs for a model, made from its configuration: the fields say what the model takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import InputError

__all__ = ["continued", "example_inputs"]


def example_inputs(
    model: nn.Module, *, batch: int = 2, length: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments for one forward of a Hugging Face model, on its device.

    Text has a padded last row: on the left where the model generates from its prompt, else on the
    right. Caches are off.

    Args:
        model: a model with a `config` and a `main_input_name`.
        batch: rows.
        length: tokens of text; fewer if the model takes fewer.
        seed: equal seeds give equal inputs.

    Raises:
        InputError: the configuration does not say what the model takes.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise InputError(
            f"{type(model).__name__} has no Hugging Face configuration to make inputs from; "
            "call the Python function with inputs of your own"
        )
    maker = _Maker(model, config, batch, torch.Generator().manual_seed(seed))
    inputs = maker.main(str(model.main_input_name), length)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in maker.accepted:
        inputs |= maker.text(max(length - 3, 1), prefix="decoder_")
    if "use_cache" in maker.accepted:
        inputs["use_cache"] = False
    parameter = next(model.parameters(), torch.empty(0))
    return {name: _placed(value, parameter) for name, value in inputs.items()}


def continued(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for the second half of the tokens, with a key-value cache of the first half; the same
    inputs where the model has no such cache."""
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if tokens is None or "use_cache" not in inputs or tokens.shape[1] < 4:
        return inputs
    half = tokens.shape[1] // 2
    first = {"input_ids": tokens[:, :half], "use_cache": True}
    if mask is not None:
        first["attention_mask"] = mask[:, :half]
    with torch.no_grad():
        cache = getattr(model(**first), "past_key_values", None)
    if cache is None:
        return inputs
    return inputs | {"input_ids": tokens[:, half:], "past_key_values": cache, "use_cache": True}


def _placed(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


class _Maker:
    """Draws the inputs of one model."""

    def __init__(self, model: nn.Module, config: Any, batch: int, random: torch.Generator) -> None:
        self.config, self.batch, self.random = config, batch, random
        self.kind = type(model).__name__
        self.accepted = inspect.signature(model.forward).parameters
        generates = bool(getattr(model, "can_generate", bool)())
        self.pads_left = generates and not getattr(config, "is_encoder_decoder", False)

    def main(self, name: str, length: int) -> dict[str, Any]:
        """What the model cannot run without."""
        match name:
            case "input_ids":
                inputs = self.text(length)
                if hasattr(self.config, "vision_config") and not self._has_image_token():
                    inputs |= self.pixels(self.config.vision_config)
                return inputs
            case "pixel_values":
                return self.pixels(getattr(self.config, "vision_config", self.config))
            case "input_features":
                bins, frames = self._need("num_mel_bins"), self._need("max_source_positions")
                return {name: self._normal(bins, 2 * frames)}  # the encoder halves the frames
            case "input_values":
                return {name: self._normal(400 * length)}
        raise InputError(
            f"{self.kind} takes {name}, and no example of that can be made from a configuration; "
            "call the Python function with inputs of your own"
        )

    def text(self, length: int, prefix: str = "") -> dict[str, Any]:
        """Tokens and their mask, the last row padded by a third."""
        text = self.config.get_text_config(decoder=bool(prefix)) if prefix else self._text_config()
        vocabulary, pad = self._need("vocab_size", text), getattr(text, "pad_token_id", None)
        limit = self._size("max_target_positions" if prefix else "max_position_embeddings", text)
        length = max(1, min(length, limit or length))
        shape = (self.batch, length)
        low = min(3, vocabulary - 1)  # the first tokens of most vocabularies are special
        tokens = torch.randint(low, vocabulary, shape, generator=self.random)
        if pad is not None:
            tokens[tokens == pad] = low if pad != low else vocabulary - 1
        mask = torch.ones_like(tokens)
        if self.batch > 1 and length > 2:
            padded = slice(0, length // 3) if self.pads_left else slice(length - length // 3, None)
            mask[-1, padded] = 0
            tokens[-1, padded] = pad if pad is not None and 0 <= pad < vocabulary else 0
        inputs = {f"{prefix}input_ids": tokens}
        if f"{prefix}attention_mask" in self.accepted:
            inputs[f"{prefix}attention_mask"] = mask
        return inputs

    def pixels(self, config: Any) -> dict[str, Any]:
        """Images of the size of the configuration."""
        side, channels = self._need("image_size", config), self._size("num_channels", config) or 3
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": self._normal(channels, height, width)}

    def _text_config(self) -> Any:
        return (
            self.config.get_text_config()
            if hasattr(self.config, "get_text_config")
            else self.config
        )

    def _has_image_token(self) -> bool:
        return any(hasattr(self.config, n) for n in ("image_token_id", "image_token_index"))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.random)

    def _size(self, name: str, config: Any = None) -> Any:
        return getattr(self.config if config is None else config, name, None)

    def _need(self, name: str, config: Any = None) -> Any:
        value = self._size(name, config)
        if value is None:
            raise InputError(
                f"the configuration of {self.kind} has no {name}, so no example input can be made; "
                "call the Python function with inputs of your own"
            )
        return value
