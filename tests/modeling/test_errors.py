"""What the user can mend is a `UniRefinerError`, whoever found it."""

import json

import pytest
import torch

from tests.conftest import make_tiny_tower
from unirefiner_hf import UniRefinerConfig, UniRefinerModel, load_text_side, load_tower
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.registers import split_frame


@pytest.fixture
def folder(tmp_path):
    make_tiny_tower("dinov2").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [load_tower, load_text_side])
@pytest.mark.parametrize("name", ["/no/such", "no/such", "a b c"])
def test_a_name_that_is_none(load, name):
    with pytest.raises(
        UniRefinerError, match=f"{name} (cannot be loaded: |holds no model)"
    ):
        load(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "teapot"}', "teapot"),
        ('{"hidden_size": 8}', "model_type"),
        ("{", "not a valid JSON"),
        ('{"model_type": "dinov2", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "teapot", "auto_map": {"AutoConfig": "a.B"}}', "trust_remote"),
    ],
)
def test_a_config_that_cannot_be_read(content, said, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UniRefinerError, match=f"{tmp_path} cannot be loaded: (?s:.*){said}"
    ):
        load_tower(str(tmp_path))


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_ratio": 3}))
    shapes = r"6 of another shape .*fc1.bias: \(64,\), not \(96,\)"
    with pytest.raises(UniRefinerError, match=shapes):
        load_tower(str(folder))


def test_damaged_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UniRefinerError, match=f"{folder} cannot be loaded: .*header"):
        load_tower(str(folder))


def test_an_attention_that_is_not_there(folder):
    for kind in ("teapot", "flash_attention_2"):
        with pytest.raises(UniRefinerError, match="cannot be loaded"):
            load_tower(str(folder), attn_implementation=kind)
    tower = make_tiny_tower("dinov2")
    with pytest.raises(
        UniRefinerError, match="Dinov2Model cannot be set to it.*teapot"
    ):
        UniRefinerModel.from_tower(tower, attn_implementation="teapot")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"register_width": "wide"}, "register_width.*expected int"),
        ({"register_width": -1}, "register_width is -1"),
        ({"out_features": ["roof"]}, "roof"),
        ({"vision_config": {"model_type": "teapot"}}, "teapot"),
        ({"vision_config": {"model_type": "resnet"}}, "resnet.*not a supported"),
        ({"vision_config": {"model_type": "clip"}}, "a whole clip"),
        ({"vision_config": 3}, "vision_config is a int"),
        ({"register_widht": 1}, "did you mean 'register_width'"),
    ],
)
def test_a_config_of_ours(field, said):
    with pytest.raises(UniRefinerError, match=said):
        UniRefinerConfig(**field)


def test_another_kind_of_tower_is_a_type_error_too():
    with pytest.raises(UniRefinerError, match="Linear") as caught:
        UniRefinerModel.from_tower(torch.nn.Linear(1, 1))
    assert isinstance(caught.value, TypeError)


def test_pixels_that_do_not_fit():
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    for pixels, said in (
        (torch.zeros(1, 3, 15, 16), "15 x 16 is not a multiple of the patch size 4"),
        (torch.zeros(3, 16, 16), "expected .batch, 3"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
    ):
        with pytest.raises(UniRefinerError, match=said):
            model(pixels)


def test_an_invariant_of_our_own_is_not_the_users():
    with pytest.raises(ValueError, match="5 tokens") as caught:
        split_frame(torch.zeros(1, 5, 2), (2, 2), 0)
    assert not isinstance(caught.value, UniRefinerError)
