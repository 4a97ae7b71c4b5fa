"""What cannot be guessed of architectures of sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_inputs import BATCH, mask, words

__all__ = ["INPUTS", "LEFT_OUT", "MODELS", "OPTIONS"]

CLAP = {
    "spec_size": 32,
    "num_mel_bins": 16,
    "patch_embeds_hidden_size": 32,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": 2,
    "window_size": 4,
    "hidden_size": 64,
}
CODEC = {
    "model_type": "encodec",
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 64,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
}
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 99,
}
MUSIC = {
    "text_encoder": T5,
    "audio_encoder": CODEC,
    "decoder": {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "num_codebooks": 4,
        "max_position_embeddings": 64,
    },
}

OPTIONS: dict[str, dict[str, Any]] = {
    "clap": {"audio_config": CLAP},
    "clap_audio_model": CLAP,
    "clvp": {
        "text_config": {"num_attention_heads": 2},
        "speech_config": {"num_attention_heads": 2},
    },
    "muse_spark_audio": {"num_hidden_layers": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "fastspeech2_conformer_with_hifigan": {"model_config": {"vocab_size": 99, "num_mel_bins": 80}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 64,
    },
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite_speech_encoder": {"context_size": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
    "qwen3_asr_encoder": {"n_window": 8, "n_window_infer": 32},
    "qwen3_omni_moe_audio_encoder": {"n_window": 8, "n_window_infer": 32},
}

MODELS: dict[str, str] = {
    "bark": "BarkSemanticModel:semantic_config",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "speecht5": "SpeechT5ForSpeechToText",
}


def _codes(decoder: bool) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    def made(config: Any, generator: torch.Generator) -> dict[str, Any]:
        channels = getattr(config, "decoder_config", config).num_channels
        codes = torch.randint(3, 60, (BATCH, 12, channels), generator=generator)
        if decoder:
            width = config.cross_hidden_size
            states = torch.randn(BATCH, 11, width, generator=generator)
            return {"input_ids": codes, "encoder_hidden_states": states, "use_cache": False}
        return {
            "input_ids": words(generator),
            "attention_mask": mask(),
            "decoder_input_ids": codes,
        }

    return made


def _music(config: Any, generator: torch.Generator) -> dict[str, Any]:
    books = config.decoder.num_codebooks
    return {
        "input_ids": words(generator),
        "attention_mask": mask(),
        "decoder_input_ids": torch.randint(3, 60, (BATCH * books, 8), generator=generator),
    }


def _spoken(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_values": torch.randn(BATCH, 4000, generator=generator),
        "attention_mask": mask(4000, 800),
        "decoder_input_ids": torch.randint(3, 60, (BATCH, 12), generator=generator),
    }


def _semantic(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": words(generator), "attention_mask": mask(), "use_cache": False}


def _deep(config: Any, generator: torch.Generator) -> dict[str, Any]:
    states = torch.randn(BATCH, config.num_codebooks, config.input_size, generator=generator)
    return {
        "input_ids": words(generator, config.num_codebooks),
        "last_hidden_state": states,
        "use_cache": False,
    }


def _masked(config: Any, generator: torch.Generator) -> dict[str, Any]:
    states = torch.randn(BATCH, 64, config.input_size, generator=generator)
    return {"hidden_states": states, "mask": mask(64, 16).bool()}


def _chunks(config: Any, generator: torch.Generator) -> dict[str, Any]:
    samples = torch.tensor([64, 40]) * config.hop_length
    features = torch.randn(BATCH, config.feature_size, 64, generator=generator)
    return {"input_features": features, "chunk_sample_lengths": samples}


def _waves(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 3840, generator=generator)}


INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "bark": _semantic,
    "dia": _codes(False),
    "dia_decoder": _codes(True),
    "dots3_note_audio_encoder": _chunks,
    "moshi_depth": _deep,
    "muse_spark_audio": _waves,
    "musicgen": _music,
    "musicgen_melody": _music,
    "phi4_multimodal_audio": _masked,
    "speecht5": _spoken,
}

LEFT_OUT: dict[str, str] = {
    "fastspeech2_conformer_hifigan": "no attention",
    "gemma4_unified_audio": "no model class",
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "inkling_mm_model": "needs scipy",
    "inkling_vision": "needs scipy",
    "pe_audio_video": "needs timm",
    "pe_audio_video_encoder": "needs timm",
    "pe_video": "needs timm",
    "pe_video_encoder": "needs timm",
    "qwen2_5_omni_bigvgan": "no attention",
    "speech-encoder-decoder": "a composition of given models",
    "speecht5_hifigan": "no attention",
}
