"""What transformers asks of every config, asked of ours.

Its wheel holds no tests; these are the checks of its ``ConfigTester``, and a few that it
leaves to each model.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DPTConfig, PreTrainedConfig

from tests.conftest import make_tiny_tower
from unirefiner_hf.modeling.configuration_eva_clip import EvaClipVisionConfig
from unirefiner_hf.modeling.configuration_pyramid import UniRefinerPyramidConfig
from unirefiner_hf.modeling.configuration_unirefiner import UniRefinerConfig, own_fields
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.modeling_pyramid import UniRefinerPyramid
from unirefiner_hf.modeling.modeling_unirefiner import (
    UniRefinerBackbone,
    UniRefinerModel,
)
from unirefiner_hf.modeling.published_intern_vit import PublishedInternViTConfig

STANDARD = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "chunk_size_feed_forward": 5,
    "architectures": ["Anything"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
    "is_encoder_decoder": True,
}

DINOV2 = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 3}
EVA_CLIP = {"model_type": "unirefiner_eva_clip_vision", "hidden_size": 24}
REFINED = {"vision_config": DINOV2, "register_width": 3, "register_fill": "randn"}
REFINED |= {"register_seed": 4, "out_features": ["stem", "stage2"], "method": "ph_reg"}

CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "refined": (UniRefinerConfig, REFINED),
    "refined-eva": (UniRefinerConfig, {"vision_config": EVA_CLIP, "final_norm": True}),
    "pyramid": (
        UniRefinerPyramidConfig,
        {
            "refined_config": {
                "model_type": "unirefiner",
                "vision_config": DINOV2,
                "register_width": 2,
            },
            "pyramid_size": 8,
            "out_features": ["level2", "level4"],
        },
    ),
    "eva": (EvaClipVisionConfig, {"hidden_size": 24, "use_rms_norm": True}),
    "intern": (PublishedInternViTConfig, {"hidden_size": 24, "use_qk_norm": True}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def made(case: str, **more: Any) -> PreTrainedConfig:
    kind, options = CASES[case]
    return kind(**copy.deepcopy(options), **more)


def within(options: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether all options are found again, those of parts in their parts."""
    return all(
        within(option, values[name])
        if isinstance(option, dict)
        else values[name] == option
        for name, option in options.items()
    )


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """As a dict, without what reading it from a folder adds."""
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "auto_map")}


def test_options_are_in_the_json_string(case):
    assert within(CASES[case][1], json.loads(made(case).to_json_string()))
    assert repr(made(case)).startswith(CASES[case][0].__name__)


def test_json_file_round_trip(case, tmp_path):
    kind = CASES[case][0]
    for use_diff in (True, False):
        made(case).to_json_file(tmp_path / "any.json", use_diff=use_diff)
        again = kind.from_json_file(tmp_path / "any.json")
        assert again.to_dict() == made(case).to_dict()


@pytest.mark.parametrize("subfolder", ["", "in_here"])
def test_save_pretrained_round_trip(case, subfolder, tmp_path):
    kind = CASES[case][0]
    made(case).save_pretrained(tmp_path / subfolder)
    again = kind.from_pretrained(tmp_path, subfolder=subfolder)
    assert plain(again) == plain(made(case))


def test_no_folder_is_an_os_error(case, tmp_path):
    with pytest.raises(OSError):
        CASES[case][0].from_pretrained(f".{tmp_path}")


@pytest.mark.parametrize("case", ["refined", "refined-eva", "pyramid"])
def test_a_part_loads_from_the_whole(case, tmp_path):
    kind = CASES[case][0]
    made(case).save_pretrained(tmp_path)
    whole = kind.from_pretrained(tmp_path)
    assert whole.sub_configs
    for name in whole.sub_configs:
        part = getattr(whole, name)
        expected = made(case).to_dict()[name]
        assert type(AutoConfig.for_model(**expected)) is type(part)
        loaded = type(part).from_pretrained(tmp_path)
        values = loaded.to_dict()
        assert values.pop("transformers_version")
        assert values == expected
        loaded.save_pretrained(tmp_path / "part")
        again = type(part).from_pretrained(tmp_path / "part")
        assert plain(again) == plain(loaded)


@pytest.mark.parametrize(
    ("case", "name", "changed"),
    [
        ("refined", "vision_config", {"image_size": 64}),
        ("pyramid", "refined_config", {"register_width": 7}),
    ],
)
def test_a_part_is_overridden_in_part(case, name, changed, tmp_path):
    made(case).save_pretrained(tmp_path)
    again = CASES[case][0].from_pretrained(tmp_path, **{name: changed})
    assert again.to_dict()[name] == made(case).to_dict()[name] | changed


def test_unused_arguments_come_back(case, tmp_path):
    made(case).save_pretrained(tmp_path)
    again, unused = CASES[case][0].from_pretrained(
        tmp_path, return_unused_kwargs=True, foo=False
    )
    assert unused == {"foo": False} and not hasattr(again, "foo")


def test_labels(case):
    config = made(case, num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3


def test_standard_arguments_are_kept(case):
    config = made(case, dtype="float16", **copy.deepcopy(STANDARD))
    assert config.dtype is torch.float16
    assert {name: getattr(config, name) for name in STANDARD} == STANDARD
    again = type(config).from_dict(config.to_dict())
    assert again.dtype is torch.float16
    assert {name: getattr(again, name) for name in STANDARD} == STANDARD


def test_nothing_need_be_given_and_nothing_is_shared(case):
    kind = CASES[case][0]
    one, other = kind(), kind()
    assert one == other and copy.deepcopy(one) == one
    shared = [
        name
        for name, value in vars(one).items()
        if isinstance(value, (list, dict, set, PreTrainedConfig))
        and value is vars(other)[name]
    ]
    assert not shared
    one.num_labels = 7
    for name in one.sub_configs:
        getattr(one, name).register_probe = 1
    assert one != other and kind() == other


def test_fields_are_set_and_read(case):
    config = made(case)
    fields = own_fields(type(config)) - {"out_features", "out_indices"}
    for name in fields - set(config.sub_configs):
        value = getattr(config, name)
        setattr(config, name, value)
        assert getattr(config, name) == value
        assert getattr(type(config)(**{name: value}), name) == value


@pytest.mark.parametrize("case", ["eva", "intern"])
def test_common_sizes_are_set_and_read(case):
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        config = made(case)
        setattr(config, name, 5)
        assert getattr(config, name) == 5
        assert getattr(type(config)(**{name: 6}), name) == 6


def test_sizes_follow_the_tower():
    """A config round another has no sizes of its own: they cannot disagree."""
    config = made("refined")
    config.vision_config.hidden_size = 40
    assert config.hidden_size == 40
    with pytest.raises(AttributeError, match="hidden_size"):
        config.hidden_size = 4
    assert config.hidden_size == 40


@pytest.mark.parametrize("case", ["refined", "pyramid"])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("hidden_size", "follows from its fields.*_config"),
        ("patch_size", "follows from its fields.*_config"),
        ("teapot", "no field 'teapot'; its fields are"),
    ],
)
def test_what_is_no_field_is_refused(case, name, named):
    with pytest.raises(UniRefinerError, match=named):
        made(case, **{name: 4})


def test_no_place_is_written(tmp_path):
    """Neither alone nor as a part of another's config, in a file or as a dict."""
    place = tmp_path / "private_place"
    make_tiny_tower("dinov2").save_pretrained(place / "tower")
    model = UniRefinerModel.from_tower(str(place / "tower"))
    model.save_pretrained(place / "refined")
    pyramid = UniRefinerPyramid.from_refined(str(place / "refined"), pyramid_size=8)
    refined = UniRefinerBackbone.from_pretrained(place / "refined")
    for config in (
        refined.config,
        pyramid.config,
        DPTConfig(backbone_config=refined.config),
    ):
        config.save_pretrained(tmp_path / "out")
        assert "private_place" not in (tmp_path / "out" / "config.json").read_text()
        assert "private_place" not in str(config.to_dict())
        assert "private_place" not in config.to_json_string(use_diff=False)
    assert "private_place" in refined.config.name_or_path
