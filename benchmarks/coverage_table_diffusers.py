"""Arguments of constructors that cannot be guessed of the transformers of diffusers."""

from __future__ import annotations

from typing import Any

__all__ = ["ARGUMENTS", "FUSED_ONLY", "LEFT_OUT"]

TEXT = 7

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "head_dim": 16,
        "sliding_window": 4,
    },
    "AllegroTransformer3DModel": {
        "cross_attention_dim": 64,
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 2,
    },
    "BriaFibo2Transformer2DModel": {
        "dim": 64,
        "n_heads": 4,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "cap_feat_dim": 32,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_lens": (2048, 64, 64),
    },
    "BriaFiboTransformer2DModel": {"text_encoder_dim": 32},
    "ChromaTransformer2DModel": {"approximator_num_channels": 64, "approximator_hidden_dim": 32},
    "CogVideoXTransformer3DModel": {
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 5,
        "max_text_seq_length": 7,
    },
    "CogView3PlusTransformer2DModel": {"condition_dim": 8},
    "CogView4Transformer2DModel": {"condition_dim": 8, "rope_axes_dim": (16, 16)},
    "ConsisIDTransformer3DModel": {
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 5,
        "max_text_seq_length": 7,
    },
    "CosmosTransformer3DModel": {
        "max_size": (4, 8, 8),
        "adaln_lora_dim": 8,
        "concat_padding_mask": False,
    },
    "DreamLiteTransformer2DModel": {"in_channels": 8, "cross_attention_dim": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 8, "out_channels": 8, "patch_size": 2},
    "ErnieImageTransformer2DModel": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "text_in_dim": 32,
    },
    "Flux2Transformer2DModel": {
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 32,
    },
    "Flux3Transformer2DModel": {"axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 32},
    "GlmImageTransformer2DModel": {"condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
    "HeliosTransformer3DModel": {"rope_dim": (4, 6, 6)},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "caption_channels": [32, 32],
        "text_emb_dim": 32,
        "llama_layers": [0, 1],
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (8, 8),
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 64,
        "text_len": 7,
        "text_len_t5": 7,
        "cross_attention_dim_t5": 32,
    },
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8)},
    "HunyuanVideo15Transformer3DModel": {
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "target_size": 16,
    },
    "Ideogram4Transformer2DModel": {"llm_features_dim": 32, "adaln_dim": 32},
    "JoyImageEditPlusTransformer3DModel": {"hidden_size": 64},
    "JoyImageEditTransformer3DModel": {"hidden_size": 64},
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": 32,
        "in_text_dim2": 32,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 96,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_audio_dim": 4,
        "out_audio_dim": 4,
        "in_text_dim": 32,
        "in_text_dim2": 32,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 96,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "visual_cond": False,
    },
    "Krea2Transformer2DModel": {
        "text_hidden_dim": 64,
        "num_text_layers": 2,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 2,
        "timestep_embed_dim": 32,
    },
    "LTX2VideoTransformer3DModel": {
        "cross_attention_dim": 64,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 32,
    },
    "LTXVideoTransformer3DModel": {"cross_attention_dim": 64},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "caption_channels": 32,
        "cross_attention_dim": 64,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        "video_length": 2,
        "num_embeds_ada_norm": 1000,
    },
    "LongCatAudioDiTTransformer": {
        "dit_dim": 64,
        "dit_depth": 2,
        "dit_heads": 4,
        "dit_text_dim": 32,
        "latent_dim": 8,
    },
    "Lumina2Transformer2DModel": {"hidden_size": 64},
    "LuminaNextDiT2DModel": {"hidden_size": 64, "num_kv_heads": 2},
    "MiniMaxMusic3Transformer1DModel": {"condition_dim": 32, "ff_inner_dim": 96, "rotary_dim": 8},
    "MotifVideoTransformer3DModel": {"in_channels": 8},
    "NucleusMoEImageTransformer2DModel": {
        "num_experts": 4,
        "moe_intermediate_dim": 32,
        "capacity_factors": [2.0, 2.0],
        "dense_moe_strategy": "leave_first_block_dense",
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4,
        "hidden_size": 64,
        "vocab_size": 99,
        "pad_token_id": 0,
        "num_key_value_heads": 4,
        "time_step_dim": 32,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
    },
    "PRXTransformer2DModel": {
        "in_channels": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "axes_dim": [8, 8],
    },
    "PixArtTransformer2DModel": {"caption_channels": 32, "cross_attention_dim": 64},
    "PriorTransformer": {"embedding_dim": 32, "num_embeddings": TEXT},
    "QwenImageTransformer2DModel": {},
    "SanaTransformer2DModel": {"cross_attention_dim": 64},
    "SanaVideoTransformer3DModel": {"cross_attention_dim": 64},
    "StableAudio3DiTModel": {
        "io_channels": 8,
        "embed_dim": 64,
        "num_heads": 4,
        "cond_token_dim": 32,
        "global_cond_dim": 32,
        "local_add_cond_dim": 8,
        "num_memory_tokens": 4,
        "timestep_features_dim": 32,
    },
    "StableAudioDiTModel": {
        "num_key_value_attention_heads": 2,
        "time_proj_dim": 32,
        "global_states_input_dim": 32,
        "cross_attention_input_dim": 32,
        "sample_size": 16,
    },
    "T5FilmDecoder": {
        "input_dims": 8,
        "targets_length": 16,
        "d_model": 64,
        "num_heads": 4,
        "d_kv": 16,
        "d_ff": 96,
    },
    "Transformer2DModel": {"in_channels": 8, "cross_attention_dim": 32},
    "TransformerTemporalModel": {"in_channels": 8},
    "WanAnimateTransformer3DModel": {
        "in_channels": 8,
        "latent_channels": 4,
        "image_dim": 32,
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 32,
        "face_encoder_hidden_dim": 32,
        "inject_face_latents_blocks": 2,
    },
    "WanVACETransformer3DModel": {"vace_layers": [0], "vace_in_channels": 12},
    "ZImageTransformer2DModel": {
        "dim": 64,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_refiner_layers": 1,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32],
    },
}
ARGUMENTS = {f"diffusers/{name}": held for name, held in ARGUMENTS.items()}
"""Arguments of a constructor."""

_PACKED = """
AnyFlowFARTransformer3DModel BriaFibo2Transformer2DModel Cosmos3OmniTransformer
HunyuanVideoFramepackTransformer3DModel Ideogram4Transformer2DModel
JoyImageEditPlusTransformer3DModel Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel
MiniMaxH3Transformer3DModel QwenImage21Transformer2DModel RFD4ProteinaTransformer
SanaWMLTX2RefinerTransformer3DModel SanaWMTransformer3DModel WanAnimate2Transformer3DModel
WanAnimateTransformer3DModel
"""
FUSED_ONLY = {
    "diffusers/DreamLiteTransformer2DModel": "its mask fits the fused operation alone",
}
"""Models whose attention has an eager form that the model itself cannot run."""

LEFT_OUT: dict[str, str] = {
    f"diffusers/{name}": "its pipeline packs the inputs" for name in _PACKED.split()
}
"""Why an architecture cannot be built here."""
