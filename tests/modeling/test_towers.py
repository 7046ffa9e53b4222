"""The table of families, loading and probing."""

import dataclasses

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    Data2VecVisionConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    Sam3ViTConfig,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from tests.conftest import ALL_FAMILIES as TINY
from tests.conftest import make_tiny_tower
from unirefiner_hf import UniRefinerModel
from unirefiner_hf.modeling.families import (
    DUAL_ENCODERS,
    FAMILIES,
    REFUSED,
    family_of,
    image_size_of,
    patch_size_of,
)
from unirefiner_hf.modeling.recording import record_queries_keys
from unirefiner_hf.modeling.towers import check_tower, load_tower

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "image_size": 16,
}
DUAL = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
}


def test_every_family_has_a_tiny_tower():
    assert set(TINY) == set(FAMILIES)


def test_tiny_towers_pass_the_probe(family):
    check_tower(make_tiny_tower(family))


@pytest.mark.parametrize("kind", DUAL)
def test_dual_encoder_gives_its_vision_half(kind, tmp_path, caplog):
    model = DUAL[kind]()
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    assert tower.config.model_type == f"{kind}_vision_model"
    assert not tower.training
    expected = model.vision_model.state_dict()
    loaded = tower.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert family_of(model.config) is family_of(tower.config)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_vision_checkpoint_round_trip(family, dtype, tmp_path):
    tower = make_tiny_tower(family)
    tower.save_pretrained(tmp_path)
    loaded = load_tower(str(tmp_path), dtype=dtype, attn_implementation="eager")
    assert loaded.dtype == (dtype or torch.float32)
    assert loaded.config._attn_implementation == "eager"
    weights = loaded.state_dict()
    for name, weight in tower.state_dict().items():
        assert torch.equal(weights[name], weight.to(loaded.dtype))


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_tiny_tower("dinov2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    weights["head.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layernorm.weight.*head.weight"):
        load_tower(str(tmp_path))


def test_unsupported_tower_names_itself_and_the_list():
    with pytest.raises(ValueError, match="'resnet'.*clip.*dinov2.*siglip"):
        family_of(ResNetConfig())


def test_probe_names_what_it_looked_for(family):
    tower = make_tiny_tower(family)
    entry = family_of(tower.config)
    layer = tower.get_submodule(entry.layers)[1]
    owner, _, name = entry.key.rpartition(".")
    delattr(layer.get_submodule(owner), name)
    with pytest.raises(ValueError, match=entry.key):
        check_tower(tower)


def test_probe_counts_layers_and_finds_norm_and_head(family):
    entry = family_of(make_tiny_tower(family).config)
    short = make_tiny_tower(family)
    del short.get_submodule(entry.layers)[1]
    with pytest.raises(ValueError, match="1 layers.*num_hidden_layers=2"):
        check_tower(short)
    bare = make_tiny_tower(family)
    if entry.norm_path(bare.config) is not None:
        delattr(bare, entry.final_norm)
        with pytest.raises(ValueError, match=entry.final_norm):
            check_tower(bare)
    if entry.pooling_head is not None:
        headless = make_tiny_tower(family)
        delattr(headless, entry.pooling_head)
        with pytest.raises(ValueError, match=entry.pooling_head):
            check_tower(headless)


def test_oblong_patches_are_refused():
    config = make_tiny_tower("dinov2").config
    config.patch_size = [4, 4]
    assert patch_size_of(config) == 4
    config.patch_size = [4, 8]
    with pytest.raises(ValueError, match="4, 8"):
        patch_size_of(config)


def test_recorded_layers_are_those_asked_for():
    tower = make_tiny_tower("dinov2_with_registers", layers=3)
    with record_queries_keys(tower, (2, 1)) as recorded, torch.no_grad():
        tower(torch.randn(2, 3, 16, 16))
    assert set(recorded) == {1, 2} and len(recorded) == 2
    queries, keys = recorded[1]
    assert queries.shape == keys.shape == (2, 5 + 16, 32)


def test_hooks_are_gone_on_exit_even_after_an_error():
    tower = make_tiny_tower("dinov2")
    with pytest.raises(KeyError), record_queries_keys(tower, (0,)):
        raise KeyError("stop")
    error = pytest.raises(ValueError, match="no layer 2 in a tower of 2 layers")
    with error, record_queries_keys(tower, (0, 2)):
        pass
    assert not any(module._forward_hooks for module in tower.modules())


def test_table_is_plain_data():
    for entry in FAMILIES.values():
        for value in dataclasses.astuple(entry):
            assert value is None or isinstance(value, (str, int, bool, tuple))
    duals = {"clip", "metaclip_2", "siglip", "siglip2", "aimv2", "tipsv2"}
    assert set(DUAL_ENCODERS) == duals
    assert not set(REFUSED) & set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (SwinConfig(), "no token per patch"),
        (Sam3ViTConfig(), "windows"),
        (TimmWrapperConfig(), "torchvision"),
        (Data2VecVisionConfig(), "attention interface"),
    ],
)
def test_refusals_say_why(config, reason):
    with pytest.raises(ValueError, match=f"{config.model_type}.*{reason}.*Supported"):
        family_of(config)


def test_aimv2_with_learned_positions_is_refused(tmp_path):
    config = Aimv2VisionConfig(**VISION, is_native=False)
    with pytest.raises(ValueError, match="is_native=False.*one grid"):
        UniRefinerModel.from_tower(Aimv2VisionModel(config))
    Aimv2VisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_native=False.*one grid"):
        load_tower(str(tmp_path))


def test_naflex_patches_without_their_grid_are_refused():
    model = UniRefinerModel.from_tower(make_tiny_tower("siglip2_vision_model"))
    with pytest.raises(ValueError, match="NaFlex.*images"):
        model(torch.zeros(2, 16, 48))
    assert model.config.image_size == image_size_of(model.tower.config) == 16


def test_chance_is_taken_out_of_a_tower():
    tower = ViTMAEModel(ViTMAEConfig(**VISION, mask_ratio=0.75))
    model = UniRefinerModel.from_tower(tower).train()
    assert model(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 16, 32)
    rotary = DINOv3ViTModel(DINOv3ViTConfig(**VISION)).train()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(rotary(pixels)[0], rotary(pixels)[0])
        model = UniRefinerModel.from_tower(rotary)
        assert torch.equal(model(pixels)[0], model(pixels)[0])
    dropping = BeitModel(BeitConfig(**VISION, out_indices=[1], drop_path_rate=0.9))
    model = UniRefinerModel.from_tower(dropping.train())
    with torch.no_grad():
        assert torch.equal(model(pixels)[0], model(pixels)[0])


def test_classification_checkpoint_gives_its_tower(tmp_path):
    whole = ViTForImageClassification(ViTConfig(**VISION))
    whole.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    assert tower.pooler is None
    expected = whole.vit.state_dict()
    loaded = tower.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
