"""Training crops of the linear probes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.labelled import IGNORE
from ..data.pixels import PixelReading

TRIES = 10
"""Crops drawn before one that a single class fills is taken as it is."""


@dataclass(frozen=True)
class CropSettings:
    """How a training crop is drawn; the values of DINOv2's linear segmentation.

    Attributes:
        crop: side in pixels.
        scale: the shorter side of the image is resized to crop times a number between.
        max_share: a crop in which one class fills more is drawn again.
        flip: probability of a mirrored crop.
        distortion: brightness, contrast, saturation and hue, each with probability 0.5.
    """

    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True


def training_crop(
    image: Image.Image,
    label: np.ndarray,
    settings: CropSettings,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of a pair.

    Returns:
        ``(crop, crop, 3)`` float32 in [0, 255], NaN where the image did not reach, and
        ``(crop, crop)`` labels, 255 there.
    """
    crop = settings.crop
    scale = crop * random.uniform(*settings.scale) / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    label = resize_labels(label, (size[1], size[0]))
    for _ in range(TRIES):
        top = int(random.integers(0, max(1, size[1] - crop + 1)))
        left = int(random.integers(0, max(1, size[0] - crop + 1)))
        window = label[top : top + crop, left : left + crop]
        counts = np.unique(window[window != IGNORE], return_counts=True)[1]
        if len(counts) > 1 and counts.max() <= settings.max_share * counts.sum():
            break
    part = image.crop((left, top, left + window.shape[1], top + window.shape[0]))
    pixels = np.asarray(part, dtype=np.float32)
    if random.random() < settings.flip:
        pixels, window = pixels[:, ::-1], window[:, ::-1]
    if settings.distortion:
        pixels = distort(pixels, random)
    rows, columns = window.shape
    filled = np.full((crop, crop, 3), np.nan, dtype=np.float32)
    labels = np.full((crop, crop), IGNORE, dtype=np.int64)
    filled[:rows, :columns], labels[:rows, :columns] = pixels, window
    return filled, labels


def distort(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Change brightness (+-32), contrast, saturation (0.5 to 1.5) and hue (+-18 of 180).

    Each with probability 0.5; contrast before or after the colours, by a coin.

    Args:
        pixels: ``(height, width, 3)`` float32 in [0, 255].
    """
    if random.random() < 0.5:
        pixels = pixels + random.uniform(-32, 32)
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    early = random.random() < 0.5
    if early:
        pixels = pixels * contrast
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.uniform(-0.1, 0.1) if random.random() < 0.5 else 0.0
    pixels = pixels.clip(0, 255)
    if saturation != 1.0 or hue:
        image = Image.fromarray(pixels.round().astype(np.uint8)).convert("HSV")
        planes = np.asarray(image).astype(np.float32)
        planes[..., 0] = (planes[..., 0] + 256 * hue) % 256
        planes[..., 1] = (planes[..., 1] * saturation).clip(0, 255)
        shifted = Image.fromarray(planes.astype(np.uint8), "HSV")
        pixels = np.asarray(shifted.convert("RGB"), dtype=np.float32)
    if not early:
        pixels = (pixels * contrast).clip(0, 255)
    return pixels


def resize_labels(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize to ``(height, width)``, pixel centres aligned."""
    rows = ((np.arange(size[0]) + 0.5) * label.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * label.shape[1] / size[1]).astype(np.int64)
    return label[rows[:, None], columns[None, :]]


def normalised(pixels: np.ndarray, reading: PixelReading) -> Tensor:
    """``(height, width, 3)`` in [0, 255] to ``(3, height, width)``; NaN becomes 0."""
    return reading.normalised(pixels).nan_to_num(0.0)
