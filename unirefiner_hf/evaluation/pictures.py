"""Pictures of a segmentation: predictions beside the truth, and what tokens look like."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.labelled import IGNORE, ClassLabels, LabelledImages
from ..results import Bars, Colour, Figure, Section
from ..visualize import fit_pca, pca_rgb
from .checkpoints import Checkpoint
from .segmentation import SegmentationResult


def palette(classes: int) -> np.ndarray:
    """Colours ``(256, 3)`` uint8: class 0 dark, the others round the wheel; 255 white."""
    colours = np.full((256, 3), 128, dtype=np.uint8)
    colours[0] = (40, 40, 40)
    for number in range(1, min(classes, IGNORE)):
        hue = (number * 0.381966) % 1
        rgb = colorsys.hsv_to_rgb(hue, 0.75, 0.9)
        colours[number] = [round(255 * part) for part in rgb]
    colours[IGNORE] = 255
    return colours


def segmentation_sections(
    images: LabelledImages,
    classes: ClassLabels,
    checkpoints: Sequence[Checkpoint],
    results: Sequence[SegmentationResult],
    *,
    size: int,
    count: int,
    probes: bool,
) -> list[Section]:
    """IoU of each class, predictions beside the truth, principal components.

    Args:
        images: the measured pairs; the first `count` are shown.
        results: of each checkpoint.
        size: side in pixels at which components are drawn.
        probes: probes were trained, for the headings.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    count = min(count, len(images))
    pictures = [images.pair(number)[0] for number in range(count)]
    return [
        Section(
            f"IoU of each class{', mean over seeds' if probes else ''}",
            bars=Bars(["", *names], _class_shares(classes, results)),
        ),
        Section(
            f"Predictions{' of the first probe seed' if probes else ''}",
            key=_key(classes),
            rows=_predictions(images, classes, names, results, count),
        ),
        component_section(pictures, checkpoints, size),
    ]


def _class_shares(
    classes: ClassLabels, results: Sequence[SegmentationResult]
) -> list[tuple[str, list[float | None]]]:
    means = [np.mean([s.iou for s in result.scores], axis=0) for result in results]
    return [
        (name, [None if np.isnan(m[number]) else float(m[number]) for m in means])
        for number, name in enumerate(classes.names)
    ]


def _key(classes: ClassLabels) -> list[tuple[Colour, str]]:
    colours = palette(len(classes))
    return [
        ((int(red), int(green), int(blue)), name)
        for (red, green, blue), name in zip(colours, classes.names, strict=False)
    ]


def _predictions(
    images: LabelledImages,
    classes: ClassLabels,
    names: Sequence[str],
    results: Sequence[SegmentationResult],
    count: int,
) -> list[list[Figure]]:
    colours = palette(len(classes))
    rows = []
    for number in range(count):
        image, values = images.pair(number)
        label = classes.read(values, images.names[number])
        found = [
            Figure.of(colours[result.predictions[number]], name)
            for name, result in zip(names, results, strict=True)
        ]
        shown = Figure.of(image, images.names[number])
        rows.append([shown, Figure.of(colours[label], "truth"), *found])
    return rows


def component_section(
    pictures: Sequence[Image.Image], checkpoints: Sequence[Checkpoint], size: int
) -> Section:
    """Principal components of each checkpoint's tokens, in its own basis."""
    columns = [[Figure.of(picture, "image") for picture in pictures]]
    for checkpoint in checkpoints:
        tokens, grid = square_tokens(checkpoint, pictures, size)
        drawn = pca_rgb(tokens, grid, fit_pca(tokens))
        columns.append([Figure.of(cell, checkpoint.name) for cell in drawn])
    return Section(
        "Principal components of the tokens",
        "Each checkpoint has its own basis, fitted on the images shown.",
        rows=list(zip(*columns, strict=True)),
    )


def square_tokens(
    checkpoint: Checkpoint, images: Sequence[Image.Image], size: int
) -> tuple[Tensor, tuple[int, int]]:
    """Tokens of images resized to ``size x size``, rounded up to patches.

    Returns:
        ``(images, patches, hidden)`` float32 on the CPU, and rows and columns of patches.
    """
    square = (checkpoint.side(size), checkpoint.side(size))
    maps = []
    for image in images:
        pixels = checkpoint.reading(image, square)
        maps.append(checkpoint.feature_map(pixels[None].to(checkpoint.model.device)))
    stacked = torch.cat(maps).cpu()
    return stacked.flatten(2).transpose(1, 2), (stacked.shape[2], stacked.shape[3])
