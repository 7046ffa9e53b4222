"""The probe end to end on tiny scenes, its parts, and what it refuses."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.conftest import save_pairs, save_refined
from unirefiner_hf.cli import main
from unirefiner_hf.data.images import ImageError
from unirefiner_hf.data.labelled import (
    ClassLabels,
    LabelError,
    class_labels,
    open_pairs,
)
from unirefiner_hf.evaluation.augment import (
    CropSettings,
    distort,
    resize_labels,
    training_crop,
)
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.segmentation import (
    SegmentationSettings,
    cache_tokens,
    evaluate_segmentation,
    learning_rate_share,
    sliding_scores,
    window_starts,
)
from unirefiner_hf.export.run_folder import read_evaluation

FAST = {"fast": True, "crop": 24, "fast_iterations": 60, "probe_lr": 0.05}
FULL = {"crop": 16, "stride": 8, "iterations": 40, "batch": 4, "probe_lr": 0.05}


@pytest.fixture(scope="module")
def tiny(tower_folder):
    return load_checkpoint(str(tower_folder))


def splits(scenes):
    return open_pairs(str(scenes), "train"), open_pairs(str(scenes), "val")


@pytest.mark.parametrize("options", [FAST, FULL], ids=["fast", "full"])
def test_a_probe_learns_colours(tiny, scenes, options):
    train, val = splits(scenes)
    settings = SegmentationSettings(**options)
    classes = class_labels(str(scenes))
    result = evaluate_segmentation(tiny, train, val, classes, settings, seeds=2)
    assert result.areas.shape == (2, 4, 3, 3)
    labelled = result.areas[0, :, :, 2].sum()
    assert labelled == 4 * 24 * 32
    assert len(result.predictions) == 4
    assert result.predictions[0].shape == (24, 32)
    # Always saying the commonest class gives less than a third.
    assert all(scores.mean_iou > 0.4 for scores in result.scores)
    again = evaluate_segmentation(tiny, train, val, classes, settings, seeds=1)
    assert again.scores[0].mean_iou == result.scores[0].mean_iou
    assert result.scores[0].mean_iou != result.scores[1].mean_iou


def test_mirrored_tokens_have_mirrored_labels(tiny, scenes, monkeypatch):
    """With tokens that are the brightest patches' pixels, both turn together."""
    monkeypatch.setattr(type(tiny), "feature_map", lambda _, pixels: pixels)
    train, _ = splits(scenes)
    cached, whole = cache_tokens(
        tiny, train, class_labels(str(scenes)), 24, batch=3, mirrored=True
    )
    assert len(whole) == 8 and len(cached.features) == len(cached.labels) == 16
    assert torch.equal(cached.features[8:], cached.features[:8].flip(-1))
    assert torch.equal(cached.labels[8:], cached.labels[:8].flip(-1))
    assert not torch.equal(cached.labels[8:], cached.labels[:8])


def test_windows_cover_and_average(tiny, scenes):
    assert window_starts(10, 16, 8) == [0]
    assert window_starts(40, 16, 8) == [0, 8, 16, 24]
    assert window_starts(37, 16, 11) == [0, 11, 21]

    class Ones(torch.nn.Module):
        def forward(self, features):
            return torch.ones(len(features), 2, *features.shape[-2:])

    settings = SegmentationSettings(crop=16, stride=8)
    image = Image.new("RGB", (50, 20))
    (scores,) = sliding_scores(tiny, [Ones()], image, 16, settings)
    assert scores.shape == (1, 2, 16, 40)
    assert torch.allclose(scores, torch.ones(1))


def test_learning_rate_rises_then_falls():
    shares = [learning_rate_share(step, 100, 1500, 1.0) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[99] == pytest.approx(0.01)
    assert max(shares) == 1.0
    assert learning_rate_share(20_000, 40_000, 1500, 1.0) == 0.5


def test_training_crops():
    random = np.random.default_rng(0)
    label = np.zeros((20, 30), dtype=np.int64)
    label[:, 15:] = 1
    image = Image.fromarray((label * 255).astype(np.uint8)).convert("RGB")
    settings = CropSettings(crop=16, distortion=False)
    seen = set()
    for _ in range(40):
        pixels, crop = training_crop(image, label, settings, random)
        assert pixels.shape == (16, 16, 3) and crop.shape == (16, 16)
        outside = np.isnan(pixels[..., 0])
        assert (crop[outside] == 255).all() and not (crop[~outside] == 255).any()
        inside = pixels[..., 0] > 128
        agree = (inside == (crop == 1))[~outside].mean()
        assert agree > 0.9
        share = (crop == 1).sum() / (crop != 255).sum()
        assert 0.2 <= share <= 0.8
        seen.add(round(float(share), 2))
    assert len(seen) > 5
    small = CropSettings(crop=16, scale=(0.5, 0.5), distortion=False)
    pixels, crop = training_crop(image, label, small, random)
    assert np.isnan(pixels).any() and (crop == 255).any()


def test_distortion_stays_in_range_and_varies():
    random = np.random.default_rng(0)
    pixels = random.uniform(0, 255, (8, 8, 3)).astype(np.float32)
    drawn = [distort(pixels, random) for _ in range(20)]
    assert all(d.min() >= 0 and d.max() <= 255 for d in drawn)
    assert len({round(float(d.mean()), 3) for d in drawn}) > 10


def test_labels_shrink_to_their_centres():
    label = np.arange(16).reshape(4, 4)
    assert resize_labels(label, (2, 2)).tolist() == [[5, 7], [13, 15]]


# Labels


def test_reduce_zero_label_and_relabel():
    values = np.array([[0, 1, 150, 255]], dtype=np.uint8)
    ade = class_labels("x", "ade20k")
    assert ade.read(values, "a").tolist() == [[255, 0, 149, 255]]
    city = class_labels("x", "cityscapes")
    values = np.array([[0, 7, 33, 9]], dtype=np.uint8)
    assert city.read(values, "a").tolist() == [[255, 0, 18, 255]]


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        (ClassLabels(("a", "b")), [[0, 2]], "x.png: a label is 2; there are 2 classes"),
        (
            ClassLabels(("a", "b"), reduce_zero_label=True),
            [[0, 3]],
            "a label is 3; there are 2 classes, 1 to 2",
        ),
    ],
)
def test_labels_out_of_range(labels, values, message):
    with pytest.raises(LabelError, match=message):
        labels.read(np.array(values, dtype=np.uint8), "x.png")
    with pytest.raises(LabelError, match="float64; whole numbers"):
        labels.read(np.array([[0.5]]), "x.png")


def test_sizes_that_differ(tmp_path):
    save_pairs(tmp_path / "val", 1)
    Image.new("L", (10, 24)).save(tmp_path / "val" / "labels" / "0.png")
    with pytest.raises(LabelError, match="0.png: the image is 32x24.*label 10x24"):
        open_pairs(str(tmp_path), "val").pair(0)


def test_missing_splits_and_partners(scenes, tmp_path):
    with pytest.raises(LabelError, match="no split 'test'.*holds train, val"):
        open_pairs(str(scenes), "test")
    with pytest.raises(LabelError, match="no folder images/training"):
        open_pairs(str(scenes), "train", layout="ade20k")
    save_pairs(tmp_path / "val", 2)
    (tmp_path / "val" / "labels" / "1.png").unlink()
    with pytest.raises(LabelError, match="no file for 1 of 2 names, the first is 1"):
        open_pairs(str(tmp_path), "val")
    with pytest.raises(LabelError, match="how many classes"):
        class_labels(str(tmp_path))


def test_a_datasets_set(scenes, tmp_path):
    rows = {}
    for split in ("train", "val"):
        pairs = open_pairs(str(scenes), split)
        read = [pairs.pair(number) for number in range(len(pairs))]
        rows[split] = datasets.Dataset.from_dict(
            {
                "image": [image for image, _ in read],
                "mask": [Image.fromarray(label) for _, label in read],
            }
        ).cast_column("image", datasets.Image())
        rows[split] = rows[split].cast_column("mask", datasets.Image())
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    pairs = open_pairs(str(tmp_path / "set"), "val", label_column="mask")
    image, label = pairs.pair(1)
    expected, truth = open_pairs(str(scenes), "val").pair(1)
    assert np.array_equal(image, expected) and np.array_equal(label, truth)
    with pytest.raises(LabelError, match="no column 'label'; it has image, mask"):
        open_pairs(str(tmp_path / "set"), "val")
    with pytest.raises(ImageError, match="no split 'test'; it has train, val"):
        open_pairs(str(tmp_path / "set"), "test", label_column="mask")
    rows["val"].save_to_disk(tmp_path / "one")
    with pytest.raises(LabelError, match="one table without splits"):
        open_pairs(str(tmp_path / "one"), "val", label_column="mask")


def test_published_layouts(tmp_path):
    voc = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (20, 20)).save(voc / "JPEGImages" / f"{name}.jpg")
    palette = Image.new("P", (20, 20), 5)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(voc / "SegmentationClass" / "b.png")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    pairs = open_pairs(str(voc), "val", layout="voc")
    assert pairs.names == ["b.jpg"]
    assert (pairs.pair(0)[1] == 5).all()

    city = tmp_path / "city"
    (city / "leftImg8bit/val/bonn").mkdir(parents=True)
    (city / "gtFine/val/bonn").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(
        city / "leftImg8bit/val/bonn/bonn_0_leftImg8bit.png"
    )
    for kind, value in (("labelIds", 7), ("color", 200)):
        Image.new("L", (20, 20), value).save(
            city / f"gtFine/val/bonn/bonn_0_gtFine_{kind}.png"
        )
    pairs = open_pairs(str(city), "val", layout="cityscapes")
    assert (pairs.pair(0)[1] == 7).all()


# The command


def test_evaluate_prints_one_table_and_leaves_results(
    tower_folder, scenes, tmp_path, capsys
):
    save_refined(tmp_path / "plain", tower_folder, "plain", 0.02)
    save_refined(tmp_path / "mine", tower_folder, "unirefiner", 0.02)
    words = ["evaluate", str(tower_folder), str(tmp_path / "plain")]
    words += [str(tmp_path / "mine"), "--data", str(scenes), "--fast", "--crop", "24"]
    words += ["--fast_iterations", "15", "--dataset_name", "Tiny"]
    words += ["--evaluation_output", str(tmp_path / "out"), "--pictures", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows[1:]]
    base = tower_folder.name
    assert names == [
        base,
        f"{base} + border of 1",
        "self-distillation baseline",
        "refined",
    ]
    assert "Missing control" not in out
    assert "refined against self-distillation baseline" in out

    (entry, second) = read_evaluation(tmp_path / "mine" / "merged" / "evaluation.json")
    assert (entry["metric"], second["metric"]) == ("mean_iou", "mean_accuracy")
    assert (entry["dataset"], entry["split"], entry["n"]) == ("Tiny", "val", 4)
    assert (entry["seeds"], entry["unit"]) == (3, "%")
    assert list(entry["controls"]) == names[:3]
    control = entry["controls"]["self-distillation baseline"]
    gap = entry["value"] - control["value"]
    assert control["difference"] == pytest.approx(gap, abs=1e-3)
    low, high = control["interval"]
    assert low <= high
    assert entry["missing_controls"] == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 6 + 5 and "http" not in page
    assert (tmp_path / "out" / "table.md").read_text() in out + "\n"

    # Measuring again replaces, another protocol adds.
    assert main([*words, "--pictures", "0"]) == 0
    assert len(read_evaluation(tmp_path / "mine" / "merged" / "evaluation.json")) == 2
    assert main([*words, "--fast_iterations", "16", "--pictures", "0"]) == 0
    assert len(read_evaluation(tmp_path / "mine" / "merged" / "evaluation.json")) == 4


def test_a_missing_control_is_said(tower_folder, scenes, tmp_path, capsys):
    save_refined(tmp_path / "mine", tower_folder, "unirefiner")
    words = ["evaluate", str(tower_folder), str(tmp_path / "mine"), "--data"]
    words += [str(scenes), "--fast", "--crop", "24", "--fast_iterations", "3"]
    assert main([*words, "--framed_base", "false", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "Missing control: self-distillation baseline" in out
    assert "Missing control: base with the border of register" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds 0", "seeds is 0; it must be at least 1"),
        ("--stride x", "stride is 'x'"),
        ("--dataset ade", "dataset is 'ade'"),
        ("--val_split test", "no split 'test'"),
        ("--num_classes 2 --fast --crop 24", "a label is 2; there are 2 classes"),
        ("--strid 3", "did you mean --stride"),
    ],
)
def test_errors_are_one_line(options, message, tower_folder, scenes, capsys):
    words = ["evaluate", str(tower_folder), "--data", str(scenes), *options.split()]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
