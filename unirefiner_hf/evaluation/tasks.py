"""What `evaluate` measures: each task opens its data first and measures afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ..data.labelled import ClassLabels, LabelledImages, class_labels, open_pairs
from ..modeling.errors import UniRefinerError
from .arguments import EvaluationArguments
from .checkpoints import Checkpoint
from .depth import DepthSettings, evaluate_depth, read_depth
from .ground_truth import LOOKED_AT, check_labels, look_through
from .metrics import mean_iou_statistic, mean_statistic
from .pictures import segmentation_sections
from .results import EvaluatedCheckpoint, Evaluation, Measured, Metric
from .segmentation import (
    SegmentationResult,
    SegmentationSettings,
    evaluate_segmentation,
    processes,
)
from .zero_shot import (
    ZeroShotSettings,
    evaluate_zero_shot,
    find_text,
    protocol_of,
    read_names,
    text_features,
    word_set,
)
from .zero_shot_sets import SETS

SEGMENTATION_METRICS = (
    Metric("mean_iou", "mIoU"),
    Metric("mean_accuracy", "mACC"),
)
DEPTH_METRICS = (
    Metric("rmse", "RMSE, mean of images", "m", 1.0, higher_is_better=False),
    Metric("rmse_pooled", "RMSE, pooled", "m", 1.0, higher_is_better=False),
    Metric("absrel", "AbsRel", "", 1.0, higher_is_better=False),
    Metric("delta1", "delta1"),
)
Measure: TypeAlias = Callable[[Sequence[Checkpoint]], Evaluation]
"""What is left to do when the data are open."""


def segmentation(
    arguments: EvaluationArguments, settings: SegmentationSettings, data: Any
) -> Measure:
    """Probe every checkpoint.

    Args:
        data: see `open_splits`.

    Raises:
        LabelError: see `open_pairs`, `class_labels` and `check_labels`.
    """
    train, val = open_splits(arguments, data)
    classes = _classes(arguments, data, arguments.num_classes)
    look_through(train.first(LOOKED_AT), classes.read, "labels of the training split")
    absent = check_labels(val, classes, arguments.val_split)

    def measure(checkpoints: Sequence[Checkpoint]) -> Evaluation:
        results = [
            evaluate_segmentation(
                checkpoint,
                train,
                val,
                classes,
                settings,
                seeds=arguments.seeds,
                pictures=arguments.pictures,
            )
            for checkpoint in checkpoints
        ]
        evaluation = Evaluation(
            task="image-segmentation",
            dataset=name_of(arguments, data),
            split=arguments.val_split,
            protocol=settings.protocol(),
            metrics=SEGMENTATION_METRICS,
            images=len(val),
            settings={**dataclasses.asdict(settings), "processes": processes()[1]},
            absent=absent,
        )
        size = settings.crop
        _fill(evaluation, checkpoints, results, val, classes, size, arguments.pictures)
        return evaluation

    return measure


def zero_shot(
    arguments: EvaluationArguments, settings: ZeroShotSettings, data: Any
) -> Measure:
    """Segment by words with every checkpoint.

    Args:
        data: see `open_splits`.

    Raises:
        LabelError: see `open_pairs`, `word_set` and `check_labels`.
        TextSideError: while it measures: no checkpoint brings a text encoder.
        ValueError: while it measures: see `protocol_of`.
    """
    val = _open_split(arguments, data, "val")
    title = SETS[arguments.dataset].title if arguments.dataset in SETS else None
    title = arguments.dataset_name or title or name_of(arguments, data)
    classes = _worded_classes(arguments, settings, data)
    words = word_set(classes, arguments.dataset, title, settings.classes_file)
    names = [group[0] for group in words.names]
    if words.background is not None:
        names[words.background] = "background"
    classes = dataclasses.replace(classes, names=tuple(names))
    absent = check_labels(val, classes, arguments.val_split)

    def measure(checkpoints: Sequence[Checkpoint]) -> Evaluation:
        protocol = protocol_of(checkpoints[0], words, settings)
        text = find_text(checkpoints, arguments.trust_remote_code)
        features = text_features(text, words.names, protocol.templates)
        results = [
            evaluate_zero_shot(
                checkpoint,
                val,
                classes,
                words,
                text,
                features,
                protocol,
                pictures=arguments.pictures,
            )
            for checkpoint in checkpoints
        ]
        evaluation = Evaluation(
            task="image-segmentation",
            dataset=title,
            split=arguments.val_split,
            protocol=protocol.words(),
            metrics=SEGMENTATION_METRICS,
            images=len(val),
            settings={
                **dataclasses.asdict(protocol),
                "classes": [", ".join(group) for group in words.names],
            },
            probes=False,
            absent=absent,
        )
        size = protocol.window
        _fill(evaluation, checkpoints, results, val, classes, size, arguments.pictures)
        return evaluation

    return measure


def depth(
    arguments: EvaluationArguments, settings: DepthSettings, data: Any
) -> Measure:
    """Probe the depth of every checkpoint.

    Args:
        data: see `open_splits`.

    Raises:
        LabelError: see `open_pairs` and `read_depth`.
        UniRefinerError: several processes.
    """
    count = processes()[1]
    if count > 1:
        raise UniRefinerError(
            f"Depth probes run on one process, not on {count}: start without a launcher."
        )
    train, val = open_splits(arguments, data)
    read = partial(read_depth, settings=settings)
    look_through(train.first(LOOKED_AT), read, "depths of the training split")
    look_through(val, read, f"depths of {arguments.val_split}")

    def measure(checkpoints: Sequence[Checkpoint]) -> Evaluation:
        evaluation = Evaluation(
            task="depth-estimation",
            dataset=name_of(arguments, data),
            split=arguments.val_split,
            protocol=settings.protocol(),
            metrics=DEPTH_METRICS,
            images=len(val),
            settings=dataclasses.asdict(settings),
        )
        for checkpoint in checkpoints:
            result = evaluate_depth(
                checkpoint, train, val, settings, seeds=arguments.seeds
            )
            measured = {"rmse_pooled": Measured(result.pooled_rmse())}
            for name in ("rmse", "absrel", "delta1"):
                values = result.per_image(name)
                means = values.mean(axis=1).tolist()
                measured[name] = Measured(means, mean_statistic(values))
            evaluation.rows.append(EvaluatedCheckpoint.of(checkpoint, measured))
        return evaluation

    return measure


TASKS: dict[str, tuple[type, Callable[..., Measure]]] = {
    "segmentation": (SegmentationSettings, segmentation),
    "depth": (DepthSettings, depth),
    "zero_shot": (ZeroShotSettings, zero_shot),
}
"""Task -> its settings, and what opens it."""


def _fill(
    evaluation: Evaluation,
    checkpoints: Sequence[Checkpoint],
    results: Sequence[SegmentationResult],
    val: LabelledImages,
    classes: ClassLabels,
    size: int,
    pictures: int,
) -> None:
    """Rows of a segmentation and, on the process that speaks for all, the pictures."""
    for checkpoint, result in zip(checkpoints, results, strict=True):
        measured = {
            "mean_iou": Measured(
                [s.mean_iou for s in result.scores], mean_iou_statistic(result.areas)
            ),
            "mean_accuracy": Measured([s.mean_accuracy for s in result.scores]),
        }
        evaluation.rows.append(EvaluatedCheckpoint.of(checkpoint, measured))
    if pictures and is_main():
        evaluation.sections = segmentation_sections(
            val,
            classes,
            checkpoints,
            results,
            size=size,
            count=pictures,
            probes=evaluation.probes,
        )


def _classes(
    arguments: EvaluationArguments, data: Any, count: int | None
) -> ClassLabels:
    return class_labels(
        data,
        arguments.dataset,
        num_classes=count,
        reduce_zero_label=arguments.reduce_zero_label,
        ignore=arguments.ignore_label,
    )


def _worded_classes(
    arguments: EvaluationArguments, settings: ZeroShotSettings, data: Any
) -> ClassLabels:
    """What the labels mean; of a folder that does not say, as `classes_file` does."""
    count = arguments.num_classes
    told = not isinstance(data, Mapping)
    told = told and (Path(data).expanduser() / "dataset.json").is_file()
    silent = arguments.dataset == "folder" and not told
    if count is None and silent and settings.classes_file is not None:
        count = len(read_names(settings.classes_file))
    return _classes(arguments, data, count)


def open_splits(
    arguments: EvaluationArguments, data: Any = None
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation pairs.

    Args:
        data: a folder, a Hub id or splits in memory; None: that of the arguments.
    """
    data = arguments.data if data is None else data
    return (
        _open_split(arguments, data, "train"),
        _open_split(arguments, data, "val"),
    )


def _open_split(arguments: EvaluationArguments, data: Any, role: str) -> LabelledImages:
    """Pairs of a split; `role` is ``train`` or ``val``, as the options are called."""
    pairs = open_pairs(
        data,
        getattr(arguments, f"{role}_split"),
        layout=arguments.dataset,
        images=getattr(arguments, f"{role}_images"),
        labels=getattr(arguments, f"{role}_labels"),
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    return pairs.first(getattr(arguments, f"max_{role}"))


def name_of(arguments: EvaluationArguments, data: Any) -> str:
    """What tables call the data set, never a whole path."""
    if arguments.dataset_name is not None:
        return arguments.dataset_name
    if isinstance(data, Mapping):
        return "data set in memory"
    names = {layout: words.title for layout, words in SETS.items()}
    names["voc"] = "PASCAL VOC 2012"
    path = Path(data).expanduser()
    fallback = path.resolve().name if path.exists() else str(data)
    return names.get(arguments.dataset, fallback)


def is_main() -> bool:
    """Whether this process speaks for all."""
    return processes()[0] == 0
