"""A backbone's image processor: read, checked, and made to resize as the model needs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    PreTrainedConfig,
    SiglipImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..data.pixels import PixelReading
from ..errors import UniRefinerError, as_users
from ..modeling.families import family_of

PROBE = (32, 32)
"""Height and width of the image a processor is tried with."""
KEPT = (
    *("do_normalize", "image_mean", "image_std"),
    *("do_rescale", "rescale_factor", "resample"),
)
"""What a processor says of pixels, as transformers calls it."""
UNUSED = {
    "do_center_crop": False,
    "do_pad": False,
    "crop_to_patches": False,
    "do_image_splitting": False,
}
"""Steps of some processors that would change size or place of the image."""


class ProcessorError(UniRefinerError):
    """An image processor is missing, or does what the model is not shown."""


def load_processor(source: str, **options: Any) -> Any:
    """The image processor of a backbone, which tells its normalisation.

    Args:
        source: folder or Hub id; empty for a model in memory that came from neither.
        options: of `AutoImageProcessor.from_pretrained`.

    Raises:
        ProcessorError: none there.
    """
    if not source:
        raise ProcessorError(
            "The model was made in memory, so nothing tells how its images are "
            "normalised: give its image processor as processing_class."
        )
    try:
        with as_users(f"the image processor of {Path(source).name}"):
            return AutoImageProcessor.from_pretrained(source, **options)
    except OSError as error:
        if not Path(source).is_dir():
            raise
        raise ProcessorError(
            f"{Path(source).name} has no usable preprocessor_config.json, which tells "
            "the mean and deviation its images were normalised with. Save the processor "
            "of its training there: processor.save_pretrained(folder)."
        ) from error


def pixel_reading(processor: Any, config: PreTrainedConfig, name: str) -> PixelReading:
    """What an image processor does to pixels, so that ours are the same.

    ``do_normalize``, ``image_mean``, ``image_std``, ``do_rescale``, ``rescale_factor`` and
    ``resample`` are honoured; its size and crop are not: images are resized whole to the size
    asked for.

    Args:
        config: of the backbone.
        name: of the backbone, for messages.

    Raises:
        ProcessorError: it states no mean or deviation and normalises, it normalises for a
            backbone that does so itself (RADIO), or it does to pixels what we do not, found
            by a comparison.
    """
    stated = processor.to_dict() if hasattr(processor, "to_dict") else {}
    reading = _stated_reading(stated, name)
    _check_once(reading, config, name)
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (*PROBE, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    try:
        resized = resized_processor(processor, PROBE)
        made = resized(images=image, return_tensors="pt")["pixel_values"][0]
    except Exception as problem:  # of any kind, by remote code too
        raise ProcessorError(
            f"The image processor of {name} ({type(processor).__name__}) fails on an RGB "
            f"image: {type(problem).__name__}: {problem}"
        ) from problem
    if not made.is_floating_point():
        raise ProcessorError(
            f"The image processor of {name} gives whole numbers, which no model takes: set "
            "do_rescale or do_normalize to true in its preprocessor_config.json."
        )
    ours = reading(image, PROBE)
    level = 1 / (255 * min(reading.std))
    if made.shape != ours.shape or not torch.allclose(
        made.float(), ours, rtol=1e-5, atol=level / 100
    ):
        raise ProcessorError(
            f"The image processor of {name} ({type(processor).__name__}) does more to "
            "pixels than resize, rescale and normalise them, so the model would be trained "
            "on others than its users give it. Save one that does these alone "
            "(CLIPImageProcessor, for one) as its preprocessor_config.json."
        )
    return reading


def resized_processor(
    processor: BaseImageProcessor, size: tuple[int, int]
) -> BaseImageProcessor:
    """A copy that resizes whole images to `size` and takes those of every mode.

    One that cuts patches (NaFlex) gives way to SigLIP's: the model takes images.

    Args:
        size: height and width in pixels.
    """
    resized: Any = copy.deepcopy(processor)
    if "max_num_patches" in resized.to_dict():
        resized = SiglipImageProcessorPil(**{n: getattr(resized, n) for n in KEPT})
    height, width = size
    resized.size = {"height": height, "width": width}
    resized.do_resize = True
    resized.do_convert_rgb = True
    for name, value in UNUSED.items():
        if hasattr(resized, name):
            setattr(resized, name, value)
    if hasattr(resized, "crop_size"):
        resized.crop_size = {"height": height, "width": width}
    return resized


def _stated_reading(stated: dict[str, Any], name: str) -> PixelReading:
    factor = stated.get("rescale_factor", 1 / 255)
    scale = 255 * factor if stated.get("do_rescale", True) else 255.0
    if math.isclose(scale, 1):
        scale = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if stated.get("do_normalize", True):
        mean = _channels(stated.get("image_mean"), "image_mean", name)
        std = _channels(stated.get("image_std"), "image_std", name)
    if not scale > 0 or not all(value > 0 for value in std):
        raise ProcessorError(
            f"The image processor of {name} has rescale_factor {factor} and image_std "
            f"{list(std)}: all of them must be above 0."
        )
    resample = stated.get("resample")
    try:
        found = Image.Resampling(2 if resample is None else int(resample))
    except (TypeError, ValueError) as problem:
        raise ProcessorError(
            f"The image processor of {name} has resample {resample!r}; it must be one of "
            f"{', '.join(f'{r.value} ({r.name.lower()})' for r in Image.Resampling)}."
        ) from problem
    return PixelReading(
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
        found,
    )


def _channels(value: Any, field: str, name: str) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        value = [value] * 3
    if not value or len(value) != 3 or not all(math.isfinite(part) for part in value):
        raise ProcessorError(
            f"The image processor of {name} states no image_mean and image_std of three "
            f"channels ({field} is {value!r}): add them to its preprocessor_config.json."
        )
    return tuple(map(float, value))


def _check_once(reading: PixelReading, config: PreTrainedConfig, name: str) -> None:
    """Refuse pixels that would be normalised twice."""
    inside = family_of(config).normalises
    if inside is None or (set(reading.mean), set(reading.std)) == ({0.0}, {1.0}):
        return
    mean, std = (tuple(getattr(config, field)) for field in inside)
    if (set(mean), set(std)) == ({0.0}, {1.0}):
        return
    raise ProcessorError(
        f"{name} ({config.model_type}) normalises its pixels itself and takes them in [0, 1], "
        "and its image processor would normalise them before: set do_normalize to false and "
        "do_rescale to true in its preprocessor_config.json."
    )
