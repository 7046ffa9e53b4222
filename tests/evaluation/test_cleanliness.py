"""Each measure on tokens whose artifacts are known, and `diagnose`."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.evaluation.conftest import save_pairs
from unirefiner_hf.cli import main
from unirefiner_hf.data.folders import list_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.data.labelled import LabelError, class_labels, open_pairs
from unirefiner_hf.data.sources import InputError
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
from unirefiner_hf.evaluation.diagnose import diagnose
from unirefiner_hf.modeling.errors import UniRefinerError


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
    assert found.fpgp.shape == found.ah.shape == (8, patches)
    spurious = (found.fpgp | found.ah).float().mean().item()
    assert spurious == pytest.approx(found.values["spurious"])
    again = measure_cleanliness(tiny, images, 24, base=found)
    assert again.values == pytest.approx(found.values)
    with pytest.raises(UniRefinerError, match="measured on 8 images, these are 7"):
        measure_cleanliness(tiny, images[:7], 24, base=found)
    with pytest.raises(UniRefinerError, match="1 image is too few"):
        measure_cleanliness(tiny, images[:1], 24)


def test_knn_finds_colours(tiny, scenes):
    pairs, classes = open_pairs(str(scenes), "train"), class_labels(str(scenes))
    found = knn_retrieval(tiny, pairs, classes, 24, neighbours=5)
    assert found["knn_accuracy"] > 0.5 and found["knn_iou"] > 0.4


# `diagnose` and its command


def test_diagnose_as_the_measures_say(tower_folder, refined, photos, photo_set):
    found = diagnose([tower_folder, refined], photos, size=24)
    base, other = (load_checkpoint(path) for path in (tower_folder, refined))
    images = [load_rgb(path) for path in sorted(photos.rglob("*.png"))]
    expected = measure_cleanliness(base, images, 24)
    by_base = measure_cleanliness(other, images, 24, base=expected).values
    names = [base.name, f"{base.name} + border of 1", other.name]
    assert list(found.checkpoints) == names
    assert found.checkpoints[base.name] == pytest.approx(expected.values)
    framed = measure_cleanliness(base.framed(1), images, 24, base=expected)
    assert found.checkpoints[names[1]] == pytest.approx(framed.values)
    assert found.checkpoints[other.name] == pytest.approx(by_base)
    again = diagnose([base, other], photo_set, size=24, own_thresholds=True)
    own = measure_cleanliness(other, images, 24).values
    assert again.checkpoints[other.name] == pytest.approx(own) and own != by_base
    assert again.to_dict()["thresholds"] == "own" and found.own_thresholds is False


def test_diagnoses_print_and_save(tower_folder, refined, photos, tmp_path):
    found = diagnose([tower_folder, refined], photos, size=22, max_images=6)
    text = str(found)
    assert "5 images at 24 px; spurious tokens by the base's reference" in text
    assert "Left out broken.jpg: not an image" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].split("|")[1:-1][0].strip() == "measure" and len(lines) == 11
    content = json.loads(json.dumps(found.to_dict()))
    assert (content["images"], content["size"]) == (5, 24)
    assert list(content["skipped"]) == ["broken.jpg"]
    page = found.save_html(tmp_path / "page.html").read_text()
    assert page.count("<img") == 2 * 4 * 4 and "attention hijackee (AH)" in page


def test_what_diagnose_refuses(tower_folder, photos, photo_set, scenes, monkeypatch):
    monkeypatch.setattr("unirefiner_hf.evaluation.checkpoints.load_tower", None)
    with pytest.raises(InputError, match="1 image is too few"):
        diagnose(tower_folder, photos, max_images=1)
    with pytest.raises(UniRefinerError, match="size is 0; it must be 1 or more"):
        diagnose(tower_folder, photos, size=0)
    labels = scenes / "train" / "labels"
    with pytest.raises(LabelError, match="labels needs num_classes"):
        diagnose(tower_folder, scenes / "train" / "images", labels=labels)
    with pytest.raises(LabelError, match="labels go with a folder"):
        diagnose(tower_folder, photo_set, labels=labels, num_classes=3)
    with pytest.raises(LabelError, match="num_classes is of labels"):
        diagnose(tower_folder, photos, num_classes=3)


def test_labels_of_unreadable_images_are_left_out(tower_folder, tmp_path):
    folder = save_pairs(tmp_path, 4)
    (folder / "images" / "1.png").write_text("no image")
    found = diagnose(
        tower_folder,
        folder / "images",
        size=24,
        labels=folder / "labels",
        num_classes=3,
    )
    (values,) = found.checkpoints.values()
    assert found.images == 3 and "knn_iou" in values
    (folder / "images" / "2.bmp").write_bytes((folder / "images/2.png").read_bytes())
    with pytest.raises(LabelError, match="holds both 2.bmp and 2.png"):
        diagnose(
            tower_folder, folder / "images", labels=folder / "labels", num_classes=3
        )


def test_the_command(tower_folder, scenes, tmp_path, capsys):
    folder = scenes / "train"
    words = ["diagnose", str(tower_folder), "--images", str(folder / "images")]
    words += ["--size", "24", "--max_images", "4", "--own_yardstick"]
    words += ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "a.html")]
    labels = ["--labels", str(folder / "labels")]
    assert main([*words, *labels, "--num_classes", "3"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in LOWER_IS_CLEANER)
    assert "4 images at 24 px" in out and "each model's own thresholds" in out
    content = json.loads((tmp_path / "out.json").read_text())
    (values,) = content["checkpoints"].values()
    assert set(values) == set(LOWER_IS_CLEANER)
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert main([*words, *labels]) == 2
    assert "labels needs num_classes" in capsys.readouterr().err
    assert main([*words, "--json", str(tmp_path / "no/where.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
