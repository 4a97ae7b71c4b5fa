"""Tiny configurations from the configuration classes of a library: what a field is called says how
small it may be."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["VOCABULARY", "options_of", "small"]

VOCABULARY = 99
WIDTH, HEADS, HEAD, LAYERS = 64, 4, 16, 2

SIZES: tuple[tuple[str, int], ...] = (
    (r"(max_|sub_|char_|text_|audio_)?vocab_size(_per_layer_input)?|entity_vocab_size", VOCABULARY),
    (r"codebook_size|\w+_group_vocab", 64),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups", 2),
    (r"\w*linear_num_key_heads|linear_num_value_heads", 2),
    (r"(\w+_)?num_(attention_)?heads|n_heads?|(en|de)coder_attention_heads", HEADS),
    (r"(\w+_)?(attn|attention)_heads|nheads|\w+_n_heads?|num_heads_\w+", HEADS),
    (r"(\w+_)?(head_dim|dim_head)|d_kv|attention_head_size|head_size|attention_key_size", HEAD),
    (
        r"qk_nope_head_dim|v_head_dim|attention_head_dim|mamba_d_head|linear_(key|value)_head_dim",
        HEAD,
    ),
    (r"qk_rope_head_dim|index_head_dim", HEAD),
    (r"rotary_dim|rotary_emb_dim", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|\w*lora_rank|\w*rank_dim", 32),
    (r"index_n_heads", 2),
    (r"index_topk", 8),
    (
        r"(\w+_)?(num_(\w+_)?layers|n_layers?|num_blocks|num_hidden_blocks|depth)"
        r"|(en|de)coder_layers|nlayers|num_layers(_\w+)?",
        LAYERS,
    ),
    (r"(moe_|shared_expert_)\w*intermediate_size", 48),
    (r"(\w+_)?(intermediate_size|intermediate_dim|ffn_dim|mlp_dim|d_ff|ffn_hidden_size)", 96),
    (r"(\w+_)?(feedforward_dim|inner_dim|d_inner|ff_dim)|ffn_embed_dim", 96),
    (r"n_inner", 96),
    (
        r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|projection_dim|hidden_dim|embedding_size"
        r"|projector_dim|output_proj_dim|projection_size|hidden_sizes?)"
        r"|emb_dim|dim|out_dim|output_dim|proj_codevector_dim|upsample_groups|model_dim|d_latents"
        r"|decoder_hidden|encoder_hidden|embedding_dim|lru_width|depth_hidden_size"
        r"|\w+_hidden_size|hidden_size_global|dec_dim|enc_dim|cross_hidden_size|v_hidden_size",
        WIDTH,
    ),
    (r"hidden_size_per_layer_input", 16),
    (r"(\w+_)?conv_dim|tdnn_dim|(\w+_)?codevector_dim|classifier_proj_size", 32),
    (r"xvector_output_dim", 32),
    (r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"(n_group|topk_group|num_expert_groups?|first_k_dense_replace|n_shared_experts)", 1),
    (
        r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|context_length"
        r"|max_2d_position_embeddings|max_sequence_length)",
        128,
    ),
    (r"(max_source_positions|max_target_positions)", 128),
    (r"sliding_window|attention_window_size|local_window_size|local_attention", 8),
    (r"attention_chunk_size|index_block_size", 8),
    (r"image_size|input_size|img_size|input_resolution", 32),
    (r"patch_size", 8),
    (r"mm_tokens_per_image", 4),
    (r"spectrogram_length|max_length", 64),
    (r"num_mel_bins|n_mels|num_mels|input_feat_per_channel|spec_size", 16),
    (r"feature_size", 16),
    (r"num_queries|num_query_tokens|num_latents|query_length", 8),
    (r"num_frames|frames_per_clip", 2),
    (r"num_groups", 4),
    (r"(\w+_)?(num|n)_filters", 8),
    (r"base_channels", 32),
    (r"upsample_initial_channel", 64),
    (r"(\w+_)?num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"(mamba|ssm)_(d_state|n_groups|state_size)|state_size|ssm_state_size", 16),
    (r"chunk_size|mamba_chunk_size", 16),
)
"""Patterns of whole names, the first that fits wins; a default that is smaller stays."""

LISTS: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?(depths|num_blocks|layers|num_layers|depth)", 1),
    (r"(\w+_)?(num_(attention_)?heads)", 2),
    (r"(\w+_)?conv_dim", 32),
    (r"decoder_in_channels", WIDTH),
    (r"image_size|input_size|img_size", 32),
)
WIDTHS = r"(\w+_)?(hidden_sizes|embed_dims?|widths|encoder_channels)"

NOT_DROPPED = re.compile(
    r".*(dropout|drop_path|drop_rate|layerdrop|pdrop|drop_prob|jitter)(_prob|_rate|_p|_noise)?"
)
TOKEN = re.compile(r"(\w+_)?token_(id|index)(_\w+)?")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NEEDED = {
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "prediction_length": 4,
    "router_scaling_factor": 1.0,
}
"""Fields that some configurations leave open."""

RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def options_of(kind: type, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments that make a tiny configuration of the class.

    Args:
        kind: a configuration class of transformers, a dataclass.
        given: arguments that are known better; for a part of the configuration, a mapping.
    """
    given = dict(given or {})
    parts = dict(getattr(kind, "sub_configs", None) or {})
    try:
        default: Any = kind()
    except Exception:
        default = None
    options: dict[str, Any] = {}
    names = set()
    for field in dataclasses.fields(kind):
        name = field.name
        if name.startswith("_") or name in parts or not field.init:
            continue
        names.add(name)
        value = _default(field)
        smaller = small(name, value)
        if smaller is not value:
            options[name] = smaller
    for name, part in parts.items():
        if not dataclasses.is_dataclass(part) or part.__name__ == "AutoConfig":
            held = getattr(default, name, None)
            if held is None or isinstance(held, dict):
                continue
            part = type(held)
        inner = given.get(name, {})
        if isinstance(inner, Mapping) and "model_type" not in inner:
            if part.model_type == "timm_wrapper":
                continue
            if "timm" in (part.model_type or ""):
                given[name] = _backbone(getattr(default, name, None))
                if "use_timm_backbone" in names:
                    options["use_timm_backbone"] = False
                continue
            made = options_of(part, {**_outputs(getattr(default, name, None)), **inner})
            given[name] = {**made, "model_type": part.model_type} if part.model_type else made
    return {**_related(kind, options, names, default, given), **given}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _backbone(held: Any) -> dict[str, Any]:
    stages = getattr(held, "out_indices", None) or (4,)
    return {**RESNET, "out_features": [f"stage{i}" for i in range(5 - len(stages), 5)]}


def _outputs(held: Any) -> dict[str, Any]:
    """The stages that a backbone gives, where its layers are fewer."""
    outputs = getattr(held, "_out_features", None)
    flags = ("reshape_hidden_states", "apply_layernorm", "return_class_token")
    kept = {n: getattr(held, n) for n in flags if isinstance(getattr(held, n, None), bool)}
    if not outputs or not isinstance(getattr(held, "num_hidden_layers", None), int):
        return {"out_features": outputs} if outputs else {}
    count = len(outputs)
    names = [f"{outputs[0].rstrip('0123456789')}{i + 1}" for i in range(count)]
    return {"num_hidden_layers": max(count, LAYERS), "out_features": names, **kept}


def _related(
    kind: type, options: dict[str, Any], names: set[str], default: Any, given: dict[str, Any]
) -> dict[str, Any]:
    """The options, with those that depend on each other made consistent."""
    made = dict(options)

    def value(name: str) -> Any:
        held = given.get(name, made.get(name))
        return _held(default, name) if held is None else held

    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        made["num_key_value_heads"] = value("num_attention_heads")
    if "image_grid_pinpoints" in names:
        made["image_grid_pinpoints"] = [[32, 64], [64, 32], [64, 64]]
    for name, count in NEEDED.items():
        if name in names and value(name) is None:
            made[name] = count
    heads = value("num_attention_heads")
    if isinstance(heads, int) and "num_key_value_heads" in names:
        made["num_key_value_heads"] = min(heads, value("num_key_value_heads") or heads)
    if isinstance(heads, int) and "head_dim" in names and not made.get("head_dim"):
        made["head_dim"] = value("hidden_size") // heads
    if {"expand", "num_heads", "head_dim"} <= names:
        made["num_heads"] = value("hidden_size") * value("expand") // value("head_dim")
    if {"mamba_expand", "mamba_n_heads", "mamba_d_head"} <= names:
        made["mamba_d_head"] = HEAD
        made["mamba_n_heads"] = value("hidden_size") * value("mamba_expand") // HEAD
    layers = next((n for n in ("num_hidden_layers", "n_layer") if n in names), None)
    total = getattr(default, layers, None) if layers else None
    if layers and layers not in given and isinstance(total, int) and total > LAYERS:
        lists = {
            n: held
            for n in names
            if isinstance(held := _held(default, n), list)
            and len(held) == total
            and n not in given
            and not isinstance(held[0], dict | list | tuple)
        }
        first: set[int] = set()
        for held in lists.values():
            if len(set(held)) <= 4:
                first |= {held.index(x) for x in dict.fromkeys(held)}
        for index in range(total):
            if len(first) < LAYERS:
                first.add(index)
        if first and value("num_kv_shared_layers"):
            made["num_kv_shared_layers"] = len(first)
            first |= {max(first) + 1 + i for i in range(len(first))}
            kinds = lists.pop("layer_types", None) or []
            order = list(dict.fromkeys(kinds))
            made["layer_types"] = (order * len(first))[: len(first)]
        if lists or len(first) > LAYERS:
            made[layers] = len(first)
            made.update({n: [held[i] for i in sorted(first)] for n, held in lists.items()})
    rope = _held(default, "rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" in names and "rope_parameters" not in given:
        width = value("head_dim") or (value("hidden_size") or 64) // (
            value("num_attention_heads") or 1
        )
        if _sectioned(kind) and "mrope_section" not in rope and "rope_type" in rope:
            rope = rope | {"mrope_section": [1, 1, 1]}
        changed = _rope(rope, width)
        if changed != rope:
            made["rope_parameters"] = changed
    return made


def _rope(rope: Any, width: int) -> Any:
    """Rotary parameters whose sections fill half the rotary width."""
    if not isinstance(rope, dict):
        return rope
    changed = {n: _rope(x, width) for n, x in rope.items()}
    if rope.get("mrope_section"):
        half = int(width * (rope.get("partial_rotary_factor") or 1)) // 2
        count = len(rope["mrope_section"])
        least = max(1, round(half / count))
        changed["mrope_section"] = [*[least] * (count - 1), half - least * (count - 1)]
    return changed


def _held(default: Any, name: str) -> Any:
    """A value of the default configuration; None also where it differs from layer to layer."""
    try:
        return getattr(default, name, None)
    except Exception:
        return None


def _sectioned(kind: type) -> bool:
    """Whether the model of the configuration has rotary sections without its configuration having
    any: a default that is written in the code of the model."""
    path = Path(inspect.getfile(kind))
    model = path.with_name(path.name.replace("configuration_", "modeling_"))
    return model.exists() and 'get("mrope_section"' in model.read_text()


def small(name: str, value: Any) -> Any:
    """The value that a tiny model has instead of a default."""
    if isinstance(value, bool) or value is None:
        return value
    if TOKEN.fullmatch(name) and isinstance(value, int):
        return TOKENS.get(name, 3 + sum(map(ord, name)) % 40)
    if isinstance(value, float | int) and NOT_DROPPED.fullmatch(name):
        return 0.0 if isinstance(value, float) else 0
    if isinstance(value, int):
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return min(size, value)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
            return value
        for pattern, size in LISTS:
            if re.fullmatch(pattern, name):
                return type(value)(min(size, x) for x in value)
        if re.fullmatch(WIDTHS, name):
            return type(value)(min(16 * 2**i, x) for i, x in enumerate(value))
    return value
