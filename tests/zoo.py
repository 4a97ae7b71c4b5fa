"""Tiny random models of the architectures that we test, and inputs for them; nothing is downloaded.

The weights are drawn wider than the models' own initialisation, which makes attention nearly
uniform: here a wrong score, not only a wrong mask, changes the output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Architecture", "Case", "architecture", "cases"]

Family = Literal["encoder", "decoder", "seq2seq", "speech", "vision"]

VOCABULARY = 97
# Not tied: a random model with tied embeddings repeats its last token for ever.
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_TOKENS,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Architecture:
    """One architecture: its classes, a tiny configuration, and what is to be found in it."""

    name: str
    model: str
    """Name of the model class in transformers."""
    config: str
    """Name of the configuration class in transformers."""
    options: dict[str, Any] = field(repr=False)
    family: Family
    sites: int
    """How many times one forward computes attention."""
    sdpa: bool = True
    """transformers can run it with `attn_implementation="sdpa"`."""

    @property
    def implementations(self) -> tuple[str, ...]:
        return ("eager", "sdpa") if self.sdpa else ("eager",)

    @property
    def generates(self) -> bool:
        return self.family in ("decoder", "seq2seq", "speech")

    def build(
        self,
        implementation: str = "eager",
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 2,
        **options: Any,
    ) -> nn.Module:
        """A model in evaluation mode; equal arguments give equal weights.

        `options` go to the configuration.
        """
        config = getattr(transformers, self.config)(**self.options | options)
        config._attn_implementation = implementation
        model: nn.Module = getattr(transformers, self.model)(config)
        _randomise(model, seed)
        return model.to(dtype).eval()

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, batch: int = 2, length: int = 20, seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of one forward.

        Text has a padded second row: on the left where a decoder generates, else on the right.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.family == "vision":
            side, channels = self.options["image_size"], self.options["num_channels"]
            pixels = torch.randn(batch, channels, side, side, generator=generator)
            return {"pixel_values": pixels.to(dtype)}
        if self.family == "speech":
            shape = (batch, self.options["num_mel_bins"], 2 * self.options["max_source_positions"])
            target, target_mask = _tokens(generator, batch, length, pad=5)
            return {
                "input_features": torch.randn(shape, generator=generator).to(dtype),
                "decoder_input_ids": target,
                "decoder_attention_mask": target_mask,
                "use_cache": False,
            }
        left = self.family == "decoder"
        tokens, mask = _tokens(generator, batch, length, pad=6, left=left)
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if self.family == "decoder":
            inputs["use_cache"] = False
        if self.family == "seq2seq":
            target, target_mask = _tokens(generator, batch, length - 3, pad=5)
            inputs |= {
                "decoder_input_ids": target,
                "decoder_attention_mask": target_mask,
                "use_cache": False,
            }
        return inputs

    def prompt(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `generate()`: `inputs` without what belongs to one forward."""
        given = self.inputs(dtype).items()
        return {name: x for name, x in given if name != "use_cache" and "decoder" not in name}


@dataclass(frozen=True)
class Case:
    """An architecture in one implementation and dtype; prints as `gemma2-eager-bf16`."""

    architecture: Architecture
    implementation: str
    dtype: torch.dtype

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.architecture.name}-{self.implementation}-{short}"

    def build(self, *, seed: int = 2, **options: Any) -> nn.Module:
        return self.architecture.build(self.implementation, self.dtype, seed=seed, **options)

    def inputs(self, **options: Any) -> dict[str, Any]:
        return self.architecture.inputs(self.dtype, **options)

    def prompt(self) -> dict[str, Any]:
        return self.architecture.prompt(self.dtype)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("bert", "BertModel", "BertConfig", _SMALL | _NO_DROPOUT, "encoder", sites=2),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            **_TOKENS,
        },
        "decoder",
        sites=2,
    ),
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        _SMALL | {"num_key_value_heads": 2},
        "decoder",
        sites=2,
    ),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        _SMALL | {"num_key_value_heads": 2, "sliding_window": 4},
        "decoder",
        sites=2,
    ),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _SMALL
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        "decoder",
        sites=2,
        sdpa=False,
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **_TOKENS,
        },
        "decoder",
        sites=2,
        sdpa=False,
    ),
    Architecture(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 128,
            **_TOKENS,
        },
        "decoder",
        sites=2,
        sdpa=False,
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",  # smooth: with a ReLU, roundings flip gradients
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "dropout_rate": 0.0,
            **_TOKENS,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
        sites=6,
    ),
    Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        # Every expert is chosen, so that a rounding never changes which ones.
        _SMALL
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "decoder",
        sites=2,
        sdpa=False,
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 24,
            "max_target_positions": 64,
            "dropout": 0.0,
            **_TOKENS,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "speech",
        sites=6,
    ),
    Architecture(
        "vit",
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_channels": 3,
            **_NO_DROPOUT,
        },
        "vision",
        sites=2,
    ),
    Architecture(
        "swin",
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "num_channels": 3,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
            **_NO_DROPOUT,
        },
        "vision",
        sites=4,
    ),
    Architecture(
        "deberta_v2",
        "DebertaV2Model",
        "DebertaV2Config",
        _SMALL
        | _NO_DROPOUT
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "max_relative_positions": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        "encoder",
        sites=2,
        sdpa=False,
    ),
)


def architecture(name: str) -> Architecture:
    """The architecture of that name."""
    return next(a for a in ARCHITECTURES if a.name == name)


def cases(*, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> list[Case]:
    """Every architecture in every implementation that transformers offers for it, in each dtype."""
    return [
        Case(a, implementation, dtype)
        for a in ARCHITECTURES
        for implementation in a.implementations
        for dtype in dtypes
    ]


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Matrices keep the size of what they multiply, vectors vary around their usual value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_embedding = any(part in name for part in ("embed", "wte", "wpe", "attention_bias"))
        if name.endswith(".q.weight"):  # of a model that does not scale its scores
            noise = noise * model.config.d_kv**-0.5
        if parameter.dim() >= 2 and not is_embedding:
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
        elif parameter.dim() >= 2:
            parameter.copy_(noise)
        else:
            is_gain = parameter.numel() > 0 and bool((parameter == 1).all())
            parameter.copy_(0.3 * noise + float(is_gain))


def _tokens(
    generator: torch.Generator, batch: int, length: int, *, pad: int, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask; the second row has `pad` padded places."""
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    if batch > 1:
        mask[1, slice(0, pad) if left else slice(length - pad, length)] = 0
    return tokens * mask, mask
