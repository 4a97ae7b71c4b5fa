"""What cannot be guessed of architectures of text, of time series and of proteins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_inputs import BATCH, LENGTH, mask, words
from torch import Tensor

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS"]

ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}

EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}

OPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {**SERIES, "label_length": 4},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {"rope_parameters": ROPES},
    "cohere_compass": {"text_config": {"rope_parameters": ROPES}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": EXPERTS},
    "diffusion_gemma_text": EXPERTS,
    "esm": {"vocab_size": 99, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "informer": SERIES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral_large4_text": {"num_hidden_layers": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 200,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "time_series_transformer": SERIES,
    "timesfm": {"patch_length": 8, "context_length": 32, "horizon_length": 8},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "xlstm": {"num_heads": 4, "chunkwise_kernel": "chunkwise--native_autograd"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}

MODELS: dict[str, str] = {
    "step3p5": "Step3p5Model",
}


def _series(config: Any, generator: torch.Generator) -> dict[str, Any]:
    past = torch.randn(BATCH, config.context_length + 3, generator=generator)
    return {
        "past_values": past,
        "past_time_features": torch.randn(*past.shape, 1, generator=generator),
        "past_observed_mask": torch.ones_like(past),
        "future_values": torch.randn(BATCH, 4, generator=generator),
        "future_time_features": torch.randn(BATCH, 4, 1, generator=generator),
    }


def _patched(config: Any, generator: torch.Generator) -> dict[str, Any]:
    values = torch.randn(BATCH, 32, generator=generator)
    padding = torch.zeros(BATCH, 32)
    padding[1, :8] = 1
    return {
        "past_values": values,
        "past_values_padding": padding,
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    }


def _long(length: int) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    def made(config: Any, generator: torch.Generator) -> dict[str, Any]:
        ids = words(generator, length)
        return {"input_ids": ids, "attention_mask": mask(length, length // 5)}

    return made


def _decided(config: Any, generator: torch.Generator) -> dict[str, Any]:
    def drawn(width: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, width, generator=generator)

    return {
        "states": drawn(config.state_dim),
        "actions": drawn(config.act_dim),
        "rewards": drawn(1),
        "returns_to_go": drawn(1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, -1),
        "attention_mask": mask(),
    }


INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "autoformer": _series,
    "big_bird": _long(160),
    "decision_transformer": _decided,
    "informer": _series,
    "time_series_transformer": _series,
    "timesfm": _patched,
}
OPTIONS["big_bird"] = {"block_size": 8, "num_random_blocks": 2, "max_position_embeddings": 256}

LEFT_OUT: dict[str, str] = {
    "blt_local_decoder": "a part of blt",
    "blt_local_encoder": "a part of blt",
    "encoder-decoder": "a composition of given models",
    "glmga": "no model class",
    "internlm3": "no model class",
    "iquestcoder": "no model class",
    "rag": "needs a retriever",
    "t5_gemma_module": "a part of t5gemma",
}
