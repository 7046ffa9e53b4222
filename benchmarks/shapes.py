"""Configs of public towers, so that a benchmark needs no network.

Figures are those of each checkpoint's config.json; weights are random in a benchmark, and do
not change its speed.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    SiglipVisionConfig,
)


def _dinov2(width: int, layers: int, heads: int, **more: Any) -> PreTrainedConfig:
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=518,
        patch_size=14,
        **more,
    )


def _siglip(
    width: int, layers: int, heads: int, mlp: int, image_size: int
) -> PreTrainedConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image_size,
        patch_size=16,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "facebook/dinov2-small": _dinov2(384, 12, 6),
    "facebook/dinov2-base": _dinov2(768, 12, 12),
    "facebook/dinov2-large": _dinov2(1024, 24, 16),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24, use_swiglu_ffn=True),
    "google/siglip2-base-patch16-512": _siglip(768, 12, 12, 3072, 512),
    "google/siglip2-so400m-patch16-512": _siglip(1152, 27, 16, 4304, 512),
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 40, 16, 6144, 384),
    "openai/clip-vit-base-patch16": CLIPVisionConfig(patch_size=16),
}
"""Hub id -> config of its vision tower."""
