"""Inputs of a model, guessed from the names of forward's arguments and from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from coverage_shrink import VOCABULARY
from torch import Tensor, nn

__all__ = ["BATCH", "LENGTH", "PADDED", "guesses", "mask", "words"]

BATCH, LENGTH, PADDED = 2, 20, 6
Inputs = dict[str, Any]


def guesses(model: nn.Module, generator: torch.Generator) -> Iterator[Inputs]:
    """Sets of arguments to try, the likeliest first."""
    takes: Mapping[str, Any] = inspect.signature(model.forward).parameters
    config: Any = model.config
    base: Inputs = {"use_cache": False} if "use_cache" in takes else {}
    main = getattr(model, "main_input_name", "input_ids")
    texts = _texts(takes, config, generator)
    media = [*_towers(takes, config, generator), *_media(takes, config, generator)]
    if media and "input_ids" in takes:
        for more in media:
            yield from (base | x for x in _merged(model, takes, more, generator))
    if main == "input_ids" and "input_ids" in takes:
        yield base | texts
        yield base | {n: x for n, x in texts.items() if "mask" not in n}
    for more in media:
        yield base | more
        yield base | texts | more
    yield from (base | more for more in _states(takes, config, generator))


def words(generator: torch.Generator, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Tensor:
    """Ids of tokens without a meaning of their own."""
    return torch.randint(
        50 if vocabulary > 60 else 3, vocabulary, (BATCH, length), generator=generator
    )


def mask(length: int = LENGTH, padded: int = PADDED) -> Tensor:
    """A mask whose last row ends in padding."""
    made = torch.ones(BATCH, length, dtype=torch.long)
    made[1, length - padded :] = 0
    return made


def _texts(takes: Mapping[str, Any], config: Any, generator: torch.Generator) -> Inputs:
    found: Inputs = {}
    text = getattr(config, "text_config", None) or config
    known = getattr(text, "vocab_size", None)
    known = known if isinstance(known, int) and known > 8 else VOCABULARY
    positions = getattr(text, "max_position_embeddings", None)
    for prefix, length, padded in (("", LENGTH, PADDED), ("decoder_", LENGTH - 3, 5)):
        if f"{prefix}input_ids" in takes:
            if isinstance(positions, int) and 8 < positions < length:
                length = positions
            found[f"{prefix}input_ids"] = words(generator, length, min(known, VOCABULARY))
            if f"{prefix}attention_mask" in takes:
                found[f"{prefix}attention_mask"] = mask(length, padded)
    if "bbox" in takes and "input_ids" in found:
        boxes = torch.randint(0, 40, (BATCH, LENGTH, 4), generator=generator)
        found["bbox"] = boxes.sort(-1).values
    return found


def _merged(
    model: nn.Module, takes: Mapping[str, Any], media: Inputs, generator: torch.Generator
) -> Iterator[Inputs]:
    """Text with as many tokens of an image or a sound in it as the model makes features of it."""
    config: Any = model.config
    for kind in ("image", "audio"):
        token = next(
            (
                value
                for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_soft_token_id")
                if isinstance(value := getattr(config, name, None), int)
            ),
            None,
        )
        encode = getattr(model, f"get_{kind}_features", None)
        if token is None or encode is None:
            continue
        allowed = inspect.signature(encode).parameters
        try:
            with torch.no_grad():
                features = encode(**{n: x for n, x in media.items() if n in allowed})
        except Exception:
            continue
        features = (
            getattr(features, "pooler_output", None) if hasattr(features, "keys") else features
        )
        count = _count(features) // BATCH
        if not count:
            continue
        length = count + 12
        ids = words(generator, length)
        ids[:, 3 : 3 + count] = token
        given: Inputs = {"input_ids": ids}
        for name, made in (
            ("attention_mask", mask(length, 4)),
            ("mm_token_type_ids", (ids == token).long()),
            ("token_type_ids", (ids == token).long()),
        ):
            if name in takes:
                given[name] = made
        yield given | media


def _count(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(map(_count, features or ()))


def _field(config: Any, *names: str, default: Any = None) -> Any:
    for part in (config, *(getattr(config, f"{p}_config", None) for p in ("vision", "audio"))):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, bool):
                return value
    return default


def _towers(takes: Mapping[str, Any], config: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Images as patches in a row, with the heights and widths of the images."""
    vision = getattr(config, "vision_config", None) or config
    patch = _field(vision, "patch_size", default=14)
    channels = _field(vision, "num_channels", "in_channels", "in_chans", default=3)
    if not isinstance(patch, int) or not isinstance(channels, int):
        return
    merge = int(_field(vision, "spatial_merge_size", "merge_size", default=2))
    sides = [(4 * merge, 2 * merge), (2 * merge, 4 * merge)]
    grid = torch.tensor([[1, *sides[0]], [1, *sides[1]]])
    total = int(grid.prod(1).sum())
    image = next((n for n in ("pixel_values", "hidden_states") if n in takes), None)
    name = next((n for n in takes if n.endswith("grid_thw") and "video" not in n), None)
    hws = next((n for n in takes if n.endswith(("grid_hws", "image_grid_hw"))), None)
    if image and (name or hws):
        key = name or hws
        value = grid if name else grid[:, 1:]
        sizes = {"merge_sizes": torch.full((BATCH,), merge)} if "merge_sizes" in takes else {}
        for frames in dict.fromkeys((_field(vision, "temporal_patch_size", default=1), 1, 2)):
            flat = torch.randn(total, channels * frames * patch**2, generator=generator)
            yield {image: flat, key: value, **sizes}
            yield {image: flat.view(total, channels * frames, patch, patch), key: value}
            yield {image: flat[None], key: value}
            if frames == 1:
                yield {image: flat.view(1, total, channels, patch, patch), key: value}
    if "spatial_shapes" in takes and image:
        shapes = torch.tensor([[4, 4], [2, 6]])
        flat = torch.randn(BATCH, 16, channels * patch**2, generator=generator)
        seen = mask(16, 4)
        masked = {n: seen for n in ("pixel_attention_mask", "attention_mask") if n in takes}
        if "pixel_attention_mask" in masked and "input_ids" in takes:
            masked.pop("attention_mask", None)
        yield {image: flat, "spatial_shapes": shapes, **masked}
    if "image_position_ids" in takes or "pixel_position_ids" in takes:
        position = "image_position_ids" if "image_position_ids" in takes else "pixel_position_ids"
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        for width in (channels * patch**2,):
            flat = torch.rand(BATCH, 16, width, generator=generator)
            yield {"pixel_values": flat, position: places.expand(BATCH, -1, -1).clone()}


def _media(takes: Mapping[str, Any], config: Any, generator: torch.Generator) -> Iterator[Inputs]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vision = getattr(config, "vision_config", None) or config
    vision = getattr(vision, "backbone_config", None) or vision
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3) or 3
    channels = channels if isinstance(channels, int) else 3
    size = getattr(vision, "image_size", 32)
    sides: list[Any] = [*(size if isinstance(size, tuple | list) else [size])] if size else [32]
    sides = [sides[0], 32, 64, 128, 224] if isinstance(sides[0], int) else [32, 64]
    shapes = [(size[0], size[1])] if isinstance(size, tuple | list) and len(size) == 2 else []
    shapes += [(side, side) for side in sides]
    image = next((n for n in ("pixel_values", "images", "image", "sample") if n in takes), None)
    extra: Inputs = {}
    if "pixel_attention_mask" in takes:
        extra["pixel_attention_mask"] = torch.ones(BATCH, 1, shapes[0][0], shapes[0][1])
    if image:
        for index, (height, width) in enumerate(dict.fromkeys(shapes)):
            yield {image: drawn(BATCH, channels, height, width)}
            if "image_sizes" in takes:
                sizes = torch.tensor([[height, width]] * BATCH)
                yield {image: drawn(BATCH, channels, height, width), "image_sizes": sizes}
                yield {image: drawn(BATCH, 2, channels, height, width), "image_sizes": sizes}
                yield {image: drawn(BATCH, 5, channels, height, width), "image_sizes": 2 * sizes}
            if index < 2:
                frames = int(_field(config, "num_frames", "frames_per_clip", default=2))
                yield {image: drawn(BATCH, frames, channels, height, width)}
                yield {image: drawn(BATCH, 1, channels, height, width)}
        if "grid_thw" not in takes and "vocab_size" in vars(config):
            yield {image: torch.randint(0, 20, (BATCH, 16), generator=generator)}
    for name in ("pixel_values_videos", "video_values", "pixel_values_vision"):
        if name in takes:
            frames = int(_field(config, "frames_per_clip", "num_frames", default=2))
            yield {name: drawn(1, frames, 3, sides[0], sides[0])}
    yield from _sounds(takes, config, generator)


def _sounds(takes: Mapping[str, Any], config: Any, generator: torch.Generator) -> Iterator[Inputs]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    names = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim")
    names = ("feature_projection_input_dim", *names)
    mels = _field(
        config, *names, "input_feat_size", "mel_bins", "input_size", "num_mels", default=16
    )
    mels = mels if isinstance(mels, int) else 16
    steps = 2 * int(_field(config, "max_source_positions", "n_ctx", default=64) or 64)
    for name in ("input_features", "audio_features", "audio_input_features", "audio_values", "x"):
        if name not in takes:
            continue
        for shape in (
            (BATCH, mels, steps),
            (BATCH, 64, mels),
            (BATCH, mels, 64),
            (BATCH, 1, 64, mels),
            (BATCH, 1, 64, 16),
            (BATCH, 160, mels),
        ):
            time = shape[-1] if shape[1] == mels else shape[-2]
            extra: Inputs = {}
            for masked in (
                "input_features_mask",
                "audio_features_mask",
                "input_features_attention_mask",
                "audio_attention_mask",
                "attention_mask",
                "feature_attention_mask",
                "padding_mask",
            ):
                if masked in takes and ("input_ids" not in takes or masked != "attention_mask"):
                    extra[masked] = mask(time, time // 4)
            if extra:
                yield {name: drawn(*shape)} | extra
            for length in ("input_features_lengths", "feature_lens", "audio_feature_lengths"):
                if length in takes:
                    yield {name: drawn(*shape), length: torch.tensor([time, time // 2])}
            yield {name: drawn(*shape)}
    if "input_values" in takes:
        length = 4000
        for masked in ("attention_mask", "padding_mask"):
            if masked in takes:
                yield {"input_values": drawn(BATCH, length), masked: mask(length, 800)}
                yield {"input_values": drawn(BATCH, 1, length), masked: mask(length, 800)}
        yield {"input_values": drawn(BATCH, length)}
        yield {"input_values": drawn(BATCH, 1, length)}
        time = int(_field(config, "max_length", default=64))
        yield {"input_values": drawn(BATCH, time, mels)}
    if "past_values" in takes:
        context = int(_field(config, "context_length", default=32))
        yield {
            "past_values": drawn(
                BATCH, context, int(_field(config, "num_input_channels", default=1))
            )
        }
        yield {"past_values": drawn(BATCH, context)}
        lags = max(getattr(config, "lags_sequence", None) or [0])
        past, future = (
            drawn(BATCH, context + lags),
            drawn(BATCH, int(_field(config, "prediction_length", default=4))),
        )
        features = int(_field(config, "num_time_features", default=0))
        yield {
            "past_values": past,
            "past_time_features": drawn(*past.shape, features),
            "past_observed_mask": torch.ones_like(past),
            "future_values": future,
            "future_time_features": drawn(*future.shape, features),
        }


def _states(takes: Mapping[str, Any], config: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Vectors instead of tokens."""
    widths = [
        getattr(config, n, None)
        for n in ("input_dim", "hidden_size", "d_model", "dim", "embed_dim")
    ]
    width = next((x for x in widths if isinstance(x, int)), 64)
    hidden = torch.randn(BATCH, LENGTH, width, generator=generator)
    other = getattr(config, "encoder_hidden_size", None) or getattr(
        config, "cross_hidden_size", None
    )
    context = torch.randn(BATCH, 11, other or width, generator=generator)
    masked = {"attention_mask": mask()} if "attention_mask" in takes else {}
    crossed: Inputs = {"encoder_hidden_states": context} if "encoder_hidden_states" in takes else {}
    for name in ("query_embeds", "inputs_embeds", "hidden_states", "context", "input_embeds"):
        if name in takes:
            for more in ({}, crossed):
                yield {name: hidden} | masked | more
                yield {name: hidden} | more
