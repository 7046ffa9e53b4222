"""UniRefinerConfig: its checks and its file."""

import json

import pytest

from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.configuration_unirefiner import UniRefinerConfig
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel


def config(**options):
    return UniRefinerConfig(vision_config=make_tiny_tower("dinov2").config, **options)


def test_misspelt_field_names_the_nearest():
    with pytest.raises(ValueError, match="register_widht.*'register_width'"):
        config(register_widht=2)
    with pytest.raises(ValueError, match="finalnorm.*'final_norm'"):
        config(finalnorm=True)


def test_unknown_field_lists_the_valid_ones():
    with pytest.raises(ValueError, match="no field 'teapot'.*register_fill"):
        config(teapot=1)


def test_standard_fields_pass():
    made = config(
        architectures=["UniRefinerModel"],
        dtype="bfloat16",
        name_or_path="somewhere",
        output_attentions=False,
        output_hidden_states=True,
        attn_implementation="sdpa",
        num_labels=3,
        torch_dtype="bfloat16",
        auto_map={},
        _commit_hash="abc",
    )
    assert made.output_hidden_states is True
    assert made.vision_config._attn_implementation == "sdpa"


def test_file_of_a_later_transformers_keeps_its_unknown_field(tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"brand_new_standard_key": 1}))
    assert UniRefinerConfig.from_pretrained(tmp_path).brand_new_standard_key == 1
    path.write_text(json.dumps(saved | {"register_widht": 1}))
    with pytest.raises(ValueError, match="register_width"):
        UniRefinerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"register_width": -1}, "-1"),
        ({"register_fill": "noise"}, "noise"),
        ({"format_version": 3}, "format_version is 3"),
    ],
)
def test_settings_out_of_range(options, named):
    with pytest.raises(ValueError, match=named):
        config(**options)


def test_file_round_trip(tmp_path):
    made = config(
        method="ph_reg",
        register_width=3,
        register_fill="randn",
        register_seed=5,
        apply_layernorm=False,
        reshape_hidden_states=False,
        out_features=["stem", "stage2"],
    )
    made.save_pretrained(tmp_path)
    loaded = UniRefinerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == made.to_dict() | {"auto_map": loaded.auto_map}
    assert loaded.out_indices == [0, 2]
    assert type(loaded.vision_config) is type(made.vision_config)
    assert loaded.vision_config.to_dict() == made.vision_config.to_dict()


@pytest.mark.parametrize("method", ["unirefiner", "ph_reg", "a_fourth"])
def test_method_goes_with_the_checkpoint(method, tmp_path):
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    assert model.config.method is None
    model.config.method = method
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["method"] == method and saved["format_version"] == 1
    assert UniRefinerModel.from_pretrained(tmp_path).config.method == method


def test_a_file_of_an_earlier_version_has_no_method(tmp_path):
    config(num_register_tokens=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["method"]
    path.write_text(json.dumps(saved))
    assert UniRefinerConfig.from_pretrained(tmp_path).method is None


def test_no_path_is_written(tmp_path):
    tower = make_tiny_tower("clip_vision_model")
    tower.save_pretrained(tmp_path / "private_place")
    model = UniRefinerModel.from_tower(str(tmp_path / "private_place"))
    model.save_pretrained(tmp_path / "out")
    assert "private_place" not in (tmp_path / "out" / "config.json").read_text()
    assert "private_place" not in str(model.config.to_dict())
    assert model.tower.config.name_or_path.endswith("private_place")


def test_vision_config_is_copied():
    tower = make_tiny_tower("dinov2")
    made = UniRefinerConfig(vision_config=tower.config)
    assert made.vision_config is not tower.config
    assert tower.config._attn_implementation == "sdpa"


def test_sizes_come_from_the_tower():
    made = config()
    assert (made.hidden_size, made.patch_size, made.image_size) == (32, 4, 16)
    assert (made.num_hidden_layers, made.num_attention_heads) == (2, 2)
    assert made.stage_names == ["stem", "stage1", "stage2"]
    assert made.out_features == ["stage2"]
