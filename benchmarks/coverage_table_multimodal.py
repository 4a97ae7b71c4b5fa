"""What cannot be guessed of architectures that read text together with images or sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_inputs import BATCH, LENGTH, mask, words
from coverage_table_text import OPTIONS as TEXTS

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS"]

IMAGE = 5
"""The token that stands for one feature of an image."""
OPT = {
    "model_type": "opt",
    "vocab_size": 99,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
CODES = {f"IMGIMG{x}BB": 60 + i for i, x in enumerate("ABCD")}

TILES = {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192, "num_global_layers": 2}

SHUFFLED = {
    "intermediate_size": 256,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "align": {
        "projection_dim": 160,
        "text_config": {"hidden_size": 64},
        "vision_config": {"width_coefficient": 0.5, "depth_coefficient": 0.3},
    },
    "blip-2": {"text_config": OPT, "image_token_index": IMAGE},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, **CODES}},
    "instructblip": {"text_config": OPT, "image_token_index": IMAGE},
    "instructblipvideo": {"text_config": OPT, "video_token_index": IMAGE},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config": SHUFFLED},
    "llama4_vision_model": SHUFFLED,
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "emu3": {"vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 6}},
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "mllama": {"vision_config": TILES, "text_config": {"cross_attention_layers": [1]}},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": TILES,
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "qwen4_exp": {"text_config": TEXTS["qwen4_exp_text"]},
}

MODELS: dict[str, str] = {
    "blip_text_model": "blip.modeling_blip_text.BlipTextModel",
    "idefics_vision": "idefics.vision.IdeficsVisionTransformer",
}


def _queried(kind: str, frames: int = 0) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    """Text that starts with the outputs of a query transformer."""

    def made(config: Any, generator: torch.Generator) -> dict[str, Any]:
        side = config.vision_config.image_size
        count = config.num_query_tokens * max(frames, 1)
        ids = words(generator, LENGTH + count)
        ids[:, :count] = IMAGE
        shape = (BATCH, frames, 3, side, side) if frames else (BATCH, 3, side, side)
        given = {
            "pixel_values": torch.randn(shape, generator=generator),
            "input_ids": ids,
            "attention_mask": mask(LENGTH + count),
        }
        if kind == "instructed":
            given["qformer_input_ids"] = words(generator, 8)
            given["qformer_attention_mask"] = mask(8, 3)
        return given

    return made


def _pictured(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """Features of regions of an image, with their boxes."""
    return {
        "input_ids": words(generator),
        "attention_mask": mask(),
        "visual_feats": torch.randn(BATCH, 5, config.visual_feat_dim, generator=generator),
        "visual_pos": torch.rand(BATCH, 5, config.visual_pos_dim, generator=generator),
        "visual_attention_mask": mask(5, 2),
    }


def _regions(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": words(generator),
        "attention_mask": mask(),
        "visual_embeds": torch.randn(BATCH, 5, config.visual_embedding_dim, generator=generator),
        "visual_attention_mask": mask(5, 2),
        "visual_token_type_ids": torch.ones(BATCH, 5, dtype=torch.long),
    }


def _tiled(config: Any, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    side, tiles = vision.image_size, vision.max_num_tiles
    seen = torch.ones(BATCH, 1, tiles, dtype=torch.long)
    seen[1, :, 2:] = 0
    ratios = torch.tensor([[vision.supported_aspect_ratios.index([1, tiles]) + 1], [2]])
    given = {
        "pixel_values": torch.randn(BATCH, 1, tiles, 3, side, side, generator=generator),
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": seen,
    }
    if vision is config:
        return given
    crossed = torch.ones(BATCH, LENGTH, 1, tiles, dtype=torch.long) * seen[:, None]
    crossed[:, :2] = 0
    text = {"input_ids": words(generator), "attention_mask": mask(), "use_cache": False}
    return text | given | {"cross_attention_mask": crossed}


def _interleaved(config: Any, generator: torch.Generator) -> dict[str, Any]:
    side = config.vision_config.image_size
    attended = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    attended[:, :3] = 0
    return {
        "input_ids": words(generator),
        "attention_mask": mask(),
        "pixel_values": torch.randn(BATCH, 1, 3, side, side, generator=generator),
        "image_attention_mask": attended,
        "use_cache": False,
    }


def _latent(config: Any, generator: torch.Generator) -> dict[str, Any]:
    side, count = config.vision_config.image_size, config.latent_query_num
    length = count + LENGTH
    places = torch.zeros(BATCH, length, dtype=torch.long)
    places[:, 2 : 2 + count] = 1
    return {
        "pixel_values": torch.randn(BATCH, 3, side, side, generator=generator),
        "input_ids": words(generator, length),
        "attention_mask": mask(length),
        "image_embeds_position_mask": places,
        "use_cache": False,
    }


INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "blip-2": _queried("plain"),
    "idefics": _interleaved,
    "instructblip": _queried("instructed"),
    "instructblipvideo": _queried("instructed", 2),
    "kosmos-2": _latent,
    "lxmert": _pictured,
    "mllama": _tiled,
    "mllama_vision_model": _tiled,
    "visual_bert": _regions,
}

LEFT_OUT: dict[str, str] = {
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm",
    "gemma3n_vision": "needs timm",
    "gemma4_unified_vision": "no model class",
    "idefics_perciever": "a part of idefics without a model class",
    "layoutxlm": "no model class",
    "nougat": "no configuration class",
    "perception_lm": "needs timm",
    "pp_chart2table": "no model class",
    "pp_chart2table_vision": "no model class",
    "vision-text-dual-encoder": "a composition of given models",
}
