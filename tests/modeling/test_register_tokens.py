"""Learned register tokens join the sequence and leave no trace in what is returned."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModel

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from unirefiner_hf.export.onnx import export_program
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


PIXELS = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["dinov2", "clip_vision_model"])
def registered(request):
    tower = make_tiny_tower(request.param)
    options = {"register_width": 0, "num_register_tokens": 3}
    return UniRefinerModel.from_tower(tower, **options).eval()


def test_a_model_with_register_tokens_exports_and_compiles_whole(registered):
    with torch.no_grad():
        expected = registered(PIXELS).feature_map
        program = export_program(registered)
        torch.testing.assert_close(program.module()(PIXELS), expected)
        other = PIXELS[:1, :, :16, :24].contiguous()
        torch.testing.assert_close(
            program.module()(other), registered(other).feature_map, rtol=1e-4, atol=1e-4
        )
        whole = torch.compile(registered, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(PIXELS).feature_map, expected)


def test_threads_do_not_share_register_tokens(registered):
    with torch.no_grad():
        expected = registered(PIXELS).last_hidden_state

    def encode(_):
        with torch.no_grad():
            return registered(PIXELS).last_hidden_state

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encode, range(40)))
    assert all(torch.equal(tokens, expected) for tokens in found)


def test_a_copy_joins_its_own_register_tokens(registered):
    with torch.no_grad():
        expected = registered(PIXELS).last_hidden_state
        copied = copy.deepcopy(registered)
        copied.register_tokens.zero_()
        assert not torch.equal(copied(PIXELS).last_hidden_state, expected)
        assert torch.equal(registered(PIXELS).last_hidden_state, expected)


def test_another_tower_gets_the_register_tokens_once(registered):
    kind = registered.config.vision_config.model_type
    registered.tower = make_tiny_tower(kind, seed=1)
    registered.tower = registered.tower
    assert registered(PIXELS).last_hidden_state.shape == (2, 30, 32)
