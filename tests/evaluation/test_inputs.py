"""Images as users have them, and what is none."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from unirefiner_hf.data.images import ImageError
from unirefiner_hf.data.sources import InputError, open_images
from unirefiner_hf.evaluation.inputs import load_pictures


def test_every_form_gives_the_same_images(photos, photo_set):
    files = sorted(photos.rglob("*.png"))
    opened = [Image.open(file).convert("RGB") for file in files]
    found = {
        "folder": load_pictures(photos, 10),
        "paths": load_pictures([str(files[0]), *files[1:]], 10),
        "pictures": load_pictures(opened, 10),
        "set": load_pictures(photo_set, 10),
        "other column": load_pictures(photo_set.rename_column("image", "photo"), 10),
        "set of paths": load_pictures(
            datasets.Dataset.from_dict({"file": list(map(str, files))}), 10, "file"
        ),
    }
    for form, pictures in found.items():
        assert len(pictures.images) == 5, form
        for ours, theirs in zip(pictures.images, opened, strict=True):
            assert np.array_equal(ours, theirs), form
    assert found["folder"].names[-1] == "more/4.png"
    assert list(found["folder"].skipped) == ["broken.jpg"]
    assert found["paths"].names == [f"{number}.png" for number in range(5)]
    assert found["pictures"].names[0] == "image-0"
    assert list(found["set"].skipped) == ["row-5"]
    assert "not an image" in found["set"].skipped["row-5"]


def test_some_are_evenly_spaced(photo_set):
    assert load_pictures(photo_set, 3).names == ["row-0", "row-2", "row-4"]
    assert load_pictures(photo_set[0]["image"], 3).names == ["image-0"]


def test_a_format_of_the_set_is_no_matter(photo_set):
    chosen = photo_set.select(range(3))
    chosen.set_transform(lambda rows: {"image": [0] * len(rows["image"])})
    assert load_pictures(chosen, 2).images[0].size == (40, 30)


def test_names_that_would_clash(photos, tmp_path):
    other = tmp_path / "0.png"
    other.write_bytes((photos / "0.png").read_bytes())
    names = open_images([photos / "0.png", photos / "1.png", other]).names
    assert names == [str(photos / "0.png"), "1.png", str(other)]
    with pytest.raises(InputError, match="0.png is given twice"):
        open_images([other, other])


ARRAYS = datasets.Dataset.from_dict({"image": [[[1, 2], [3, 4]]]})


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 3, 8, 8), {}, "images is a Tensor; it must be a folder"),
        ([torch.zeros(3, 8, 8)], {}, r"images\[0\] is a Tensor; images must be"),
        ([np.zeros((8, 8, 3))], {}, r"images\[0\] is a ndarray"),
        (b"bytes", {}, "images is a bytes"),
        ([], {}, "images is empty"),
        (ARRAYS, {}, r"Column 'image' holds List.*datasets.Image\(\)"),
        (ARRAYS, {"image_column": "photo"}, "no column 'photo'; it has image"),
        (ARRAYS.select([]), {}, "Column 'image' holds"),
        (["a.png"], {"image_column": "photo"}, "images is a list: only a datasets"),
    ],
)
def test_what_is_no_image(images, options, message):
    with pytest.raises(InputError, match=message):
        open_images(images, **options)


def test_nothing_to_read(tmp_path, photo_set):
    with pytest.raises(ImageError, match="no such folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="None of the 1 images.*no such file"):
        load_pictures([tmp_path / "nowhere.png"], 2)
    with pytest.raises(InputError, match="max_images is 0"):
        load_pictures(photo_set, 0)
    with pytest.raises(InputError, match="has no rows"):
        open_images(photo_set.select([]))
