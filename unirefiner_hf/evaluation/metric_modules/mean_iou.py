"""Mean intersection over union, as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from unirefiner_hf.data.labelled import IGNORE
from unirefiner_hf.evaluation.metric_modules.image_metric import (
    ImageMetric,
    as_tensor,
    require_option,
)
from unirefiner_hf.evaluation.metrics import class_areas, scores_of
from unirefiner_hf.modeling.errors import UniRefinerError

_DESCRIPTION = """\
Intersection over union of each class: the pixels that prediction and label both give it, over
those that either does, summed over the data set before they are divided. Pixels with the ignore
label count nowhere; classes that neither a label nor a prediction has are left out of the
means. The arithmetic is that of the metric mean_iou of evaluate; images may differ in size, and
their areas are kept, not their pixels.
"""
_INPUTS = """
Args:
    predictions: of each image a map (height, width) of whole numbers in [0, num_classes).
    references: of each image a map of the same shape, in [0, num_classes) or ignore. Nothing is
        resized: bring the prediction to the size of its label first.

Options, when the metric is loaded:
    num_classes (int): number of classes.
    ignore (int): label of pixels that do not count; 255 unless set.
    per_category (bool): return the scores of each class, too.

Returns:
    mean_iou, mean_accuracy: means over the classes that occur, in [0, 1].
    overall_accuracy: share of all labelled pixels that were found.
    per_category_iou, per_category_accuracy: with per_category, a list with a value a class; nan
        where the class has none.

Raises:
    UniRefinerError: shapes differ, a value is out of range or no whole number, or every label is
        ignored.
"""
_CITATION = """\
@article{everingham2010voc,
    title = {The PASCAL Visual Object Classes (VOC) Challenge},
    author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and
        Zisserman, Andrew},
    journal = {International Journal of Computer Vision},
    volume = {88},
    pages = {303--338},
    year = {2010}
}
"""


class MeanIou(ImageMetric):
    """Mean IoU of label maps of any size; see `info.inputs_description`.

    Args:
        num_classes: number of classes.
        ignore: label of pixels that do not count.
        per_category: whether `compute` returns the scores of each class, too.
        options: of `evaluate.Metric`.

    Raises:
        UniRefinerError: no or a wrong number of classes, or an unknown option.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        ignore: int = IGNORE,
        per_category: bool = False,
        **options: Any,
    ) -> None:
        ok = isinstance(num_classes, int) and num_classes >= 1
        require_option("num_classes", num_classes, ok, "1 or more")
        self.num_classes: int = num_classes or 0
        self.ignore = ignore
        self.per_category = per_category
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        maps = [[datasets.Value("int64")]]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def measure(self, prediction: Any, reference: Any) -> np.ndarray:
        """Areas ``(classes, 3)`` int64 of one image, see `class_areas`.

        Args:
            prediction, reference: maps ``(height, width)``.

        Raises:
            UniRefinerError: a shape or value does not fit.
        """
        axes = ("height", "width")
        predicted = as_tensor(prediction, "prediction", axes)
        label = as_tensor(reference, "label", axes).to(predicted.device)
        return class_areas(predicted, label, self.num_classes, self.ignore).numpy()

    def _cells(self, measured: np.ndarray) -> tuple[Any, Any]:
        hit, predicted, labelled = measured.T.tolist()
        return [hit, predicted], [labelled]

    def _scores(self, predictions: list, references: list) -> dict[str, Any]:
        areas = np.concatenate((predictions, references), axis=1).sum(axis=0).T
        if not areas.any():
            raise UniRefinerError(
                f"Every label of the {len(predictions)} images is {self.ignore}, which "
                "is ignored: there is nothing to score."
            )
        scores = scores_of(areas)
        found: dict[str, Any] = {
            "mean_iou": scores.mean_iou,
            "mean_accuracy": scores.mean_accuracy,
            "overall_accuracy": scores.overall_accuracy,
        }
        if self.per_category:
            found["per_category_iou"] = scores.iou.tolist()
            found["per_category_accuracy"] = scores.accuracy.tolist()
        return found
