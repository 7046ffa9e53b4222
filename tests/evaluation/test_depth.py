"""The depth probe: loss, head, features, and the run on tiny maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from unirefiner_hf.cli import main
from unirefiner_hf.data.labelled import LabelError, open_pairs
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.depth import (
    DepthHead,
    DepthSettings,
    _cropped,
    depth_features,
    evaluate_depth,
    read_depth,
    sig_loss,
)
from unirefiner_hf.evaluation.metrics import depth_errors

TINY = {
    "depth_crop_height": 16,
    "depth_crop_width": 24,
    "depth_iterations": 60,
    "depth_batch": 4,
    "depth_bins": 32,
    "depth_lr": 0.05,
    "depth_loss_warmup": 5,
    "depth_distortion": False,
}


@pytest.fixture(scope="module")
def tiny(tower_folder):
    return load_checkpoint(str(tower_folder))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Brighter is farther: 16-bit millimetres and, in val, float metres."""
    root = tmp_path_factory.mktemp("rooms")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            small = random.integers(0, 2, (2, 3)) * 6 + 2
            depth = np.kron(small, np.ones((12, 12)))
            picture = (depth * 28).astype(np.uint8)
            Image.fromarray(picture).convert("RGB").save(
                root / split / "images" / f"{number}.png"
            )
            file = root / split / "labels" / f"{number}"
            if split == "train":
                Image.fromarray((depth * 1000).astype(np.uint16)).save(f"{file}.png")
            else:
                np.save(file, depth.astype(np.float32))
    return root


def test_sig_loss_by_hand():
    guess, depth = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2.0, 3.0, 0.0])
    valid = depth > 0
    g = np.log(np.array([1.0, 4.0]) + 1e-3) - np.log(np.array([2.0, 3.0]) + 1e-3)
    expected = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    assert sig_loss(guess, depth, valid).item() == pytest.approx(expected, rel=1e-5)
    early = np.sqrt(0.15 * g.mean() ** 2)
    found = sig_loss(guess, depth, valid, mean_only=True)
    assert found.item() == pytest.approx(early, rel=1e-5)


def test_head_is_an_expectation_over_bins():
    head = DepthHead(2, 256, 1e-3, 10.0)
    torch.nn.init.zeros_(head.score.weight)
    even = head(torch.randn(1, 2, 3, 3))
    assert torch.allclose(even, torch.full((1, 3, 3), (1e-3 + 10) / 2), atol=1e-4)
    with torch.no_grad():
        head.score.bias[-1] = 1e6
    far = head(torch.randn(1, 2, 3, 3))
    assert torch.allclose(far, torch.full((1, 3, 3), 10.0), atol=1e-2)


def test_features_put_the_pooled_token_beside_each_patch(tiny):
    pixels = torch.randn(2, 3, 16, 24)
    found = depth_features(tiny, pixels)
    hidden, patch = tiny.hidden_size, tiny.patch_size
    assert found.shape == (2, 2 * hidden, 4 * 16 // patch, 4 * 24 // patch)
    pooled = tiny.model(pixels).pooler_output
    assert torch.allclose(found[:, hidden:, 3, 5], pooled, atol=1e-4)


def test_eigen_crop():
    settings = DepthSettings()
    maps = torch.full((480, 640), 9.0), torch.full((480, 640), 2.0)
    maps[0][45:471, 41:601] = 2.0
    errors = depth_errors(*_cropped(*maps, settings))
    assert (errors.rmse, errors.pixels) == (0, 426 * 560)
    whole = DepthSettings(depth_eigen_crop=False)
    assert depth_errors(*_cropped(*maps, whole)).rmse > 1
    assert depth_errors(*_cropped(maps[0][:400], maps[1][:400], settings)).rmse > 1


def test_a_probe_learns_brightness(tiny, rooms):
    train, val = (open_pairs(str(rooms), split) for split in ("train", "val"))
    settings = DepthSettings(**TINY)
    result = evaluate_depth(tiny, train, val, settings, seeds=2)
    assert result.per_image("rmse").shape == (2, 3)
    # The best constant, 4 m in the sense of logs, is about 3 m off.
    assert (result.per_image("rmse").mean(axis=1) < 2.3).all()
    pooled = result.pooled_rmse()
    for name in ("rmse", "absrel", "delta1"):
        means = result.per_image(name).mean(axis=1).tolist()
        assert [scores[name] for scores in result.scores] == means
    squares = result.per_image("rmse") ** 2
    assert pooled == pytest.approx(np.sqrt(squares.mean(axis=1)))


def test_bad_maps_are_named():
    settings = DepthSettings()
    with pytest.raises(LabelError, match="x.png: no depth lies within.*largest is 25"):
        read_depth(np.full((2, 2), 25000, dtype=np.uint16), "x.png", settings)
    with pytest.raises(LabelError, match="negative or infinite"):
        read_depth(np.array([[1.0, np.nan]]), "x.png", settings)
    metres = read_depth(np.array([[1500]], dtype=np.uint16), "x.png", settings)
    assert metres.item() == 1.5


def test_the_verb(tower_folder, rooms, capsys):
    words = ["evaluate", str(tower_folder), "--task", "depth", "--data", str(rooms)]
    for name, value in {**TINY, "depth_iterations": 2}.items():
        words += [f"--{name}", str(value).lower()]
    assert main([*words, "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "RMSE, mean of images (m)" in out and "delta1 (%)" in out
