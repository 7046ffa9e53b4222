"""What a processor does to pixels is done everywhere, or refused when it is loaded."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    DeiTImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from tests.conftest import ALL_FAMILIES, make_tiny_tower
from tests.data.kinds import RGB
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.loading.arguments import BackboneArguments
from unirefiner_hf.loading.backbone import load_backbone
from unirefiner_hf.loading.processor import (
    ProcessorError,
    pixel_reading,
    resized_processor,
)

IMAGE = Image.fromarray(RGB)
SHAPE = RGB.shape[:2]
LARGE = Image.fromarray(np.kron(RGB, np.ones((3, 3, 1), np.uint8)))
OWN = {
    "clip_vision_model": CLIPImageProcessorPil,
    "metaclip_2_vision_model": CLIPImageProcessorPil,
    "mlcd_vision_model": CLIPImageProcessorPil,
    "aimv2_vision_model": CLIPImageProcessorPil,
    "unirefiner_eva_clip_vision": CLIPImageProcessorPil,
    "siglip_vision_model": SiglipImageProcessorPil,
    "siglip2_vision_model": Siglip2ImageProcessorPil,
    "vit": ViTImageProcessorPil,
    "vit_mae": ViTImageProcessorPil,
    "vit_msn": ViTImageProcessorPil,
    "ijepa": ViTImageProcessorPil,
    "deit": DeiTImageProcessorPil,
    "beit": BeitImageProcessorPil,
    "internvl_vision": GotOcr2ImageProcessorPil,
}
"""Family -> the processor its checkpoints come with; the others: DINOv2's."""


def own_processor(family, **settings):
    if family == "radio":  # it normalises inside
        settings = {"do_normalize": False, **settings}
        return CLIPImageProcessorPil(**settings)
    return OWN.get(family, BitImageProcessorPil)(**settings)


def saved_pixels(processor, image, folder, size=SHAPE):
    """What a user gets of a merged folder's processor."""
    resized_processor(processor, size).save_pretrained(folder)
    loaded = AutoImageProcessor.from_pretrained(folder)
    return loaded(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_training_measuring_and_use_agree_in_every_family(family, tmp_path):
    make_tiny_tower(family).save_pretrained(tmp_path / "base")
    own_processor(family).save_pretrained(tmp_path / "base")
    base = load_backbone(tmp_path / "base", BackboneArguments())
    measured = load_checkpoint(str(tmp_path / "base"))
    assert base.reading == measured.reading
    wanted = saved_pixels(base.processor, IMAGE, tmp_path / "merged")
    got = base.reading(IMAGE, SHAPE)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    if family == "radio":
        assert 0 <= got.min() < 0.01 and 0.99 < got.max() <= 1


CLASSES = [
    CLIPImageProcessorPil,
    BitImageProcessorPil,
    SiglipImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTImageProcessorPil,
]
SETTINGS = [
    {},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 61, 62]},
    {"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    {"image_mean": 0.5, "image_std": 0.25},
    {"resample": 0},
    {"resample": 1},
    {"resample": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_setting_is_honoured(kind, settings, tmp_path):
    processor = kind(**settings)
    reading = pixel_reading(processor, make_tiny_tower("dinov2").config, "tiny")
    wanted = saved_pixels(processor, IMAGE, tmp_path)
    torch.testing.assert_close(reading(IMAGE, SHAPE), wanted, atol=1e-6, rtol=1e-5)
    resized = saved_pixels(processor, LARGE, tmp_path)
    level = 1 / 255 / min(reading.std)
    assert (reading(LARGE, SHAPE) - resized).abs().max() <= 1.01 * level


def test_denormalised_pixels_are_the_image():
    processor = ViTImageProcessorPil(do_rescale=False, image_mean=0.0, image_std=1.0)
    reading = pixel_reading(processor, make_tiny_tower("vit").config, "tiny")
    pixels = reading(IMAGE, SHAPE)
    assert pixels.max() > 200
    assert np.array_equal(reading.denormalised(pixels), RGB)


def test_radio_is_not_normalised_twice(tmp_path):
    config = make_tiny_tower("radio").config
    for settings in ({}, {"do_normalize": False, "do_rescale": False}):
        with pytest.raises(
            ProcessorError, match="radio.*itself.*do_normalize to false"
        ):
            pixel_reading(CLIPImageProcessorPil(**settings), config, "C-RADIO")
    make_tiny_tower("radio").save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ProcessorError, match="normalises its pixels itself"):
        load_backbone(tmp_path, BackboneArguments())
    with pytest.raises(ProcessorError, match="normalises its pixels itself"):
        load_checkpoint(str(tmp_path))
    # One whose own mean and deviation do nothing takes them normalised.
    config.norm_mean, config.norm_std = [0.0] * 3, [1.0] * 3
    assert pixel_reading(CLIPImageProcessorPil(), config, "x").mean[0] > 0.4


class Flipping(CLIPImageProcessorPil):
    """Gives blue, green, red."""

    def preprocess(self, images, **options):
        made = super().preprocess(images, **options)
        made["pixel_values"] = made["pixel_values"].flip(1)
        return made


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Flipping(), "Flipping.*does more to pixels"),
        (transformers.MobileViTImageProcessorPil(), "image_mean|does more to pixels"),
        (CLIPImageProcessorPil(image_std=[0.1, 0.0, 0.1]), "image_std.*above 0"),
        (CLIPImageProcessorPil(do_rescale=False, do_normalize=False), "whole numbers"),
        (CLIPImageProcessorPil(rescale_factor=0.0), "rescale_factor 0.0"),
        (CLIPImageProcessorPil(image_mean=[0.1, 0.2]), "image_mean.*three channels"),
        (
            CLIPImageProcessorPil(image_mean=[0.1, 0.2, float("nan")]),
            "image_mean.*three channels",
        ),
        (object(), "image_mean"),
    ],
)
def test_what_cannot_be_followed_is_refused(processor, message):
    with pytest.raises(ProcessorError, match=f"image processor of tiny.*({message})"):
        pixel_reading(processor, make_tiny_tower("dinov2").config, "tiny")
