"""Images that are higher or wider than square, from the option to the merged model."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import unirefiner_hf
from unirefiner_hf.cli import main
from unirefiner_hf.export.run_folder import read_record
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.training.recipe import load_recipe
from unirefiner_hf.training.trainer import UniRefinerTrainer

from .conftest import refine

METHODS = {
    "unirefiner": {"num_crops": 2},
    "distillation": {"num_crops": 1},
    "ph_reg": {"register_tokens": 2, "teacher_views": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(16, 32), (40, 24)], ids=str)
def test_a_run_on_oblong_images(method, size, arguments, monkeypatch):
    seen = set()
    compute_loss = UniRefinerTrainer.compute_loss

    def watched(self, model, inputs, *given, **options):
        seen.add(tuple(inputs["pixel_values"].shape[-2:]))
        return compute_loss(self, model, inputs, *given, **options)

    monkeypatch.setattr(UniRefinerTrainer, "compute_loss", watched)
    run = refine(
        *arguments(
            method={"method": method, **METHODS[method]},
            model={"image_size": list(size), "register_factor": 4}
            if method == "unirefiner"
            else {"image_size": list(size)},
            max_steps=2,
            snapshot_steps=2,
        )
    )
    assert seen == {size}
    record = read_record(run)
    assert record["model"]["image_size"] == list(size)
    if method == "unirefiner":  # of the shorter side in patches
        assert record["model"]["register_width"] == min(size) // 4 // 4
    card = (run / "merged" / "README.md").read_text()
    assert f"{size[0]} x {size[1]} pixels (height x width) in training" in card
    processor = AutoImageProcessor.from_pretrained(run / "merged")
    pixels = processor(Image.new("L", (50, 50)), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == size
    outputs = AutoModel.from_pretrained(run / "merged")(pixels)
    assert outputs.feature_map.shape[-2:] == (size[0] // 4, size[1] // 4)
    assert torch.isfinite(outputs.last_hidden_state).all()
    snapshot = Image.open(run / "snapshots" / "step-000002.png")
    assert snapshot.width > 0 and (run / "before_after.png").is_file()
    merged = unirefiner_hf.merge(run, run.parent / "again", model=arguments()[0])
    assert (merged.folder / "config.json").is_file()


@pytest.mark.parametrize("size", [24, [24], (24, 24)])
def test_a_square_is_one_number(size):
    assert BackboneArguments(image_size=size).image_size == 24


@pytest.mark.parametrize("size", [0, [], [16, 16, 16], [16, 0], "24", [1.5], True])
def test_what_is_no_size(size):
    with pytest.raises(UniRefinerError, match="image_size.*height and width"):
        BackboneArguments(image_size=size)


def test_a_side_off_the_grid_is_named(arguments):
    with pytest.raises(UniRefinerError, match="image_size is 16 30.*28 or 32 for 30"):
        refine(*arguments(model={"image_size": [16, 30]}))


def test_the_option_and_the_estimate(tower_folder, capsys):
    words = ["estimate", "--model", str(tower_folder), "--config", "dinov2/small"]
    assert main([*words, "--image_size", "16", "32", "--gpu", "cpu"]) == 0
    assert "16 x 32 px" in capsys.readouterr().out
    recipe = load_recipe("dinov2/small", image_size=[16, 32])
    assert recipe.args.image_size == [16, 32]
    costs = [
        unirefiner_hf.estimate(
            str(tower_folder), recipe="dinov2/small", image_size=size, gpu="cpu"
        ).cost.total_flops
        for size in (16, [16, 32], 32)
    ]
    assert costs == sorted(costs) and len(set(costs)) == 3
