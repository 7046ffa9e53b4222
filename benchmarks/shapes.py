"""Configs of public towers, so that a benchmark needs no network.

Figures are those of each checkpoint's config.json; weights are random in a benchmark, and do
not change its speed.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    InternVLVisionConfig,
    MLCDVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from unirefiner_hf.modeling.configuration_eva_clip import EvaClipVisionConfig


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
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    image_size: int,
    patch_size: int = 16,
) -> PreTrainedConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image_size,
        patch_size=patch_size,
    )


def _clip(width: int, layers: int, heads: int, mlp: int) -> PreTrainedConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=224,
        patch_size=14,
    )


def _dinov3(width: int, layers: int, heads: int) -> PreTrainedConfig:
    return DINOv3ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_register_tokens=4,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "facebook/dinov2-small": _dinov2(384, 12, 6),
    "facebook/dinov2-base": _dinov2(768, 12, 12),
    "facebook/dinov2-large": _dinov2(1024, 24, 16),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24, use_swiglu_ffn=True),
    "google/siglip2-base-patch16-512": _siglip(768, 12, 12, 3072, 512),
    "google/siglip2-so400m-patch16-512": _siglip(1152, 27, 16, 4304, 512),
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 40, 16, 6144, 384),
    "google/siglip2-large-patch16-512": _siglip(1024, 24, 16, 4096, 512),
    "google/siglip-base-patch16-512": _siglip(768, 12, 12, 3072, 512),
    "google/siglip-so400m-patch14-384": _siglip(1152, 27, 16, 4304, 384, 14),
    "openai/clip-vit-base-patch16": CLIPVisionConfig(patch_size=16),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 16, 4096),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": _clip(1408, 40, 16, 6144),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12, 12),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16),
    "DeepGlint-AI/rice-vit-large-patch14-560": MLCDVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=560,
        patch_size=14,
    ),
    "BAAI/EVA-CLIP-8B-448": EvaClipVisionConfig(image_size=448),
    "OpenGVLab/InternViT-6B-224px": InternVLVisionConfig(
        hidden_size=3200,
        num_hidden_layers=45,
        num_attention_heads=25,
        intermediate_size=12800,
        image_size=224,
        norm_type="rms_norm",
        use_qk_norm=True,
    ),
}
"""Hub id -> config of its vision tower."""
