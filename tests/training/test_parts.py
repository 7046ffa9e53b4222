"""Training state without pickle, the adapter's reach, and the comparison."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import FAMILIES, make_tiny_tower
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.modeling.families import family_of
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.spurious.settings import FilterSettings
from unirefiner_hf.training.arguments import UniRefinerArguments
from unirefiner_hf.training.before_after import compare, figure, join_frame
from unirefiner_hf.training.state_tree import (
    load_tree,
    random_states,
    restore_random_states,
    save_tree,
)


def test_a_tree_comes_back(tmp_path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "avg": torch.randn(2, 3)}, 1: {}},
        "groups": [{"lr": 1e-4, "betas": [0.9, 0.999], "fused": None, "on": True}],
    }
    save_tree(tree, tmp_path / "tree.safetensors")
    back = load_tree(tmp_path / "tree.safetensors")
    assert back["groups"] == tree["groups"]
    assert list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][0]["avg"], tree["state"][0]["avg"])


def test_what_needs_pickle_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set cannot be stored"):
        save_tree({"x": {1, 2}}, tmp_path / "tree.safetensors")


def test_random_states_come_back(tmp_path):
    def draw():
        return (
            random.random(),
            np.random.rand(),
            np.random.randn(),
            torch.rand(1).item(),
        )

    np.random.randn()  # leaves a cached Gaussian behind
    save_tree(random_states(), tmp_path / "random.safetensors")
    expected = draw()
    assert draw() != expected
    restore_random_states(load_tree(tmp_path / "random.safetensors"))
    assert draw() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_reaches_every_linear_of_the_layers(family):
    tower = make_tiny_tower(family)
    layers = family_of(tower.config).layers
    linears = {
        f"{layers}.{name}"
        for name, module in tower.get_submodule(layers).named_modules()
        if isinstance(module, nn.Linear)
    }
    wrapped = add_adapter(tower)
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert adapted == linears and len(linears) == 12


@pytest.mark.parametrize(
    "name,written", [("/home/me/models/vit", "vit"), ("user/vit", "user/vit")]
)
def test_the_adapter_names_its_base_without_a_path(name, written):
    wrapped = add_adapter(make_tiny_tower("dinov2"), name=name)
    assert wrapped.peft_config["default"].base_model_name_or_path == written


def test_wrapping_a_tower_warns_of_nothing(recwarn):
    add_adapter(make_tiny_tower("dinov2"))
    assert [str(warning.message) for warning in recwarn] == []


def test_the_learning_rate_is_that_of_batch_16(tmp_path):
    args = UniRefinerArguments(str(tmp_path), learning_rate=1e-4, use_cpu=True)
    assert args.scaled_learning_rate(16) == 1e-4
    assert args.scaled_learning_rate(4) == pytest.approx(2.5e-5)
    assert args.learning_rate == 1e-4
    args.scale_learning_rate = False
    assert args.scaled_learning_rate(4) == 1e-4


def test_fp16_and_a_missing_output_folder_are_refused(tmp_path):
    with pytest.raises(UniRefinerError, match="bf16"):
        UniRefinerArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)
    with pytest.raises(UniRefinerError, match="output_dir"):
        UniRefinerArguments()


def test_join_frame_undoes_the_split():
    model = UniRefinerModel.from_tower(make_tiny_tower("siglip_vision_model"))
    pixels = torch.randn(1, 3, 16, 24)
    framed = model.tower(
        torch.nn.functional.pad(pixels, (4, 4, 4, 4)), interpolate_pos_encoding=True
    ).last_hidden_state[0]
    tokens = model.encode(pixels, 1)
    joined = join_frame(tokens.image[0], tokens.registers[0], tokens.grid, 1)
    assert torch.equal(joined, framed)


def test_an_untrained_adapter_changes_nothing_but_the_frame():
    tower = make_tiny_tower("dinov2")
    model = UniRefinerModel.from_tower(tower)
    model.tower = add_adapter(tower)
    images = list(torch.randn(2, 3, 16, 24))
    reference = torch.randn(1, 3, 16, 24)
    same = compare(model, images, reference, FilterSettings(), register_width=0)
    shares = same.shares()
    assert shares["before"] == shares["after"] == shares["after_own_yardstick"]
    assert torch.equal(same.base_tokens[0], same.refined_tokens[0])
    framed = compare(model, images, reference, FilterSettings(), register_width=1)
    assert framed.refined_tokens[0].shape == (6 * 8, 32)
    picture = figure(framed, [np.zeros((16, 24, 3), dtype=np.uint8)] * 2)
    assert picture.width > 1000
