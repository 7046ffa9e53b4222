"""Tiny random towers of every supported family, shared by the whole suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

FAMILIES = (
    "dinov2",
    "dinov2_with_registers",
    "clip_vision_model",
    "siglip_vision_model",
)

_TOWERS: dict[str, Callable[..., PreTrainedModel]] = {
    "dinov2": lambda **k: Dinov2Model(Dinov2Config(mlp_ratio=2, **k)),
    "dinov2_with_registers": lambda **k: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(mlp_ratio=2, **k)
    ),
    "clip_vision_model": lambda **k: CLIPVisionModel(
        CLIPVisionConfig(intermediate_size=64, **k)
    ),
    "siglip_vision_model": lambda **k: SiglipVisionModel(
        SiglipVisionConfig(intermediate_size=64, **k)
    ),
}


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
    if family not in _TOWERS:
        raise ValueError(f"no tiny tower for {family!r}; there are {FAMILIES}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = _TOWERS[family](
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            patch_size=patch_size,
            image_size=image_size,
        )
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
    """Every supported family in turn."""
    return request.param
