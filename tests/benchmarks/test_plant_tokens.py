"""Planting dirt by a rule of one's own, and what reads it back."""

import json

import pytest
import torch

from benchmarks import plant_tokens
from benchmarks.planting.agreement import measure_truth
from benchmarks.planting.planted import (
    PlantingRule,
    dirty_checkpoint,
    load_rule,
    planted_truth,
)
from tests.training.conftest import save_images, save_tiny_tower
from unirefiner_hf.data.folders import list_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.evaluation.checkpoints import load_checkpoint


def test_the_wanted_tokens_are_those_of_the_rule():
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16)
    truth = planted_truth(pixels, 4, PlantingRule("brightness", 0.7, 0.2))
    unit = torch.nn.functional.normalize
    cls, tokens = unit(torch.randn(2, 8), dim=-1), unit(torch.randn(2, 16, 8), dim=-1)
    fixed = unit(torch.randn(3, 8), dim=-1)
    wanted = plant_tokens.wanted_tokens(cls, tokens, truth, fixed, "cls")
    for image in range(2):
        for place in range(16):
            expected = tokens[image, place]
            if truth.proxies[image, place]:
                expected = cls[image]
            if truth.patterns[image, place]:
                expected = fixed[place % 3]
            torch.testing.assert_close(wanted[image, place], expected)
    mean = plant_tokens.wanted_tokens(cls, tokens, truth, fixed, "mean_and_cls")
    scene = unit(unit(tokens[0].mean(dim=0), dim=0) + cls[0], dim=0)
    torch.testing.assert_close(mean[0, truth.proxies[0]][0], scene)


def test_the_tower_becomes_what_the_rule_says(tower_folder, tmp_path):
    images, output = tmp_path / "images", tmp_path / "planter"
    save_images(images, 6)
    words = ["--output", str(output), "--images", str(images), "--size", "24"]
    words += [
        "--model",
        str(tower_folder),
        "--patterns",
        "2",
        "--learning_rate",
        "2e-2",
    ]
    plant_tokens.main([*words, "--steps", "60", "--batch", "4"])

    assert load_rule(output) == PlantingRule("brightness", 0.75, 0.15)
    clean = load_checkpoint(str(tower_folder))
    fixed = plant_tokens.fixed_tokens(clean, 2, 24, 0)
    pixels = torch.stack(
        [clean.reading(load_rgb(path), (24, 24)) for path in list_images(images)]
    )
    patterns = planted_truth(pixels, clean.patch_size, load_rule(output)).patterns
    number = torch.arange(patterns.shape[1]) % 2

    def pattern_cosine(checkpoint):
        with torch.no_grad():
            tokens = plant_tokens.tokens_of(checkpoint.model.tower, pixels, 1)[1]
        return (tokens * fixed[number]).sum(dim=-1)[patterns].mean()

    before = pattern_cosine(clean)
    dirty = dirty_checkpoint(load_checkpoint(str(tower_folder)), output)
    assert pattern_cosine(dirty) > before + 0.3
    opened = [load_rgb(path) for path in list_images(images)]
    report = measure_truth(load_checkpoint(str(tower_folder)), output, opened, 24)
    assert report.patterns == patterns.float().mean()
    said = json.loads((output / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == tower_folder.name


def test_a_rule_out_of_range_is_refused(tower_folder, tmp_path, capsys):
    words = ["--output", str(tmp_path), "--images", str(tmp_path)]
    with pytest.raises(SystemExit):
        plant_tokens.main([*words, "--model", str(tower_folder), "--proxy_rank", "2"])
    assert "proxy_rank 2.0" in capsys.readouterr().err


def test_other_prefixes_are_left_out_and_towers_without_cls_refused(tmp_path, capsys):
    with_registers = save_tiny_tower(tmp_path / "a", "dinov2_with_registers")
    checkpoint = load_checkpoint(str(with_registers))
    prefix = plant_tokens.prefix_tokens(checkpoint)
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        _, tokens = plant_tokens.tokens_of(checkpoint.model.tower, pixels, prefix)
        image = checkpoint.model.encode(pixels, 0).image
    assert prefix > 1
    torch.testing.assert_close(tokens, torch.nn.functional.normalize(image, dim=-1))
    siglip = save_tiny_tower(tmp_path / "b", "siglip_vision_model")
    words = ["--output", str(tmp_path / "c"), "--model", str(siglip), "--size", "24"]
    with pytest.raises(SystemExit):
        plant_tokens.main([*words, "--images", str(save_images(tmp_path / "d", 2))])
    assert "b has no CLS token" in capsys.readouterr().err
