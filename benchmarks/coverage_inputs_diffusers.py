"""Inputs that cannot be guessed of the transformers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["INPUTS"]

BATCH, TEXT = 2, 7
Made = dict[str, Any]


def _seen() -> Tensor:
    made = torch.ones(BATCH, TEXT, dtype=torch.long)
    made[1, 5:] = 0
    return made


def _drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _image(generator: torch.Generator, channels: int, width: int = 32, *more: int) -> Made:
    return {
        "hidden_states": _drawn(generator, BATCH, channels, *more, 8, 8),
        "encoder_hidden_states": _drawn(generator, BATCH, TEXT, width),
        "timestep": torch.tensor([10, 500]),
    }


def _flowing(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels, 32, 2) | {
        "hidden_states": _drawn(g, BATCH, 2, config.in_channels, 8, 8),
        "timestep": torch.tensor([[10.0, 20.0], [500.0, 600.0]]),
        "r_timestep": torch.tensor([[5.0, 10.0], [300.0, 400.0]]),
    }


def _labelled(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, config.in_channels, 8, 8),
        "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([3, 7]),
    }


def _moving(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels, 32, 2)


def _music(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, config.in_channels, 16),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": _drawn(g, BATCH, 16, 32),
    }


def _depth(config: Any, g: torch.Generator) -> Made:
    return {"inputs_embeds": _drawn(g, BATCH, config.num_codebooks, config.hidden_size)}


def _ace(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 16, 8),
        "context_latents": _drawn(g, BATCH, 16, 16),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, config.hidden_size),
        "timestep": torch.tensor([0.2, 0.7]),
        "timestep_r": torch.tensor([0.1, 0.5]),
    }


def _hunyuan(config: Any, g: torch.Generator) -> Made:
    angles = _drawn(g, 16, 8).repeat_interleave(2, 1)
    return _image(g, 4) | {
        "timestep": torch.tensor([10.0, 500.0]),
        "text_embedding_mask": _seen(),
        "encoder_hidden_states_t5": _drawn(g, BATCH, TEXT, 32),
        "text_embedding_mask_t5": _seen(),
        "image_meta_size": torch.tensor([[8.0, 8.0, 8.0, 8.0, 0.0, 0.0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": [angles.cos(), angles.sin()],
    }


def _lumina(config: Any, g: torch.Generator) -> Made:
    angles = _drawn(g, 64, 64, 8)
    return _image(g, config.in_channels) | {
        "encoder_mask": _seen(),
        "timestep": torch.tensor([0.1, 0.8]),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _pixart(config: Any, g: torch.Generator) -> Made:
    added = {"resolution": None, "aspect_ratio": None}
    return _image(g, config.in_channels) | {
        "encoder_attention_mask": _seen(),
        "added_cond_kwargs": added,
    }


def _prior(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 32),
        "timestep": torch.tensor([10, 500]),
        "proj_embedding": _drawn(g, BATCH, 32),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "attention_mask": _seen().bool(),
    }


def _audio(config: Any, g: torch.Generator) -> Made:
    angles = _drawn(g, 17, 4).repeat(1, 2)
    return {
        "hidden_states": _drawn(g, BATCH, 8, 16),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "global_hidden_states": _drawn(g, BATCH, 1, 32),
        "rotary_embedding": (angles.cos(), angles.sin()),
        "encoder_attention_mask": _seen().bool(),
    }


def _temporal(config: Any, g: torch.Generator) -> Made:
    return {"hidden_states": _drawn(g, BATCH * 4, 8, 4, 4), "num_frames": 4}


def _film(config: Any, g: torch.Generator) -> Made:
    return {
        "encodings_and_masks": [(_drawn(g, BATCH, TEXT, 64), _seen())],
        "decoder_input_tokens": _drawn(g, BATCH, 16, 8),
        "decoder_noise_time": torch.tensor([0.1, 0.6]),
    }


def _fibo(config: Any, g: torch.Generator) -> Made:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    layers = config.num_layers + config.num_single_layers
    return {
        "hidden_states": _drawn(g, BATCH, 16, config.in_channels),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, config.joint_attention_dim),
        "text_encoder_layers": [_drawn(g, BATCH, TEXT, 32) for _ in range(layers)],
        "timestep": torch.tensor([10.0, 500.0]),
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _cosmos(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels, 32, 2) | {
        "timestep": torch.tensor([0.2, 0.7]),
        "fps": 24,
    }


def _ernie(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, config.in_channels, 4, 4),
        "timestep": torch.tensor([10.0, 500.0]),
        "text_bth": _drawn(g, BATCH, TEXT, 32),
        "text_lens": torch.tensor([7, 5]),
    }


def _glm(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels) | {
        "prior_token_id": torch.randint(0, 64, (BATCH, 16), generator=g),
        "prior_token_drop": torch.tensor([False, True]),
        "target_size": torch.tensor([[8.0, 8.0]] * BATCH),
        "crop_coords": torch.zeros(BATCH, 2),
    }


def _hidream(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 4, 8, 8),
        "timesteps": torch.tensor([10, 500]),
        "encoder_hidden_states_t5": _drawn(g, BATCH, TEXT, 32),
        "encoder_hidden_states_llama3": _drawn(g, 2, BATCH, TEXT, 32),
        "pooled_embeds": _drawn(g, BATCH, 32),
    }


def _second(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels, 32, 2) | {
        "timestep": torch.tensor([10.0, 500.0]),
        "encoder_attention_mask": _seen(),
        "encoder_hidden_states_2": _drawn(g, BATCH, 5, 32),
        "encoder_attention_mask_2": _seen()[:, 2:],
        "image_embeds": _drawn(g, BATCH, 3, 32),
    }


def _kandinsky(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 2, 8, 8, config.in_visual_dim),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "timestep": torch.tensor([10.0, 500.0]),
        "pooled_projections": _drawn(g, BATCH, 32),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _krea(config: Any, g: torch.Generator) -> Made:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": _drawn(g, BATCH, 16, config.in_channels),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 2, 64),
        "timestep": torch.tensor([0.2, 0.7]),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid]),
        "encoder_attention_mask": _seen().bool(),
    }


def _sounding(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 16, config.in_channels),
        "audio_hidden_states": _drawn(g, BATCH, 9, 8),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "audio_encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "timestep": torch.tensor([10.0, 500.0]),
        "encoder_attention_mask": _seen(),
        "audio_encoder_attention_mask": _seen(),
        "num_frames": 1,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
    }


def _speech(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 16, 8),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "encoder_attention_mask": _seen().bool(),
        "timestep": torch.tensor([0.2, 0.7]),
        "latent_cond": _drawn(g, BATCH, 16, 8),
    }


def _stable(config: Any, g: torch.Generator) -> Made:
    return {
        "hidden_states": _drawn(g, BATCH, 8, 16),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": _drawn(g, BATCH, TEXT, 32),
        "global_hidden_states": _drawn(g, BATCH, 32),
        "encoder_attention_mask": _seen(),
        "local_add_cond": _drawn(g, BATCH, 8, 16),
    }


def _vace(config: Any, g: torch.Generator) -> Made:
    return _image(g, config.in_channels, 32, 2) | {
        "control_hidden_states": _drawn(g, BATCH, 12, 2, 8, 8)
    }


def _listed(config: Any, g: torch.Generator) -> Made:
    return {
        "x": [_drawn(g, config.in_channels, 1, 8, 8) for _ in range(BATCH)],
        "t": torch.tensor([0.2, 0.7]),
        "cap_feats": [_drawn(g, n, 32) for n in (TEXT, 5)],
    }


def _nested(config: Any, g: torch.Generator) -> Made:
    length = TEXT + 1 + 16
    shown = torch.ones(BATCH, length, length)
    shown[1, :, :2] = 0
    return {
        "hidden_states": _drawn(g, BATCH, 4, 8, 8),
        "timestep": torch.tensor([0.2, 0.7]),
        "input_ids": torch.randint(3, 90, (BATCH, TEXT), generator=g),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": shown,
        "position_ids": torch.arange(length).expand(BATCH, -1),
    }


INPUTS: dict[str, Callable[[Any, Any], Made]] = {
    "AnyFlowTransformer3DModel": _flowing,
    "DiTTransformer2DModel": _labelled,
    "LatteTransformer3DModel": _moving,
    "MiniMaxMusic3RVQDepthDecoder": _depth,
    "MiniMaxMusic3Transformer1DModel": _music,
    "AceStepTransformer1DModel": _ace,
    "BriaFiboTransformer2DModel": _fibo,
    "CosmosTransformer3DModel": _cosmos,
    "ErnieImageTransformer2DModel": _ernie,
    "GlmImageTransformer2DModel": _glm,
    "HiDreamImageTransformer2DModel": _hidream,
    "HunyuanDiT2DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _second,
    "Kandinsky5Transformer3DModel": _kandinsky,
    "Krea2Transformer2DModel": _krea,
    "LTX2VideoTransformer3DModel": _sounding,
    "LongCatAudioDiTTransformer": _speech,
    "LuminaNextDiT2DModel": _lumina,
    "OmniGenTransformer2DModel": _nested,
    "PixArtTransformer2DModel": _pixart,
    "PriorTransformer": _prior,
    "StableAudio3DiTModel": _stable,
    "StableAudioDiTModel": _audio,
    "T5FilmDecoder": _film,
    "TransformerTemporalModel": _temporal,
    "WanVACETransformer3DModel": _vace,
    "ZImageTransformer2DModel": _listed,
}
INPUTS = {f"diffusers/{name}": made for name, made in INPUTS.items()}
"""Arguments of a forward, from the configuration and a generator of random numbers."""
