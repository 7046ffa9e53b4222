"""Numbers of the benchmarks, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import IGNORE
from ..modeling.errors import UniRefinerError

INTERSECTION, PREDICTED, LABELLED = 0, 1, 2
Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights ``(resamples, images)`` -> value of each resample ``(resamples,)``."""


@dataclass(frozen=True)
class SegmentationScores:
    """Shares in [0, 1]; NaN for a class that no label and no prediction has.

    Attributes:
        iou: ``(classes,)`` intersection over union.
        accuracy: ``(classes,)`` share of a class's pixels that were found.
        mean_iou, mean_accuracy: means over the classes that are not NaN.
        overall_accuracy: share of all labelled pixels.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float


def class_areas(
    prediction: Tensor, label: Tensor, classes: int, ignore: int = IGNORE
) -> Tensor:
    """Pixels of each class in one image, where the label does not say to ignore.

    Args:
        prediction: integers of any shape, in [0, classes) where they count.
        label: the same shape, in [0, classes) or `ignore`.
        classes: number of classes.
        ignore: label of pixels that do not count.

    Returns:
        ``(classes, 3)`` int64 on the CPU: intersection, predicted and labelled pixels.

    Raises:
        UniRefinerError: shapes differ, values are no whole numbers, or one that counts is
            out of range.
    """
    if prediction.shape != label.shape:
        raise UniRefinerError(
            f"The prediction is {tuple(prediction.shape)}, the label "
            f"{tuple(label.shape)}: they must be of one shape."
        )
    for what, values in (("label", label), ("prediction", prediction)):
        if values.is_floating_point() or values.is_complex():
            raise UniRefinerError(
                f"The {what} is {values.dtype}: classes are whole numbers."
            )
    label, prediction = label.flatten().long(), prediction.flatten().long()
    kept = label != ignore
    label, prediction = label[kept], prediction[kept]
    for what, values in (("label", label), ("prediction", prediction)):
        wrong = values[(values < 0) | (values >= classes)]
        if len(wrong):
            raise UniRefinerError(
                f"A {what} is {wrong[0].item()}; there are {classes} classes, 0 to "
                f"{classes - 1}, and {ignore} for ignored pixels."
            )
    cells = torch.bincount(label * classes + prediction, minlength=classes**2)
    cells = cells.view(classes, classes).cpu()
    return torch.stack((cells.diagonal(), cells.sum(0), cells.sum(1)), dim=1)


def scores_of(areas: np.ndarray) -> SegmentationScores:
    """Scores of areas ``(classes, 3)``, see `class_areas`, summed over the images.

    The arithmetic is that of the metric ``mean_iou`` of `evaluate`: areas are summed over
    the data set before they are divided, ignored pixels count nowhere, classes that never
    occur are left out of the means.
    """
    areas = areas.astype(np.float64)
    hit, labelled = areas[:, INTERSECTION], areas[:, LABELLED]
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hit / (areas[:, PREDICTED] + labelled - hit)
        accuracy = hit / labelled
        overall = hit.sum() / labelled.sum()
    return SegmentationScores(
        iou, accuracy, _nanmean(iou), _nanmean(accuracy), float(overall)
    )


def _nanmean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def check_measures(name: str, values: Mapping[str, float]) -> None:
    """Refuse a measure that is no number: a table must not show it as one.

    Args:
        name: of the model that was measured.

    Raises:
        UniRefinerError: names the measures that are NaN or infinite.
    """
    broken = [f"{k} = {v}" for k, v in values.items() if not math.isfinite(v)]
    if broken:
        raise UniRefinerError(
            f"{name}: {', '.join(broken)}. Its tokens or the labels tell nothing there: look "
            "at the images, and at the size they are measured at."
        )


def mean_iou_statistic(areas: np.ndarray) -> Statistic:
    """Mean IoU, averaged over seeds, as a function of how often each image counts.

    Args:
        areas: ``(seeds, images, classes, 3)`` of `class_areas`.
    """
    seeds, images, classes, _ = areas.shape

    def statistic(weights: np.ndarray) -> np.ndarray:
        flat = areas.astype(np.float64).transpose(1, 0, 2, 3).reshape(images, -1)
        summed = (weights @ flat).reshape(len(weights), seeds, classes, 3)
        hit = summed[..., INTERSECTION]
        union = summed[..., PREDICTED] + summed[..., LABELLED] - hit
        present = union > 0
        iou = np.divide(hit, union, out=np.zeros_like(hit), where=present)
        return (iou.sum(-1) / present.sum(-1).clip(1)).mean(-1)

    return statistic


def mean_statistic(values: np.ndarray) -> Statistic:
    """Mean over images and seeds of ``(seeds, images)`` values."""
    mean = values.mean(axis=0)
    return lambda weights: weights @ mean / weights.sum(axis=1)


def paired_bootstrap(
    ours: Statistic,
    theirs: Statistic,
    images: int,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a difference, resampling the images both were measured on.

    It says how the difference would vary over other images of the same kind, for these
    probes; the spread over probe seeds is the standard deviation beside it.

    Args:
        ours, theirs: see `mean_iou_statistic` and `mean_statistic`.
        images: their number.

    Returns:
        Lower and upper end of ours minus theirs.
    """
    random = np.random.default_rng(seed)
    weights = random.multinomial(images, np.full(images, 1 / images), size=resamples)
    difference = ours(weights.astype(np.float64)) - theirs(weights.astype(np.float64))
    tail = (1 - level) / 2
    low, high = np.quantile(difference, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class ImageDepthErrors:
    """Errors of one image's depth over its valid pixels.

    Attributes:
        rmse: root of the mean squared error, in metres.
        absrel: mean of |error| / true depth.
        delta1: share of pixels within a factor of 1.25.
        squared: sum of squared errors, for the pooled RMSE.
        pixels: number of valid pixels.
    """

    rmse: float
    absrel: float
    delta1: float
    squared: float
    pixels: int


def depth_errors(
    prediction: Tensor, depth: Tensor, low: float = 1e-3, high: float = 10.0
) -> ImageDepthErrors:
    """Compare ``(height, width)`` depths in metres where the truth lies in (low, high].

    Predictions are clamped to [low, high] first.

    Raises:
        UniRefinerError: shapes differ, no pixel is valid, or a prediction of a valid one
            is not a number.
    """
    if prediction.shape != depth.shape:
        raise UniRefinerError(
            f"The prediction is {tuple(prediction.shape)}, the depth {tuple(depth.shape)}: "
            "they must be of one shape."
        )
    valid = (depth > low) & (depth <= high)
    if not valid.any():
        raise UniRefinerError(f"No pixel has a depth in ({low}, {high}] metres.")
    true, guess = depth[valid].double(), prediction[valid].double().clamp(low, high)
    if guess.isnan().any():
        raise UniRefinerError(
            f"{int(guess.isnan().sum())} of {len(guess)} predicted depths are nan."
        )
    squared = ((guess - true) ** 2).sum().item()
    ratio = torch.maximum(guess / true, true / guess)
    count = int(valid.sum())
    return ImageDepthErrors(
        rmse=(squared / count) ** 0.5,
        absrel=((guess - true).abs() / true).mean().item(),
        delta1=(ratio < 1.25).double().mean().item(),
        squared=squared,
        pixels=count,
    )


def depth_scores(errors: Sequence[ImageDepthErrors]) -> dict[str, float]:
    """``rmse``, ``absrel``, ``delta1``: means of images; ``rmse_pooled``: of all pixels."""
    scores = {
        name: float(np.mean([getattr(image, name) for image in errors]))
        for name in ("rmse", "absrel", "delta1")
    }
    pixels = sum(image.pixels for image in errors)
    scores["rmse_pooled"] = (sum(image.squared for image in errors) / pixels) ** 0.5
    return scores
