"""Several checkpoints under one protocol: what `unirefiner evaluate` runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from ..data.labelled import ClassLabels, LabelledImages, class_labels, open_pairs
from .arguments import EvaluationArguments
from .checkpoints import Checkpoint, check_same_tower, load_checkpoint
from .depth import DepthSettings, evaluate_depth
from .metrics import mean_iou_statistic, mean_statistic
from .report import SegmentationRow, segmentation_report
from .results import Comparison, Measured, Metric, write_results
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

TABLE, REPORT = "table.md", "report.html"
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


def load_compared(
    sources: Sequence[str], arguments: EvaluationArguments
) -> list[Checkpoint]:
    """The checkpoints in order, the base first, then the base with each frame met.

    Raises:
        CheckpointMismatchError: a checkpoint of another tower than the first.
    """
    device = _device(arguments.device)
    loaded: list[Checkpoint] = []
    for source in sources:
        checkpoint = load_checkpoint(
            source,
            final_norm=loaded[0].model.config.final_norm if loaded else None,
            device=device,
            trust_remote_code=arguments.trust_remote_code,
        )
        if loaded:
            check_same_tower(loaded[0], checkpoint)
        names = [known.name for known in loaded]
        if checkpoint.name in names:
            unique = f"{checkpoint.name} ({Path(source).resolve().name})"
            if unique in names:
                unique = f"{checkpoint.name} ({source})"
            checkpoint = dataclasses.replace(checkpoint, name=unique)
        loaded.append(checkpoint)
    base, others = loaded[0], loaded[1:]
    widths = sorted({c.register_width for c in others} - {base.register_width, 0})
    framed = [base.framed(width) for width in widths] if arguments.framed_base else []
    return [base, *framed, *others]


def _device(asked: str | None) -> str:
    """The one asked for, or a GPU if there is one; under a launcher, the process's own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return str(PartialState(cpu=asked == "cpu").device)
    if asked is not None:
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def compare_segmentation(
    checkpoints: Sequence[Checkpoint],
    arguments: EvaluationArguments,
    settings: SegmentationSettings,
) -> Comparison:
    """Probe every checkpoint, and leave results where the arguments say.

    Raises:
        LabelError: see `open_pairs`, `class_labels` and `ClassLabels.read`.
    """
    train, val = open_splits(arguments)
    classes = class_labels(
        arguments.data,
        arguments.dataset,
        num_classes=arguments.num_classes,
        reduce_zero_label=arguments.reduce_zero_label,
        ignore=arguments.ignore_label,
    )
    comparison = Comparison(
        task="image-segmentation",
        dataset=name_of(arguments),
        split=arguments.val_split,
        protocol=settings.protocol(),
        metrics=SEGMENTATION_METRICS,
        images=len(val),
        settings={**dataclasses.asdict(settings), "processes": processes()[1]},
    )
    shown: list[SegmentationRow] = []
    for checkpoint in checkpoints:
        result = evaluate_segmentation(
            checkpoint,
            train,
            val,
            classes,
            settings,
            seeds=arguments.seeds,
            pictures=arguments.pictures,
        )
        comparison.rows.append((checkpoint, _segmented(result)))
        shown.append(SegmentationRow(checkpoint, result))
    if is_main():
        _leave(comparison, arguments, val, classes, shown, settings.crop)
    return comparison


def compare_zero_shot(
    checkpoints: Sequence[Checkpoint],
    arguments: EvaluationArguments,
    settings: ZeroShotSettings,
) -> Comparison:
    """Segment by words with every checkpoint, and leave results as the arguments say.

    Raises:
        TextSideError: no checkpoint brings a text side.
        ValueError: see `protocol_of`.
        LabelError: see `open_pairs`, `word_set` and `ClassLabels.read`.
    """
    val = _open_split(arguments, arguments.val_split, "val")
    title = SETS[arguments.dataset].title if arguments.dataset in SETS else None
    title = arguments.dataset_name or title or name_of(arguments)
    classes = _worded_classes(arguments, settings)
    words = word_set(classes, arguments.dataset, title, settings.classes_file)
    names = [group[0] for group in words.names]
    if words.background is not None:
        names[words.background] = "background"
    classes = dataclasses.replace(classes, names=tuple(names))
    protocol = protocol_of(checkpoints[0], words, settings)
    text = find_text(checkpoints, arguments.trust_remote_code)
    features = text_features(text, words.names, protocol.templates)
    comparison = Comparison(
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
    )
    shown: list[SegmentationRow] = []
    for checkpoint in checkpoints:
        result = evaluate_zero_shot(
            checkpoint,
            val,
            classes,
            words,
            text,
            features,
            protocol,
            pictures=arguments.pictures,
        )
        comparison.rows.append((checkpoint, _segmented(result)))
        shown.append(SegmentationRow(checkpoint, result))
    if is_main():
        _leave(comparison, arguments, val, classes, shown, protocol.window)
    return comparison


def _segmented(result: SegmentationResult) -> dict[str, Measured]:
    return {
        "mean_iou": Measured(
            [s.mean_iou for s in result.scores], mean_iou_statistic(result.areas)
        ),
        "mean_accuracy": Measured([s.mean_accuracy for s in result.scores]),
    }


def _worded_classes(
    arguments: EvaluationArguments, settings: ZeroShotSettings
) -> ClassLabels:
    """What the labels mean; of a folder that does not say, as `classes_file` does."""
    count = arguments.num_classes
    file = Path(arguments.data).expanduser() / "dataset.json"
    silent = arguments.dataset == "folder" and not file.is_file()
    if count is None and silent and settings.classes_file is not None:
        count = len(read_names(settings.classes_file))
    return class_labels(
        arguments.data,
        arguments.dataset,
        num_classes=count,
        reduce_zero_label=arguments.reduce_zero_label,
        ignore=arguments.ignore_label,
    )


def compare_depth(
    checkpoints: Sequence[Checkpoint],
    arguments: EvaluationArguments,
    settings: DepthSettings,
) -> Comparison:
    """Probe the depth of every checkpoint, and leave results where the arguments say.

    Raises:
        LabelError: see `open_pairs` and `read_depth`.
        ValueError: several processes.
    """
    count = processes()[1]
    if count > 1:
        raise ValueError(
            f"Depth probes run on one process, not on {count}: start "
            "without a launcher."
        )
    train, val = open_splits(arguments)
    comparison = Comparison(
        task="depth-estimation",
        dataset=name_of(arguments),
        split=arguments.val_split,
        protocol=settings.protocol(),
        metrics=DEPTH_METRICS,
        images=len(val),
        settings=dataclasses.asdict(settings),
    )
    for checkpoint in checkpoints:
        result = evaluate_depth(checkpoint, train, val, settings, seeds=arguments.seeds)
        measured = {"rmse_pooled": Measured(result.pooled_rmse())}
        for name in ("rmse", "absrel", "delta1"):
            values = result.per_image(name)
            means = values.mean(axis=1).tolist()
            measured[name] = Measured(means, mean_statistic(values))
        comparison.rows.append((checkpoint, measured))
    _leave_table(comparison, arguments)
    return comparison


def open_splits(
    arguments: EvaluationArguments,
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation pairs."""
    train = _open_split(arguments, arguments.train_split, "train")
    val = _open_split(arguments, arguments.val_split, "val")
    return train, val


def _open_split(
    arguments: EvaluationArguments, split: str, role: str
) -> LabelledImages:
    """Pairs of a split; `role` is ``train`` or ``val``, as the options are called."""
    pairs = open_pairs(
        arguments.data,
        split,
        layout=arguments.dataset,
        images=getattr(arguments, f"{role}_images"),
        labels=getattr(arguments, f"{role}_labels"),
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    return pairs.first(getattr(arguments, f"max_{role}"))


def name_of(arguments: EvaluationArguments) -> str:
    """What tables call the data set, never a whole path."""
    if arguments.dataset_name is not None:
        return arguments.dataset_name
    names = {layout: words.title for layout, words in SETS.items()}
    names["voc"] = "PASCAL VOC 2012"
    path = Path(arguments.data).expanduser()
    fallback = path.resolve().name if path.exists() else arguments.data
    return names.get(arguments.dataset, fallback)


def is_main() -> bool:
    """Whether this process speaks for all."""
    return processes()[0] == 0


def _leave_table(comparison: Comparison, arguments: EvaluationArguments) -> Path | None:
    """The results, and the table where the arguments name a folder; returns that."""
    output = arguments.evaluation_output
    folder = None if output is None else Path(output)
    write_results(comparison, folder)
    if folder is not None:
        (folder / TABLE).write_text(comparison.table() + "\n", encoding="utf-8")
    return folder


def _leave(
    comparison: Comparison,
    arguments: EvaluationArguments,
    val: LabelledImages,
    classes: ClassLabels,
    shown: list[SegmentationRow],
    size: int,
) -> None:
    folder = _leave_table(comparison, arguments)
    if folder is not None and arguments.pictures:
        page = segmentation_report(
            comparison, val, classes, shown, size, arguments.pictures
        )
        (folder / REPORT).write_text(page, encoding="utf-8")
