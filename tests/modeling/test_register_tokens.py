"""Learned register tokens join the sequence and leave no trace in what is returned."""

import json

import pytest
import torch
from transformers import AutoModel

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from unirefiner_hf.modeling.configuration_unirefiner import UniRefinerConfig
from unirefiner_hf.modeling.families import FAMILIES
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)

TAKING = [name for name in ALL_FAMILIES if FAMILIES[name].positions is not None]


def make(family, **options):
    torch.manual_seed(0)
    options = {"register_width": 0, "num_register_tokens": 3, **options}
    return UniRefinerModel.from_tower(make_tiny_tower(family), **options).eval()


@pytest.fixture(params=TAKING)
def family(request):
    return request.param


@torch.no_grad()
def test_outputs_are_of_the_image_alone(family):
    model = make(family, attn_implementation="eager")
    pixels = torch.randn(2, 3, 24, 16)
    out = model(pixels, output_hidden_states=True, output_attentions=True)
    assert out.last_hidden_state.shape == (2, 24, 32)
    assert out.feature_map.shape == (2, 32, 6, 4)
    assert {state.shape for state in out.hidden_states} == {(2, 24, 32)}
    assert {each.shape for each in out.attentions} == {(2, 2, 24, 24)}
    framed = model(pixels, register_width=1)
    assert framed.last_hidden_state.shape == (2, 24, 32)
    with model.without_register_tokens():
        bare = model(pixels).last_hidden_state
    plain = make(family, num_register_tokens=0)(pixels).last_hidden_state
    torch.testing.assert_close(bare, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(bare, out.last_hidden_state, atol=1e-4)


@torch.no_grad()
def test_a_saved_model_comes_back_with_its_tokens(family, tmp_path):
    model = make(family)
    pixels = torch.randn(1, 3, 16, 24)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.register_tokens.equal(model.register_tokens)
    assert again(pixels).last_hidden_state.equal(model(pixels).last_hidden_state)
    backbone = UniRefinerBackbone.from_pretrained(tmp_path, out_features=["stage1"])
    assert backbone(pixels).feature_maps[0].shape == (1, 32, 4, 6)


@torch.no_grad()
def test_a_pooling_head_sees_the_image_only():
    model = make("siglip_vision_model")
    pixels = torch.randn(1, 3, 16, 16)
    out = model(pixels)
    expected = model.tower.head(out.last_hidden_state)
    torch.testing.assert_close(out.pooler_output, expected)


def test_files_without_tokens_stay_readable_for_older_code(tmp_path):
    for tokens, version in ((0, 1), (3, 2)):
        make("dinov2", num_register_tokens=tokens).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["format_version"] == version


def test_tokens_start_small_and_drawn():
    tokens = make("dinov2", num_register_tokens=400).register_tokens
    assert tokens.std().item() == pytest.approx(32**-0.5, rel=0.05)
    config = UniRefinerConfig(
        vision_config=make_tiny_tower("dinov2").config, num_register_tokens=400
    )
    fresh = UniRefinerModel(config).register_tokens
    assert fresh.std().item() == pytest.approx(32**-0.5, rel=0.05)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_register_tokens is -1"):
        UniRefinerConfig(num_register_tokens=-1)
    rotary = make_tiny_tower("dinov3_vit").config
    with pytest.raises(ValueError, match="positions are rotary"):
        UniRefinerModel(UniRefinerConfig(vision_config=rotary, num_register_tokens=1))
