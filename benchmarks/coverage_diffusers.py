"""The transformers of diffusers, tiny: constructor arguments from the signature, inputs from the
names of forward's arguments; `coverage_table_diffusers` holds what neither tells."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from coverage_inputs_diffusers import INPUTS
from coverage_shrink import small
from coverage_table_diffusers import ARGUMENTS, FUSED_ONLY, LEFT_OUT
from torch import Tensor, nn

__all__ = ["LEFT_OUT", "build", "guesses", "names"]

BATCH, TEXT = 2, 7
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_key_value_heads": 2,
    "num_single_layers": 1,
    "num_single_dit_layers": 1,
    "num_mmdit_layers": 1,
    "num_refiner_layers": 1,
    "num_layers": 2,
    "joint_attention_dim": 32,
    "text_embed_dim": 32,
    "text_dim": 32,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "cap_feat_dim": 32,
    "context_in_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 32,
    "freq_dim": 32,
    "time_embed_dim": 32,
    "sample_size": 8,
    "pos_embed_max_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "axes_dims_rope": (4, 6, 6),
    "axes_dims": (4, 6, 6),
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (64, 64, 64),
    "rope_axes_dim": (4, 6, 6),
    "rope_dim_list": (4, 6, 6),
    "mrope_section": (4, 2, 2),
    "rope_max_seq_len": 64,
    "multiple_of": 32,
    "norm_num_groups": 4,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 16,
}
CONTEXT = (
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "cap_feat_dim",
    "context_in_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
    "llm_features_dim",
    "text_hidden_dim",
)


@cache
def _classes() -> dict[str, type[nn.Module]]:
    """Every model in diffusers.models.transformers, by its name."""
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    found: dict[str, type[nn.Module]] = {}
    for item in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{item.name}")
        for value in vars(module).values():
            is_model = isinstance(value, type) and issubclass(value, ModelMixin)
            if is_model and value.__module__ == module.__name__:
                found[f"diffusers/{value.__name__}"] = value
    return found


def names() -> list[str]:
    """Names of architectures."""
    return sorted(_classes())


def build(name: str, implementation: str) -> nn.Module:
    """The tiny model.

    Args:
        name: one of `names()`.
        implementation: "sdpa", which is what diffusers does itself, or "eager", for models whose
            attention can be done with `AttnProcessor`.

    Raises:
        NotImplementedError: if the model has no eager attention.
    """
    kind = _classes()[name]
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    options: dict[str, Any] = {}
    for key, parameter in signature.parameters.items():
        if key == "self" or parameter.default is parameter.empty:
            continue
        value = TINY.get(key, small(key, parameter.default))
        if parameter.default is not None and value is not parameter.default:
            kept = isinstance(parameter.default, tuple | list) and isinstance(value, tuple)
            options[key] = type(parameter.default)(value) if kept else value
    model: nn.Module = kind(**{**options, **ARGUMENTS.get(name, {})})
    if implementation == "eager":
        if name in FUSED_ONLY:
            raise NotImplementedError(FUSED_ONLY[name])
        _eager(model)
    return model


def _eager(model: Any) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    layers = [x for x in model.modules() if hasattr(x, "set_processor")]
    held = {type(x.processor) for x in layers}
    plain = all(type(x) is Attention for x in layers)
    if not held or held - {AttnProcessor, AttnProcessor2_0} or not plain:
        raise NotImplementedError("this model of diffusers has no eager attention")
    for module in layers:
        module.set_processor(AttnProcessor())


def guesses(name: str, model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Sets of arguments to try, the likeliest first."""
    config: Any = model.config
    if name in INPUTS:
        yield INPUTS[name](config, generator)
        return

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    takes = inspect.signature(model.forward).parameters
    channels = config.get("in_channels") or 8
    width = next((x for n in CONTEXT if isinstance(x := config.get(n), int)), 32)
    seen = torch.ones(BATCH, TEXT, dtype=torch.long)
    seen[1, 5:] = 0
    common = {
        "encoder_hidden_states": drawn(BATCH, TEXT, width),
        "encoder_attention_mask": seen,
        "encoder_hidden_states_mask": seen,
        "encoder_mask": seen,
        "pooled_projections": drawn(BATCH, config.get("pooled_projection_dim") or 32),
        "guidance": torch.tensor([3.5, 2.0]) if config.get("guidance_embeds") else None,
        "original_size": torch.tensor([[32.0, 32.0]] * BATCH),
        "target_size": torch.tensor([[32.0, 32.0]] * BATCH),
        "crop_coords": torch.zeros(BATCH, 2),
        "r_timestep": torch.tensor([5.0, 300.0]),
        "timestep_r": torch.tensor([5.0, 300.0]) if config.get("use_meanflow") else None,
    }
    given = {n: x for n, x in common.items() if n in takes and x is not None}
    axes = len(config.get("axes_dims_rope") or (1, 1, 1))
    grid = torch.cartesian_prod(*[torch.arange(n) for n in (1,) * (axes - 2) + (4, 4)]).float()
    packed = {
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, axes),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }
    masks = [n for n in given if "mask" in n]
    rows = {n: x for n, x in packed.items() if n in takes}
    for timestep in (torch.tensor([10.0, 500.0]), torch.tensor([10, 500]), torch.tensor(10)):
        times = {"timestep": timestep} if "timestep" in takes else {}
        for bools in (False, True)[: 1 + bool(masks)]:
            more = given | ({n: given[n].bool() for n in masks} if bools else {}) | times
            for key in ("hidden_states", "x"):
                if key not in takes:
                    continue
                yield {key: drawn(BATCH, 16, channels)} | rows | more
                for shape in ((channels, 8, 8), (channels, 2, 8, 8), (2, channels, 8, 8)):
                    yield {key: drawn(BATCH, *shape)} | more
                yield {key: drawn(BATCH, channels, 16)} | more
