"""Numbers of the benchmarks, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

IGNORE = 255
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


class ConfusionMatrix:
    """Pixels of each true class by predicted class, summed over a whole data set.

    Scores follow the arithmetic of the metric ``mean_iou`` of `evaluate`: intersections
    and unions are summed over the data set before they are divided, ignored pixels count
    nowhere, classes that never occur are left out of the means.

    Args:
        classes: number of classes.
        ignore: label of pixels that do not count.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.classes = classes
        self.ignore = ignore
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Count one image.

        Args:
            prediction: integers of any shape, in [0, classes).
            label: the same shape, in [0, classes) or `ignore`.

        Returns:
            ``(classes, 3)`` int64: intersection, predicted and labelled pixels of the image.

        Raises:
            ValueError: shapes differ, or a value is out of range.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"The prediction is {tuple(prediction.shape)}, the label "
                f"{tuple(label.shape)}: they must be of one shape."
            )
        label, prediction = label.flatten().long(), prediction.flatten().long()
        kept = label != self.ignore
        label, prediction = label[kept], prediction[kept]
        for what, values in (("label", label), ("prediction", prediction)):
            wrong = values[(values < 0) | (values >= self.classes)]
            if len(wrong):
                raise ValueError(
                    f"A {what} is {wrong[0].item()}; there are {self.classes} classes, 0 to "
                    f"{self.classes - 1}, and {self.ignore} for ignored pixels."
                )
        cells = label * self.classes + prediction
        counts = torch.bincount(cells, minlength=self.classes**2)
        counts = counts.view(self.classes, self.classes).cpu()
        self.matrix += counts
        return torch.stack((counts.diagonal(), counts.sum(0), counts.sum(1)), dim=1)

    def all_reduce(self) -> None:
        """Sum over processes, where there are several."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            total = self.matrix.to(device)
            dist.all_reduce(total)
            self.matrix = total.cpu()

    def scores(self) -> SegmentationScores:
        """What was counted so far."""
        matrix = self.matrix
        areas = torch.stack((matrix.diagonal(), matrix.sum(0), matrix.sum(1)), dim=1)
        return scores_of(areas.numpy())


def scores_of(areas: np.ndarray) -> SegmentationScores:
    """Scores of summed areas ``(classes, 3)``: intersection, predicted, labelled."""
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


def mean_iou_statistic(areas: np.ndarray) -> Statistic:
    """Mean IoU, averaged over seeds, as a function of how often each image counts.

    Args:
        areas: ``(seeds, images, classes, 3)`` of `ConfusionMatrix.update`.
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
class DepthErrors:
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
) -> DepthErrors:
    """Compare ``(height, width)`` depths in metres where the truth lies in (low, high].

    Predictions are clamped to [low, high] first.

    Raises:
        ValueError: shapes differ, or no pixel is valid.
    """
    if prediction.shape != depth.shape:
        raise ValueError(
            f"The prediction is {tuple(prediction.shape)}, the depth {tuple(depth.shape)}: "
            "they must be of one shape."
        )
    valid = (depth > low) & (depth <= high)
    if not valid.any():
        raise ValueError(f"No pixel has a depth in ({low}, {high}] metres.")
    true, guess = depth[valid].double(), prediction[valid].double().clamp(low, high)
    squared = ((guess - true) ** 2).sum().item()
    ratio = torch.maximum(guess / true, true / guess)
    count = int(valid.sum())
    return DepthErrors(
        rmse=(squared / count) ** 0.5,
        absrel=((guess - true).abs() / true).mean().item(),
        delta1=(ratio < 1.25).double().mean().item(),
        squared=squared,
        pixels=count,
    )
