"""A label lies over its image, however either is stored."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.data.kinds import encoded
from unirefiner_hf.data.images import turned
from unirefiner_hf.data.labelled import LabelError, open_pairs, pair_folders
from unirefiner_hf.evaluation.segmentation import Validation

LABEL = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 7
RGB = np.repeat((LABEL * 30)[..., None], 3, axis=-1)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def over_each_other(pair):
    image, label = pair
    return np.array_equal(np.asarray(image)[..., 0] // 30, label)


@pytest.fixture
def store(tmp_path):
    def put(orientation, label, kind="png", **options):
        for name in ("images", "labels"):
            (tmp_path / name).mkdir(exist_ok=True)
        content = encoded(Image.fromarray(RGB), kind, exif=exif(orientation))
        (tmp_path / "images" / f"a.{kind}").write_bytes(content)
        label.save(tmp_path / "labels" / "a.png", **options)
        return pair_folders(tmp_path / "images", tmp_path / "labels")

    return put


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_label_is_turned_with_its_image(store, orientation, kind):
    pairs = store(orientation, Image.fromarray(LABEL), kind)
    image, label = pairs.pair(0)
    assert image.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert over_each_other((image, label))
    tagged = Image.fromarray(LABEL)
    tagged.getexif()[0x0112] = orientation
    meant = ImageOps.exif_transpose(tagged)
    assert np.array_equal(turned(LABEL, orientation), meant)


def test_a_rotated_photograph_keeps_its_score(store):
    """A prediction that follows the picture scores 100 %, stored on its side or not."""
    for orientation in (1, 3, 6, 8):
        image, label = store(orientation, Image.fromarray(LABEL)).pair(0)
        validation = Validation(classes=7, pictures=0)
        predicted = torch.from_numpy(np.asarray(image)[..., 0] // 30)
        validation.count(0, predicted, label.astype(np.int64))
        assert validation.finish()[0].mean_iou == pytest.approx(1.0), orientation


def test_a_label_with_an_orientation_of_its_own(store):
    assert over_each_other(store(6, Image.fromarray(LABEL), exif=exif(6)).pair(0))
    upright = Image.fromarray(turned(LABEL, 6))
    on_its_side = upright.transpose(Image.Transpose.ROTATE_180)
    assert over_each_other(store(6, on_its_side, exif=exif(3)).pair(0))


def test_a_label_that_fits_the_upright_image_alone(store):
    assert over_each_other(store(8, Image.fromarray(turned(LABEL, 8))).pair(0))


def test_a_label_that_fits_neither_is_named(store):
    with pytest.raises(
        LabelError, match="a.png: the image is 16x24 pixels, its label 9x9"
    ):
        store(6, Image.new("L", (9, 9))).pair(0)


def test_a_damaged_label_is_named(store, tmp_path):
    pairs = store(1, Image.fromarray(LABEL))
    for content in (b"", b"II*\0" + bytes(40), b"hello"):
        (tmp_path / "labels" / "a.png").write_bytes(content)
        with pytest.raises(LabelError, match="^a.png: "):
            pairs.pair(0)


def test_depth_maps_in_arrays_turn_too(store, tmp_path):
    store(6, Image.fromarray(LABEL))
    (tmp_path / "labels" / "a.png").unlink()
    np.save(tmp_path / "labels" / "a.npy", LABEL)
    pairs = pair_folders(tmp_path / "images", tmp_path / "labels")
    assert over_each_other(pairs.pair(0))
    (tmp_path / "labels" / "a.npy").write_bytes(b"\x93NUMPY\x01\0junk")
    with pytest.raises(LabelError, match="a.npy: cannot be decoded"):
        pairs.pair(0)


@pytest.mark.parametrize("own", [1, 6])
def test_labels_in_a_table(own):
    rows = {
        "image": [{"bytes": encoded(Image.fromarray(RGB), exif=exif(6)), "path": None}],
        "label": [
            {"bytes": encoded(Image.fromarray(LABEL), exif=exif(own)), "path": None}
        ],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    table = datasets.Dataset.from_dict(rows, features=features)
    assert over_each_other(open_pairs({"val": table}, "val").pair(0))
    mapped = datasets.Dataset.from_dict(
        {"image": rows["image"], "label": [LABEL.tolist()]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Array2D((16, 24), "uint8")}
        ),
    )
    assert over_each_other(open_pairs({"val": mapped}, "val").pair(0))
    empty = datasets.Dataset.from_dict({**rows, "label": [None]}, features=features)
    with pytest.raises(LabelError, match=r"val\[0\], label: an empty cell"):
        open_pairs({"val": empty}, "val").pair(0)
    assert Image.open(io.BytesIO(rows["image"][0]["bytes"])).size == (24, 16)
