"""The package's metrics as modules of `evaluate`: for your own loop, Trainer or combine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...modeling.errors import UniRefinerError

if TYPE_CHECKING:
    from .image_metric import ImageMetric

METRICS = {
    "mean_iou": "MeanIou",
    "depth_errors": "DepthErrors",
    "dense_knn": "DenseKnn",
}
"""Script of each metric, without its ending, and the class in it."""


def load_metric(name: str, **options: Any) -> ImageMetric:
    """A metric by name, without network and without a copy of its code in a cache.

    Args:
        name: ``mean_iou``, ``depth_errors`` or ``dense_knn``.
        options: of the metric, such as ``num_classes=21``; and of every
            `evaluate.Metric`: ``keep_in_memory``, ``cache_dir``, ``num_process``,
            ``process_id``, ``experiment_id``, ``timeout``.

    Raises:
        UniRefinerError: there is no such metric or option, or a value does not fit.
    """
    _check(name)
    module = importlib.import_module(f".{name}", __name__)
    return getattr(module, METRICS[name])(**options)


def metric_path(name: str) -> str:
    """Where the installed script of a metric lies, for `evaluate.load`.

    Raises:
        UniRefinerError: there is no such metric.
    """
    _check(name)
    return str(Path(__file__).with_name(f"{name}.py"))


def _check(name: str) -> None:
    if name not in METRICS:
        raise UniRefinerError(
            f"There is no metric {name!r}; choose one of {', '.join(METRICS)}."
        )
