"""Whatever the file, every door shows the backbone the pixels a user's processor gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil

import unirefiner_hf
from tests.conftest import make_tiny_tower
from tests.data.kinds import READ, REFUSED, SIZE
from unirefiner_hf.data.images import ImageError
from unirefiner_hf.data.labelled import pair_folders
from unirefiner_hf.data.sources import InputError
from unirefiner_hf.data.unlabelled import open_training_images
from unirefiner_hf.evaluation.inputs import load_pictures
from unirefiner_hf.loading.processor import pixel_reading, resized_processor

SHAPE = (SIZE[1], SIZE[0])


@pytest.fixture(scope="module")
def processor():
    """One that takes nothing but RGB by itself."""
    return ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def reading(processor):
    return pixel_reading(processor, make_tiny_tower("vit").config, "tiny")


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """As a merged folder holds it."""
    folder = tmp_path_factory.mktemp("merged")
    resized_processor(processor, SHAPE).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()

    def put(name: str, content: bytes) -> Path:
        file = tmp_path / "images" / name
        file.write_bytes(content)
        label = Image.new("L", SIZE)
        label.save(tmp_path / "labels" / f"{file.stem}.png")
        return file

    return put


def doors(file, reading):
    """Door -> how it reads the one image of a folder."""
    folder = file.parent

    def training():
        opened = open_training_images(str(folder), image_size=SHAPE, reading=reading)
        sample = opened[0]
        assert not sample["skipped"]
        return sample["pixel_values"]

    def evaluation():
        pairs = pair_folders(folder, folder.parent / "labels")
        return reading(pairs.pair(0)[0], SHAPE)

    def diagnosis():
        return reading(load_pictures(folder, 1).images[0], SHAPE)

    return {"training": training, "evaluation": evaluation, "diagnosis": diagnosis}


@pytest.mark.parametrize("name", READ)
def test_all_doors_give_the_pixels_that_are_meant(name, place, reading, saved):
    content, meant = READ[name]()
    file = place(name, content)
    image = unirefiner_hf.load_rgb(file)
    assert image.mode == "RGB" and image.size == SIZE
    assert np.abs(np.asarray(image).astype(int) - meant).max() <= 1
    wanted = saved(image, return_tensors="pt")["pixel_values"][0]
    for door, read in doors(file, reading).items():
        torch.testing.assert_close(read(), wanted, atol=1e-6, rtol=1e-6, msg=door)
    if Image.open(file).mode in ("L", "P", "RGBA", "CMYK") and "exif" not in name:
        alone = saved(Image.open(file), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(alone, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_all_doors_refuse_by_name(name, place, reading):
    content, reason = REFUSED[name]
    file = place(name, content())
    with pytest.raises(ImageError, match=f"^{name}: .*({reason})"):
        unirefiner_hf.load_rgb(file)
    for read in doors(file, reading).values():
        with pytest.raises((ImageError, InputError), match=f"{name}: .*({reason})"):
            read()


def test_postscript_is_never_run(place, monkeypatch):
    from PIL import EpsImagePlugin

    def run(*_, **__):
        raise AssertionError("Ghostscript was asked for")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    file = place("eps.jpg", REFUSED["eps.jpg"][0]())
    with pytest.raises(ImageError, match="not an image that is read"):
        unirefiner_hf.load_rgb(file)
    with pytest.raises(AssertionError), Image.open(file) as opened:
        opened.load()
