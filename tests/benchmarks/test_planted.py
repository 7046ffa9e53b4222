"""Planted truth: the rule, and the adapter that plants."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.planting.planted import (
    PlantingRule,
    TruthError,
    dirty_checkpoint,
    load_rule,
    planted_truth,
)
from unirefiner_hf.evaluation.checkpoints import load_checkpoint

SHARED = Path(__file__).parents[2].parent / "shared" / "dirty"
DIRTY = next(
    (p for p in (SHARED, SHARED.parents[2] / "shared" / "dirty") if p.is_dir()), SHARED
)


def image_of_spreads(order):
    """A row of 4-pixel patches whose values spread more, the higher their number."""
    patch = torch.randn(3, 4, 4)
    return torch.cat([patch * (1 + number) for number in order], dim=2).unsqueeze(0)


def test_the_busiest_patches_are_proxies_and_the_flattest_patterns():
    torch.manual_seed(0)
    order = torch.randperm(20)
    truth = planted_truth(image_of_spreads(order), 4)
    rank = order / 19
    assert truth.proxies[0].equal(rank >= 0.70)
    assert truth.patterns[0].equal(rank < 0.12)
    assert truth.spurious.equal(truth.proxies | truth.patterns)
    scaled = image_of_spreads(order) * 0.01
    assert planted_truth(scaled, 4).proxies.equal(truth.proxies)


def test_images_without_ranks_are_refused():
    with pytest.raises(ValueError, match="30 x 28.*multiples of the patch size 4"):
        planted_truth(torch.zeros(1, 3, 30, 28), 4)
    with pytest.raises(ValueError, match="One patch has no rank"):
        planted_truth(torch.zeros(1, 3, 4, 4), 4)


@pytest.mark.skipif(not DIRTY.is_dir(), reason="the planted adapter is not here")
def test_the_rule_is_the_one_written_beside_the_adapter():
    text = (DIRTY / "README.md").read_text()
    rule = load_rule(DIRTY)
    assert f"rank >= {rule.proxy_rank:.2f}" in text
    assert f"rank < {rule.pattern_rank:.2f}" in text


def test_an_adapter_may_name_another_rule(tmp_path):
    assert load_rule(tmp_path) == PlantingRule()
    rule = PlantingRule("brightness", 0.75, 0.15)
    (tmp_path / "planting.json").write_text(json.dumps(vars(rule)))
    assert load_rule(tmp_path) == rule
    # Brighter and flatter to the right: both measures, opposite orders.
    columns = torch.arange(20).repeat_interleave(4)
    spread = torch.randn(3, 4, 4).repeat(1, 1, 20)
    pixels = (columns + spread * (20 - columns) / 20).unsqueeze(0)
    truth = planted_truth(pixels, 4, rule)
    assert truth.proxies[0].equal(torch.arange(20) / 19 >= 0.75)
    assert truth.patterns[0].equal(torch.arange(20) / 19 < 0.15)
    assert (
        planted_truth(pixels, 4).proxies[0].equal(torch.arange(20).flip(0) / 19 >= 0.7)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"measure": "smell"}', "measure is 'smell'.*contrast, brightness"),
        ('{"proxy_rank": 0.1}', "pattern_rank is 0.12 and proxy_rank 0.1"),
        ('{"proxy_rank": 1}', "proxy_rank 1; they must lie between 0 and 1"),
        ('{"pattern_rank": 0}', "pattern_rank is 0 and"),
        ('{"proxies": 0.1}', "proxies"),
        ("{", "planting.json is not a planting rule"),
    ],
)
def test_a_damaged_rule_is_refused(tmp_path, text, said):
    (tmp_path / "planting.json").write_text(text)
    with pytest.raises(TruthError, match=said):
        load_rule(tmp_path)


def test_the_planted_tower_is_the_adapter_on_the_clean_one(tower_folder, planter):
    folder, model = planter
    clean = load_checkpoint(str(tower_folder))
    dirty = dirty_checkpoint(clean, folder)
    assert dirty.name.endswith("+ planter")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected = model.encode(pixels, 0).image
        torch.testing.assert_close(
            dirty.model.encode(pixels, 0).image, expected, atol=1e-5, rtol=1e-5
        )


def test_adapters_that_do_not_fit_are_refused(tower_folder, planter, tmp_path):
    folder, _ = planter

    def clean():
        return load_checkpoint(str(tower_folder))

    def copy(name):
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(TruthError, match="nowhere holds no adapter_model.safetensors"):
        dirty_checkpoint(clean(), tmp_path / "nowhere")
    (bare := copy("bare")).joinpath("adapter_config.json").unlink()
    with pytest.raises(TruthError, match="bare holds no adapter_config.json"):
        dirty_checkpoint(clean(), bare)
    weights = (cut := copy("cut")) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(TruthError, match="adapter_model.safetensors is damaged"):
        dirty_checkpoint(clean(), cut)
    (garbled := copy("garbled")).joinpath("adapter_config.json").write_text("{")
    with pytest.raises(TruthError, match="adapter_config.json is damaged"):
        dirty_checkpoint(clean(), garbled)
    config = (other := copy("other")) / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "r": 2}))
    with pytest.raises(TruthError, match="not one of tiny-dinov2: .* another shape"):
        dirty_checkpoint(clean(), other)
    config.write_text(json.dumps({**settings, "target_modules": ["nothing"]}))
    with pytest.raises(TruthError, match="does not fit.*nothing"):
        dirty_checkpoint(clean(), other)
