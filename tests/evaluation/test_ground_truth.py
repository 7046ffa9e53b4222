"""What labels hold is known before anything is trained, and measures that tell nothing are said."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.conftest import save_refined
from unirefiner_hf import diagnose, evaluate
from unirefiner_hf.data.labelled import LabelError, class_labels, open_pairs
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.evaluation import evaluate as evaluate_module
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.metrics import check_measures
from unirefiner_hf.evaluation.segmentation import cache_tokens

QUICK = {"fast": True, "crop": 16, "fast_iterations": 4, "seeds": 1, "pictures": 0}


@pytest.fixture
def data(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where a backbone is loaded."""
    monkeypatch.setattr(evaluate_module, "load_checkpoints", None)


def relabel(folder, change):
    for file in folder.glob("*.png"):
        Image.fromarray(change(np.array(Image.open(file)))).save(file)


def test_masks_of_0_and_255_are_refused(data, tower_folder, unloaded):
    for split in ("train", "val"):
        relabel(data / split / "labels", lambda x: np.where(x, 255, 0).astype(np.uint8))
    said = "class 'nothing' .0.*scores 100 %.*label 255.*save the masks as 0 and 1"
    with pytest.raises(LabelError, match=said):
        evaluate(tower_folder, data, **QUICK)


def test_labels_that_are_all_ignored_are_refused(data, tower_folder, unloaded):
    relabel(data / "val" / "labels", lambda x: np.full_like(x, 255))
    with pytest.raises(LabelError, match="4 labels of val is ignored .label 255"):
        evaluate(tower_folder, data, **QUICK)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda x: np.where(x == 2, 7, x).astype(np.uint8),
            "a label is 7; there are 3",
        ),
        (lambda x: x[:-1], "the image is 32x24 pixels, its label 32x23"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_labels_are_found_before_the_backbone_is_loaded(
    split, change, said, data, tower_folder, unloaded
):
    relabel(data / split / "labels", change)
    with pytest.raises(LabelError, match=said):
        evaluate(tower_folder, data, **QUICK)


def test_depths_too(data, tower_folder, unloaded):
    with pytest.raises(LabelError, match="no depth lies within"):
        evaluate(tower_folder, data, task="depth", depth_high=0.0015)


def test_classes_that_never_occur_are_named_and_left_out(data, tower_folder):
    (data / "dataset.json").write_text('{"classes": ["nothing", "red", "blue", "sea"]}')
    found = evaluate(tower_folder, data, **QUICK)
    assert found.absent == ["sea"]
    assert "1 classes have no label in val and are left out of the means" in str(found)
    assert "sea" in str(found)
    (entries,) = found.to_dict()["checkpoints"].values()
    assert all(entry["absent_classes"] == ["sea"] for entry in entries)
    assert all(0 <= entry["value"] <= 100 for entry in entries)


def test_a_probe_without_labels_is_refused(data, tower_folder):
    relabel(data / "train" / "labels", lambda x: np.full_like(x, 255))
    with pytest.raises(LabelError, match="No pixel of the first 4 batches has a label"):
        evaluate(tower_folder, data, **QUICK)


def test_a_probe_that_diverges_is_refused(tower_folder, scenes):
    with pytest.raises(UniRefinerError, match="hold NaN.*lower probe_lr"):
        evaluate(
            tower_folder, scenes, **{**QUICK, "probe_lr": 1e30, "fast_iterations": 30}
        )


def test_tokens_beyond_float16_are_cached_as_they_are(tower_folder, scenes):
    checkpoint = load_checkpoint(str(tower_folder))
    pairs = open_pairs(str(scenes), "val")
    classes = class_labels(str(scenes))
    plain, _ = cache_tokens(checkpoint, pairs, classes, 16)
    assert plain.features.dtype == torch.float16
    with torch.no_grad():
        checkpoint.model.tower.layernorm.weight.mul_(1e5)
        checkpoint.model.tower.layernorm.bias.mul_(1e5)
    large, _ = cache_tokens(checkpoint, pairs, classes, 16)
    assert large.features.dtype == torch.float32 and large.features.abs().max() > 65504
    torch.testing.assert_close(
        large.features / 1e5, plain.features.float(), rtol=1e-2, atol=1e-2
    )


def test_tokens_that_are_nan_are_not_measured(tower_folder, scenes, photos):
    checkpoint = load_checkpoint(str(tower_folder))
    with torch.no_grad():
        checkpoint.model.tower.layernorm.bias[0] = torch.nan
    for measure in (
        lambda: evaluate(checkpoint, scenes, **QUICK),
        lambda: diagnose(checkpoint, photos, size=16),
    ):
        with pytest.raises(UniRefinerError, match="tokens of tiny-dinov2 hold NaN"):
            measure()


def test_half_a_merged_folder_is_not_measured(tower_folder, scenes, tmp_path):
    from safetensors.torch import load_file, save_file

    merged = save_refined(tmp_path / "run", tower_folder, "unirefiner")
    weights = load_file(merged / "model.safetensors")
    half = dict(list(weights.items())[::2])
    save_file(half, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UniRefinerError, match="merged does not fit UniRefinerModel.*miss"
    ):
        evaluate([tower_folder, tmp_path / "run"], scenes, **QUICK)


def test_a_measure_that_is_nan_is_no_number():
    check_measures("mine", {"a": 0.0})
    with pytest.raises(UniRefinerError, match="mine: b = nan, c = inf"):
        check_measures("mine", {"a": 1.0, "b": float("nan"), "c": float("inf")})


def test_one_patch_a_side_tells_nothing(tower_folder, photos):
    with pytest.raises(
        UniRefinerError, match="size is 4, one patch of 4 pixels a side"
    ):
        diagnose(tower_folder, photos, size=4)
