"""Tiny random towers of every supported family, shared by the whole suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from unirefiner_hf.modeling.configuration_eva_clip import EvaClipVisionConfig
from unirefiner_hf.modeling.modeling_eva_clip import EvaClipVisionModel
from unirefiner_hf.modeling.towers import settle_tower

# One for each kind of tower: what tests outside the contract run over.
FAMILIES = (
    "dinov2",
    "dinov2_with_registers",
    "clip_vision_model",
    "siglip_vision_model",
)

_NATIVE = {
    "unirefiner_eva_clip_vision": (EvaClipVisionConfig, EvaClipVisionModel),
}
_RATIO: dict[str, Any] = {"mlp_ratio": 2}
_WIDTH: dict[str, Any] = {"intermediate_size": 64}
_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Config", "Dinov2Model", _RATIO),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        _RATIO,
    ),
    "dinov3_vit": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        {**_WIDTH, "num_register_tokens": 4},
    ),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", _WIDTH),
    "metaclip_2_vision_model": (
        "MetaClip2VisionConfig",
        "MetaClip2VisionModel",
        _WIDTH,
    ),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", _WIDTH),
    "siglip2_vision_model": ("Siglip2VisionConfig", "Siglip2VisionModel", _WIDTH),
    "vit": ("ViTConfig", "ViTModel", _WIDTH),
    "deit": ("DeiTConfig", "DeiTModel", _WIDTH),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel", _WIDTH),
    "vit_msn": ("ViTMSNConfig", "ViTMSNModel", _WIDTH),
    "ijepa": ("IJepaConfig", "IJepaModel", _WIDTH),
    "mlcd_vision_model": ("MLCDVisionConfig", "MLCDVisionModel", _WIDTH),
    "internvl_vision": (
        "InternVLVisionConfig",
        "InternVLVisionModel",
        {**_WIDTH, "use_qk_norm": True},
    ),
    "aimv2_vision_model": (
        "Aimv2VisionConfig",
        "Aimv2VisionModel",
        {**_WIDTH, "is_native": True},
    ),
    "tipsv2_vision_model": ("Tipsv2VisionConfig", "Tipsv2VisionModel", _RATIO),
    "beit": ("BeitConfig", "BeitModel", {**_WIDTH, "use_relative_position_bias": True}),
    "radio": ("RadioConfig", "RadioModel", {"mlp_ratio": 2.0, "max_img_size": 32}),
    "pixio": ("PixioConfig", "PixioModel", _RATIO),
    "unirefiner_eva_clip_vision": ("", "", _WIDTH),
}
ALL_FAMILIES = tuple(_TINY)


def _build(family: str, options: dict[str, Any]) -> PreTrainedModel:
    config_name, model_name, extra = _TINY[family]
    if family in _NATIVE:
        config_class, model_class = _NATIVE[family]
    else:
        config_class = getattr(transformers, config_name)
        model_class = getattr(transformers, model_name)
    if family == "siglip2_vision_model":
        options["num_patches"] = (
            options.pop("image_size") // options["patch_size"]
        ) ** 2
    if family == "beit":
        options["out_indices"] = [1]
    return model_class(config_class(**options, **extra))


def make_tiny_tower(
    family: str,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 2,
    patch_size: int = 4,
    image_size: int = 16,
    seed: int = 0,
) -> PreTrainedModel:
    """A tiny tower of `family` in eval mode, the same weights for the same seed.

    Every parameter is moved off its initial value, so that norms, biases and position
    embeddings matter to a test. The caller's random state is left alone.
    """
    if family not in _TINY:
        raise ValueError(f"no tiny tower for {family!r}; there are {ALL_FAMILIES}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = _build(
            family,
            {
                "hidden_size": hidden_size,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "patch_size": patch_size,
                "image_size": image_size,
            },
        )
        settle_tower(tower)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


@pytest.fixture
def tiny_tower() -> Callable[..., PreTrainedModel]:
    """Factory: ``tiny_tower("dinov2", image_size=16)``; see `make_tiny_tower`."""
    return make_tiny_tower


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One family of each kind in turn."""
    return request.param
