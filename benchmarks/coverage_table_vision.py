"""What cannot be guessed of architectures of images and of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_inputs import BATCH, mask

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS"]

WINDOWS = {
    "image_size": 32,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 16,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 16, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
STAGES = {
    "encoder_in_channels": [16, 32, 32],
    "decoder_in_channels": [64, 64, 64],
    "anchor_image_size": None,
}
RESNET = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 3, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 4],
    "global_attention_blocks": [4],
    "window_positional_embedding_background_size": [4, 4],
}
HIERA_VISION = {
    "backbone_config": HIERA,
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 64,
}

SAM = {
    "output_channels": 64,
    "num_pos_feats": 32,
    "global_attn_indexes": [1],
    "window_size": 2,
}
DETR_VIT = {
    "image_size": 64,
    "num_windows": 4,
    "window_block_indices": [0],
    "out_features": ["stage1", "stage2"],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 0.5, "depth_coefficient": 0.3},
    "bit": {"num_groups": 4},
    "cvt": {"depth": [1, 2, 3]},
    "d_fine": {"backbone_config": HGNET, **STAGES},
    "unlimited_ocr_vision": {"sam_config": {"downsample_channels": [32, 64]}},
    "deepseek_ocr2_vision": {"sam_config": {"downsample_channels": [32, 64]}},
    "deimv2": {"backbone_config": HGNET, **STAGES},
    "donut-swin": WINDOWS,
    "efficientloftr": {
        "hidden_size": 64,
        "out_features": [16, 16, 32, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "num_attention_heads": 8,
    },
    "efficientnet": {"hidden_dim": 2560, "depth_coefficient": 0.5},
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "lw_detr": {
        "backbone_config": {
            **DETR_VIT,
            "model_type": "lw_detr_vit",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "projector_scale_factors": [1.0],
    },
    "lw_detr_vit": DETR_VIT,
    "mask2former": {"backbone_config": SWIN, "feature_size": 64, "mask_feature_size": 64},
    "maskformer": {"backbone_config": SWIN},
    "maskformer-swin": WINDOWS,
    "oneformer": {
        "backbone_config": SWIN,
        "conv_dim": 64,
        "mask_dim": 64,
        "num_attention_heads": 4,
        "text_encoder_width": 64,
        "text_encoder_vocab_size": 99,
    },
    "pp_doclayout_v3": {"backbone_config": HGNET, **STAGES},
    "pp_doclayout_v4": {"backbone_config": HGNET, **STAGES},
    "rt_detr": {"backbone_config": RESNET, **STAGES},
    "rt_detr_v2": {"backbone_config": RESNET, **STAGES},
    "sam": {"vision_config": SAM},
    "sam_vision_model": SAM,
    "sam_hq_vision_model": SAM,
    "sam_hq": {
        "vision_config": SAM,
        "mask_decoder_config": {"vit_dim": 64},
    },
    "sam2": {
        "vision_config": HIERA_VISION,
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
    },
    "sam2_hiera_det_model": {n: x for n, x in HIERA.items() if n != "model_type"},
    "sam2_vision_model": HIERA_VISION,
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "sam3_tracker": {
        "vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        "prompt_encoder_config": {"image_size": 32, "patch_size": 8},
    },
    "seggpt": {"image_size": [64, 32]},
    "zoedepth": {"bottleneck_features": 64},
    "superglue": {"hidden_size": 256, "gnn_layers_types": ["self", "cross"] * 2},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "tvp": {"max_img_size": 32, "visual_prompt_size": 4},
    "vitmatte": {"backbone_config": {"patch_size": 16}, "fusion_hidden_sizes": [32, 32, 16, 16]},
    "vitdet": {"window_block_indices": [0], "window_size": 2},
}

MODELS: dict[str, str] = {"lw_detr_vit": "LwDetrViTBackbone"}


def _drawn(*shape: int) -> Callable[[Any, torch.Generator], torch.Tensor]:
    return lambda config, generator: torch.randn(shape, generator=generator)


def _prompted(config: Any, generator: torch.Generator) -> dict[str, Any]:
    side = config.image_size[1]
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {n: torch.randn(BATCH, 3, side, side, generator=generator) for n in names}


def _tasked(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(BATCH, 3, 64, 64, generator=generator),
        "task_inputs": torch.randint(3, 90, (BATCH, 77), generator=generator),
    }


def _perceived(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "inputs": torch.randn(BATCH, 20, config.d_model, generator=generator),
        "attention_mask": mask(),
    }


def _flattened(config: Any, generator: torch.Generator) -> dict[str, Any]:
    width = getattr(config, "vision_config", config).patch_embed_hidden_size
    patches = torch.randn(BATCH, 20, 2 + width, generator=generator)
    patches[:, :, 0] = torch.arange(20) // 5 + 1
    patches[:, :, 1] = torch.arange(20) % 5 + 1
    return {"flattened_patches": patches, "attention_mask": mask().float()}


def _read(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return _flattened(config, generator) | {
        "decoder_input_ids": torch.randint(50, 99, (BATCH, 12), generator=generator)
    }


def _patches(config: Any, generator: torch.Generator) -> dict[str, Any]:
    side = config.image_size // config.patch_size
    seen = torch.ones(BATCH, side, side, dtype=torch.bool)
    seen[1, -1], seen[1, :, -1] = False, False  # all True, the model is causal unless compiled
    pixels = torch.randn(BATCH, 3, config.image_size, config.image_size, generator=generator)
    return {"pixel_values": pixels, "patch_attention_mask": seen}


INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "oneformer": _tasked,
    "perceiver": _perceived,
    "phi4_multimodal_vision": _patches,
    "pix2struct": _read,
    "pix2struct_vision_model": _flattened,
    "seggpt": _prompted,
}

LEFT_OUT: dict[str, str] = {
    "chameleon_vqgan": "a coder of images without a forward",
    "deepseek_ocr2_encoder": "a part of deepseek_ocr2_vision",
    "emu3_vqgan": "a coder of images without a forward",
    "glm_image_vqmodel": "a coder of images without a forward",
    "pp_ocrv5_mobile_det": "no attention",
    "pp_ocrv5_server_det": "no attention",
    "pp_ocrv6_medium_det": "no attention",
    "pp_ocrv6_small_det": "no attention",
    "sam3_detr_decoder": "a part of sam3",
    "sam3_detr_encoder": "a part of sam3",
    "sam3_lite_text_detr_decoder": "a part of sam3_lite_text",
    "sam3_lite_text_detr_encoder": "a part of sam3_lite_text",
    "sam3_lite_text_mask_decoder": "a part of sam3_lite_text",
    "sam3_mask_decoder": "a part of sam3",
    "sam2_video": "runs in a session of frames",
    "sam3_tracker_video": "runs in a session of frames",
    "sam3_video": "runs in a session of frames",
    "textnet": "no attention",
    "uvdoc": "no attention",
    "dinat": "needs natten",
    "edgetam": "needs timm",
    "edgetam_video": "needs timm",
    "edgetam_vision_model": "needs timm",
    "eomt": "needs scipy",
    "eomt_dinov3": "needs scipy",
    "layoutlmv2": "needs detectron2",
    "timm_backbone": "needs timm",
    "timm_wrapper": "needs timm",
    "vision-encoder-decoder": "a composition of given models",
}
for _name in ("edgetam", "edgetam_video", "sam", "sam2", "sam2_video", "sam3_tracker", "sam_hq"):
    for _part in ("mask_decoder", "prompt_encoder"):
        LEFT_OUT[f"{_name}_{_part}"] = f"a part of {_name} without a model class"
LEFT_OUT |= {
    f"sam3_tracker_video_{x}": "no model class" for x in ("mask_decoder", "prompt_encoder")
}
LEFT_OUT |= {f"{x}_geometry_encoder": "no model class" for x in ("sam3", "sam3_lite_text")}
LEFT_OUT |= {"sapiens2_head": "no model class"}
