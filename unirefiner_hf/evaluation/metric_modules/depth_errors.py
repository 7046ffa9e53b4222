"""Errors of depth maps, as a module of `evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
import evaluate

from unirefiner_hf.evaluation.metric_modules.image_metric import (
    ImageMetric,
    as_tensor,
    require_option,
)
from unirefiner_hf.evaluation.metrics import (
    ImageDepthErrors,
    depth_errors,
    depth_scores,
)

_DESCRIPTION = """\
Errors of predicted depth where the true depth lies in (low, high]. Predictions are clamped to
[low, high]. Published tables average the root mean squared error over images or take it over all
pixels at once; both are given.
"""
_INPUTS = """
Args:
    predictions: of each image a map (height, width) of metres.
    references: of each image a map of the same shape, in metres; 0, nan or any value outside
        (low, high] where the depth is not known. Nothing is resized or cropped.

Options, when the metric is loaded:
    low, high (float): the range of depths that count, in metres; 0.001 and 10 unless set.

Returns:
    rmse: root of the mean squared error in metres, mean of images.
    rmse_pooled: the same over all valid pixels of all images.
    absrel: |error| / true depth, mean of images.
    delta1: share of pixels within a factor of 1.25 of the truth, mean of images.

Raises:
    UniRefinerError: shapes differ, no pixel of an image is valid, or a prediction is nan.
"""
_CITATION = """\
@inproceedings{eigen2014depth,
    title = {Depth Map Prediction from a Single Image using a Multi-Scale Deep Network},
    author = {Eigen, David and Puhrsch, Christian and Fergus, Rob},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2014}
}
"""


class DepthErrors(ImageMetric):
    """RMSE, AbsRel and delta1 of depth maps; see `info.inputs_description`.

    Args:
        low, high: the range of depths that count, in metres.
        options: of `evaluate.Metric`.

    Raises:
        UniRefinerError: an empty range, or an unknown option.
    """

    def __init__(
        self, *, low: float = 1e-3, high: float = 10.0, **options: Any
    ) -> None:
        require_option("low", low, low > 0, "positive")
        require_option("high", high, high > low, f"above low ({low})")
        self.low, self.high = low, high
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        maps = [[datasets.Value("float64")]]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def measure(self, prediction: Any, reference: Any) -> ImageDepthErrors:
        """Errors of one image, see `metrics.depth_errors`.

        Args:
            prediction, reference: maps ``(height, width)`` in metres.

        Raises:
            UniRefinerError: a shape or value does not fit.
        """
        axes = ("height", "width")
        predicted = as_tensor(prediction, "prediction", axes)
        depth = as_tensor(reference, "depth", axes).to(predicted.device)
        return depth_errors(predicted, depth, self.low, self.high)

    def _cells(self, measured: ImageDepthErrors) -> tuple[Any, Any]:
        *errors, pixels = dataclasses.astuple(measured)
        return [errors], [[pixels]]

    def _scores(self, predictions: list, references: list) -> dict[str, Any]:
        return depth_scores(
            [
                ImageDepthErrors(*errors[0], pixels=int(pixels[0][0]))  # type: ignore[misc]
                for errors, pixels in zip(predictions, references, strict=True)
            ]
        )
