"""What is switched on and off on a model changes how it computes, not what."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.modeling_pyramid import UniRefinerPyramid
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)

FAMILIES = ("dinov2", "unirefiner_eva_clip_vision")
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("framed", [False, True])
def test_checkpointing_goes_on_and_off(family, framed):
    tower = make_tiny_tower(family)
    model = (UniRefinerModel.from_tower(tower) if framed else tower).train()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(PIXELS).last_hidden_state.square().sum().backward()
        weights = model.get_input_embeddings().parameters()
        return torch.cat([weight.grad.flatten().clone() for weight in weights])

    plain = gradient()
    for _ in range(2):
        model.gradient_checkpointing_enable()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        torch.testing.assert_close(gradient(), plain)
        model.gradient_checkpointing_disable()
        assert not any(
            getattr(m, "gradient_checkpointing", False) for m in model.modules()
        )
        torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pyramid_is_the_same_by_every_attention(family):
    backbone = UniRefinerBackbone.from_tower(make_tiny_tower(family)).eval()
    pyramid = UniRefinerPyramid.from_refined(backbone, pyramid_size=16)
    found = {}
    for kind in ("sdpa", "eager"):
        pyramid.set_attn_implementation(kind)
        with torch.no_grad():
            found[kind] = pyramid(PIXELS, output_hidden_states=True)
        assert len(found[kind].hidden_states) == 3
    for maps in ("feature_maps", "hidden_states"):
        for one, other in zip(found["sdpa"][maps], found["eager"][maps], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(pyramid(PIXELS, output_attentions=True).attentions) == 2
