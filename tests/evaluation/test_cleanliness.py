"""Each measure on tokens whose dirt is known, and the verb."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional

from unirefiner_hf.cli import main
from unirefiner_hf.data.images import list_images, load_rgb
from unirefiner_hf.data.labelled import class_labels, open_pairs
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.cleanliness import (
    LOWER_IS_CLEANER,
    knn_retrieval,
    measure_cleanliness,
    neighbour_similarity,
    norm_outliers,
    positional_variance,
    shift_residual,
)


@pytest.fixture(scope="module")
def tiny(tower_folder):
    return load_checkpoint(str(tower_folder))


def test_norm_outliers_count_planted_ones():
    torch.manual_seed(0)
    norms = 10 + 0.1 * torch.randn(3, 100)
    norms[:, :2] = 50
    found = norm_outliers(norms)
    assert found["norm_outliers"] == pytest.approx(0.02)
    assert found["norm_max_to_median"] == pytest.approx(5, rel=0.02)


def test_positional_variance_is_the_planted_share():
    torch.manual_seed(0)
    place = torch.randn(1, 200, 16)
    content = torch.randn(20, 200, 16)
    assert positional_variance(content) == pytest.approx(0, abs=0.01)
    assert positional_variance(place + content) == pytest.approx(0.5, abs=0.03)
    mixed = place + 3 * content
    assert positional_variance(mixed) == pytest.approx(0.1, abs=0.02)
    assert positional_variance(place.expand(5, -1, -1)) == 1


def test_blur_raises_the_cosine_and_lowers_the_contrast():
    torch.manual_seed(0)
    regions = torch.zeros(1, 12, 12, dtype=torch.long)
    regions[:, 3:9, 4:10] = 1
    colours = torch.eye(3)[regions].flatten(1, 2)
    vectors = torch.randn(2, 16)[regions] + 0.5 * torch.randn(1, 12, 12, 16)
    maps = vectors.permute(0, 3, 1, 2)
    blurred = functional.avg_pool2d(maps, 5, stride=1, padding=2)
    sharp, soft = (
        neighbour_similarity(m.flatten(2).transpose(1, 2), colours, (12, 12))
        for m in (maps, blurred)
    )
    assert soft["neighbour_cosine"] > sharp["neighbour_cosine"]
    assert soft["neighbour_contrast"] < sharp["neighbour_contrast"]


def test_shift_residual_compares_the_same_place(tiny, monkeypatch):
    """Tokens that are their patch's pixels move with the image: no residual."""
    image = Image.effect_noise((60, 60), 80).convert("RGB")

    def pixels_as_tokens(_, views):
        return functional.pixel_unshuffle(views, 4)

    def places_as_tokens(_, views):
        return torch.eye(16)[None].expand(len(views), -1, -1).unflatten(2, (4, 4))

    kind = type(tiny)
    monkeypatch.setattr(kind, "feature_map", pixels_as_tokens)
    residual = shift_residual(tiny, image, 16)
    assert residual.shape == (16,)
    assert residual.isnan().sum() == 1 and residual[0].isnan()
    assert residual.nanmean() < 1e-5
    monkeypatch.setattr(kind, "feature_map", places_as_tokens)
    assert shift_residual(tiny, image, 16).nanmean() == 1


def test_every_measure_of_a_tower(tiny, scenes):
    images = [load_rgb(path) for path in list_images(scenes / "train" / "images")]
    found = measure_cleanliness(tiny, images, 24)
    assert set(found.values) == {m for m in LOWER_IS_CLEANER if "knn" not in m}
    assert all(torch.isfinite(torch.tensor(v)) for v in found.values.values())
    patches = found.grid[0] * found.grid[1]
    assert {tuple(s.shape) for s in found.token_scores.values()} == {(8, patches)}
    assert found.spurious.float().mean().item() == pytest.approx(
        found.values["spurious"]
    )
    again = measure_cleanliness(tiny, images, 24, base=found)
    assert again.values == pytest.approx(found.values)
    with pytest.raises(ValueError, match="measured on 8 images, these are 7"):
        measure_cleanliness(tiny, images[:7], 24, base=found)
    with pytest.raises(ValueError, match="1 image is too few"):
        measure_cleanliness(tiny, images[:1], 24)


def test_knn_finds_colours(tiny, scenes):
    pairs, classes = open_pairs(str(scenes), "train"), class_labels(str(scenes))
    found = knn_retrieval(tiny, pairs, classes, 24, neighbours=5)
    assert found["knn_accuracy"] > 0.5 and found["knn_iou"] > 0.4


def test_the_verb(tower_folder, scenes, tmp_path, capsys):
    folder = scenes / "train"
    words = ["diagnose", str(tower_folder), "--images", str(folder / "images")]
    words += ["--size", "24", "--max_images", "4", "--json", str(tmp_path / "out.json")]
    labels = ["--labels", str(folder / "labels")]
    assert main([*words, *labels, "--num_classes", "3"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in LOWER_IS_CLEANER)
    assert "4 images at 24 px" in out
    content = json.loads((tmp_path / "out.json").read_text())
    (values,) = content["checkpoints"].values()
    assert set(values) == set(LOWER_IS_CLEANER)
    assert main([*words, *labels]) == 2
    assert "--labels needs --num_classes" in capsys.readouterr().err
