"""What a run, `diagnose`, `compare`, `extract_features` and `evaluate` show the model."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil

import unirefiner_hf
from tests.conftest import make_tiny_tower
from unirefiner_hf.data.labelled import class_labels, open_pairs
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.segmentation import cache_tokens
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.training.trainer import UniRefinerTrainer

from .conftest import refine

SIZE = 24


@contextmanager
def shown():
    """Collects the images of `SIZE` that models and objectives are given."""
    images = []
    forward = UniRefinerModel.forward

    def watched(self, pixel_values, *given, **options):
        if pixel_values.shape[-2:] == (SIZE, SIZE):
            images.extend(pixel_values.detach())
        return forward(self, pixel_values, *given, **options)

    compute_loss = UniRefinerTrainer.compute_loss

    def trained(self, model, inputs, *given, **options):
        images.extend(inputs["pixel_values"])
        return compute_loss(self, model, inputs, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UniRefinerModel, "forward", watched)
        patch.setattr(UniRefinerTrainer, "compute_loss", trained)
        yield images


def is_among(wanted, images):
    return any(torch.allclose(wanted, image, atol=1e-6, rtol=1e-5) for image in images)


@pytest.fixture
def photos(tmp_path):
    """Of the size of the run: two upright, one on its side, one transparent."""
    folder = tmp_path / "photos" / "val" / "images"
    (tmp_path / "photos" / "val" / "labels").mkdir(parents=True)
    folder.mkdir()
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        values = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        image = Image.fromarray(values)
        if number == 3:
            image.putalpha(Image.fromarray(values[..., 0]))
        options = {"exif": exif} if number == 2 else {}
        image.save(folder / f"{number}.png", **options)
        label = Image.fromarray(values[..., 0] % 2)
        label.save(folder.parent / "labels" / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "pixels",
    [
        {"do_normalize": False, "resample": 0},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ],
    ids=["not normalised", "in -1 to 1"],
)
def test_every_door_shows_what_the_merged_processor_gives(
    pixels, photos, arguments, tmp_path
):
    base = tmp_path / "base"
    make_tiny_tower("dinov2").save_pretrained(base)
    BitImageProcessorPil(**pixels).save_pretrained(base)
    with shown() as seen:
        run = refine(
            *arguments(
                model={"model": str(base)},
                data={"data": str(photos)},
                max_steps=3,
                save_steps=100,
                report_images=4,
                register_factor=1,
                method={"num_crops": 1},
            )
        )
    merged = run / "merged"
    processor = AutoImageProcessor.from_pretrained(merged)
    files = sorted(photos.iterdir())
    wanted = [
        processor(unirefiner_hf.load_rgb(file), return_tensors="pt")["pixel_values"][0]
        for file in files
    ]
    assert wanted[0].shape == (3, SIZE, SIZE)
    by_door = {"training": seen}
    options = {"size": SIZE}
    with shown() as by_door["diagnose"]:
        unirefiner_hf.diagnose(str(merged), photos, **options)
    with shown() as by_door["compare"]:
        unirefiner_hf.compare(str(base), str(merged), photos, **options)
    with shown() as by_door["extract"]:
        unirefiner_hf.extract_features(str(merged), photos, tmp_path / "f", **options)
    with shown() as by_door["evaluate"]:
        pairs = open_pairs(str(photos.parent.parent), "val")
        classes = class_labels("", num_classes=2)
        cache_tokens(load_checkpoint(str(merged)), pairs, classes, SIZE)
    for door, images in by_door.items():
        for number, image in enumerate(wanted):
            assert is_among(image, images), f"{door}: {files[number].name}"
