"""What the user can mend is a `UniRefinerError`, whoever found it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.conftest import make_tiny_tower
from unirefiner_hf import (
    UniRefinerBackbone,
    UniRefinerConfig,
    UniRefinerModel,
    load_text_side,
    load_tower,
)
from unirefiner_hf.modeling import files
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
        UniRefinerError,
        match=f"{name}( cannot be loaded: | holds no model|: there is no)",
    ):
        load(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "teapot"}', "teapot"),
        ('{"hidden_size": 8}', "model_type"),
        ("{", "config.json is not JSON"),
        ("[]", r"config.json holds \[\]; it must be a JSON object"),
        ('{"architecture": "vit", "num_classes": 0}', "config.json is of timm"),
        ('{"model_type": "dinov2", "hidden_size": -8}', "negative dimension"),
        ('{"model_type": "dinov2", "num_attention_heads": 0}', "zero"),
        ('{"model_type": "dinov2", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "teapot", "auto_map": {"AutoConfig": "a.B"}}', "trust_remote"),
    ],
)
def test_a_config_that_cannot_be_read(content, said, tmp_path):
    (tmp_path / "config.json").write_text(content)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UniRefinerError, match=f"{tmp_path}(?s:.*){said}"):
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
    with pytest.raises(UniRefinerError, match="model.safetensors is damaged or cut"):
        load_tower(str(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"junk" * 99, "is damaged or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (None, "is a folder"),
    ],
)
@pytest.mark.parametrize("load", [load_tower, UniRefinerModel.from_pretrained])
def test_weights_that_are_none(content, said, load, folder):
    file = folder / "model.safetensors"
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UniRefinerError, match=f"model.safetensors.*{said}"):
        load(str(folder))


def test_weights_that_this_user_may_not_read(folder, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *a, **k: (refuse if "safe" in self.name else opened)(
            self, *a, **k
        ),
    )
    with pytest.raises(UniRefinerError, match=r"cannot be read \(Permission denied\)"):
        load_tower(str(folder))


def test_an_index_whose_shard_is_missing(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UniRefinerError, match="model-1.safetensors is missing"):
        load_tower(str(folder))
    index.write_text("{}")
    with pytest.raises(UniRefinerError, match="index.json has no weight_map"):
        load_tower(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_base_weights_that_are_not_finite_are_named(bad, tmp_path):
    tower = make_tiny_tower("dinov2")
    with torch.no_grad():
        tower.layernorm.bias[3] = bad
    tower.save_pretrained(tmp_path)
    said = f"The weights of {tmp_path} hold NaN or infinite.*1 tensors.*layernorm.bias"
    with pytest.raises(UniRefinerError, match=said):
        load_tower(str(tmp_path))
    model = UniRefinerModel.from_tower(tower)
    model.save_pretrained(tmp_path / "refined")
    with pytest.raises(UniRefinerError, match="tower.layernorm.bias"):
        UniRefinerModel.from_pretrained(tmp_path / "refined")


@pytest.mark.parametrize("door", [UniRefinerModel, UniRefinerBackbone, AutoModel])
def test_a_refined_checkpoint_with_half_its_weights_is_refused(door, tmp_path):
    UniRefinerModel.from_tower(make_tiny_tower("dinov2")).save_pretrained(tmp_path)
    door.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    half = dict(list(weights.items())[::2])
    save_file({**half, "stray": torch.zeros(1)}, file, metadata={"format": "pt"})
    missing = f"{len(weights) - len(half)} missing .*; 1 unknown .stray"
    with pytest.raises(UniRefinerError, match=missing):
        door.from_pretrained(tmp_path)
    model, report = UniRefinerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == len(weights) - len(half) and model is not None


def test_a_bare_backbone_is_not_a_refined_checkpoint(folder):
    for door in (UniRefinerModel, UniRefinerBackbone):
        with pytest.raises(
            UniRefinerError, match="'dinov2'.*UniRefinerModel.from_tower"
        ):
            door.from_pretrained(folder)


def test_a_hub_id_without_the_hub_is_named_at_once(monkeypatch):
    class Session:
        calls = 0

        def head(self, url, timeout):
            Session.calls += 1
            raise OSError("no route")

    monkeypatch.setattr(files.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(files, "get_session", Session)
    with pytest.raises(UniRefinerError, match="no/such is no folder.*no route"):
        load_tower("no/such")
    assert Session.calls == 2


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
