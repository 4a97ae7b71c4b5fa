"""What cannot be guessed of architectures of text, of time series and of proteins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_inputs import BATCH, LENGTH, mask, words
from torch import Tensor

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS", "VARIANTS"]

ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SERIES = {
    "prediction_length": 4,
    "context_length": 16,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
}

BLOCKS = {
    "attention_type": "block_sparse",
    "block_size": 8,
    "num_random_blocks": 2,
    "max_position_embeddings": 256,
}
NEAR = {"local_radius": 4, "global_block_size": 4}
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
    "glm5_next_text": {"index_kpool": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "informer": SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64},
    "longformer": {"attention_window": 8},
    "longt5": NEAR,
    "nystromformer": {"num_landmarks": 5, "segment_means_seq_len": 20},
    "mistral_large4_text": {"num_hidden_layers": 2},
    "mistral_large4": {"text_config": {"num_hidden_layers": 2}},
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


def _global(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """A first token that sees and is seen by all."""
    shown = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    shown[:, 0] = 1
    text = {"input_ids": words(generator), "attention_mask": mask(), "global_attention_mask": shown}
    if config.model_type == "led":
        text |= {"decoder_input_ids": words(generator, 12), "use_cache": False}
    return text


def _blocks(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return _long(160)(config, generator) | {
        "decoder_input_ids": words(generator, 12),
        "decoder_attention_mask": mask(12, 3),
        "use_cache": False,
    }


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
    "bigbird_pegasus": _blocks,
    "decision_transformer": _decided,
    "led": _global,
    "longformer": _global,
    "informer": _series,
    "time_series_transformer": _series,
    "timesfm": _patched,
}

VARIANTS: dict[str, str] = {
    "big_bird-full": "big_bird",
    "bigbird_pegasus-full": "bigbird_pegasus",
    "esm-absolute": "esm",
    "falcon-alibi": "falcon",
    "falcon-grouped": "falcon",
    "longt5-global": "longt5",
    "mistral-full": "mistral",
    "qwen2-sliding": "qwen2",
}
"""Second forms of attention that a configuration can ask for: name -> model type."""

OPTIONS |= {
    "big_bird": BLOCKS,
    "big_bird-full": {"attention_type": "original_full"},
    "bigbird_pegasus": BLOCKS,
    "bigbird_pegasus-full": {"attention_type": "original_full"},
    "esm-absolute": {"vocab_size": 99, "pad_token_id": 1, "position_embedding_type": "absolute"},
    "falcon-alibi": {"alibi": True},
    "falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "longt5-global": {"encoder_attention_type": "transient-global", **NEAR},
    "mistral-full": {"sliding_window": None},
    "qwen2-sliding": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8},
}

LEFT_OUT: dict[str, str] = {
    "blt_local_decoder": "a part of blt",
    "blt_local_encoder": "a part of blt",
    "encoder-decoder": "a composition of given models",
    "esmfold2": "a sampler of structures; widths tied across eight configurations",
    "glmga": "no model class",
    "internlm3": "no model class",
    "iquestcoder": "no model class",
    "rag": "needs a retriever",
    "t5_gemma_module": "a part of t5gemma",
}
