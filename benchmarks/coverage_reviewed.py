"""What was reviewed by hand: softmaxes that are no attention, attention that is left alone, and
attention that no output depends on; each with a reason.

An entry names a model type and a place (the path of a module with `*` for numbers), both as a
pattern of the whole name.
"""

from __future__ import annotations

import re

__all__ = ["LEFT_ALONE", "NEVER_READ", "NOT_ATTENTION", "left_alone", "never_read", "not_attention"]

NOT_ATTENTION: tuple[tuple[str, str, str], ...] = (
    (r".*", r"(.*\.)?\w*(router|gate)", "a router of experts"),
    ("convbert", r".*attention\.self", "the kernel of a dynamic convolution"),
    ("groupvit.*", r".*downsample\.assign", "a hard choice of one group a token"),
    (
        r"deepseek_v\d+|glm\d+_next.*",
        r".*(attn|ffn)_hc|(.*\.)?layers\.\*",
        "mixes residual streams",
    ),
    (
        r"deepseek_v\d+|glm\d+_next.*",
        r".*\.(compressor|indexer).*",
        "pooling of neighbouring tokens by learned gates",
    ),
    ("diffusers/NucleusMoEImageTransformer2DModel", r".*img_mlp", "a router of experts"),
    ("dbrx", r"blocks\.\*\.ffn", "a router of experts"),
    ("zoedepth", r"metric_head.*", "the bins of a depth"),
    (r"ovis2.*", r"(|vision_tower)", "a choice of visual words"),
    (r"blt.*", r"(|patcher)", "the entropy of the next byte"),
    (r"granite_speech.*", r"(|.*encoder)", "the words heard so far, fed back to the encoder"),
    (r"lightglue|superglue|superpoint", r".*keypoint_decoder", "a heat map of key points"),
    ("mgp-str", r"\w+_a3_module", "pooling of tokens by learned scores"),
    ("patchtsmixer", r".*gating_block.*", "a gate over features"),
    ("vits", r"(|.*flows.*)", "the bins of a spline"),
)

LEFT_ALONE: tuple[tuple[str, str, str], ...] = (
    (
        "longformer|led",
        r"(|.*self_attn.*|.*attention\.self)",
        "a band in overlapping chunks beside global tokens: several products under one softmax",
    ),
    (
        "big_bird|bigbird_pegasus",
        r"(|.*attention\.self|.*self_attn.*)",
        "blocks, random blocks and global blocks gathered together: several products a row",
    ),
    (
        "pegasus_x",
        r"encoder\.layers\.\*\.self_attn",
        "blocks beside global tokens: two products under one softmax",
    ),
    (
        "nystromformer",
        r".*attention\.self",
        "Nyström's method: a product of three softmaxes over means of tokens",
    ),
    (
        "autoformer",
        r".*(self_attn|encoder_attn)",
        "auto-correlation: a sum of values shifted by the delays that fit best",
    ),
    (
        "swiftformer|mobilevitv2",
        r".*(attn|attention)",
        "additive attention: scores of a linear layer, one context vector, no product with keys",
    ),
    (
        "oneformer|mask2former|.*detr.*|.*grounding-dino|omdet-turbo|d_fine|deimv2|pp_doclayout.*",
        r".*(deformable_layer\.self_attn|encoder_attn|cross_attn|encoder\.layers\.\*\.self_attn)",
        "deformable sampling: the weights of sampled points come from the query alone",
    ),
    (
        r"diffusers/MochiTransformer3DModel",
        r"transformer_blocks\.\*\.attn1",
        "each sample alone, over the tokens that are no padding: a loop that torch cannot trace",
    ),
    (
        r"florence2|florence_vision",
        r".*channel_attn",
        "attention over channels, named as such",
    ),
)
"""Each is found and named; its mathematics is not one product of queries with all keys."""

NEVER_READ: tuple[tuple[str, str, int, str], ...] = (
    ("groupvit.*", r".*downsample\.assign", 2, "a soft choice beside the hard one"),
    ("lilt", r".*attention\.self", 1, "the layout stream of the last layer"),
    ("pegasus_x", r"encoder\.layers\.\*\.self_attn", 1, "global tokens of the last layer"),
    (".*", r"vision_(tower|model)\.head\.attention", 1, "an unused pooler"),
    ("vitmatte|vitpose", r"backbone\.encoder\.layer.*", 1, "a stage behind the last output"),
    (".*grounding-dino", r".*swin\.encoder\.layers.*", 1, "a stage behind the last output"),
    ("sam2.*", r"(.*backbone\.)?blocks\.\*\.attn", 7, "weights beside fused attention"),
)
"""Attention that a forward computes without need, how often, and what it is: a graph has none of
it."""


def not_attention(name: str, place: str) -> str:
    """What the softmax at that place of a model is for; empty if it counts as attention."""
    return _reason(NOT_ATTENTION, name, place)


def left_alone(name: str, place: str) -> str:
    """Why the attention at that place is left alone; empty if it should not be."""
    return _reason(LEFT_ALONE, name, place)


def never_read(name: str, place: str) -> int:
    """How many of the attentions at that place no output depends on."""
    fits = re.fullmatch
    return sum(n for model, p, n, _ in NEVER_READ if fits(model, name) and fits(p, place))


def _reason(entries: tuple[tuple[str, str, str], ...], name: str, place: str) -> str:
    for model, pattern, reason in entries:
        if re.fullmatch(model, name) and re.fullmatch(pattern, place):
            return reason
    return ""
