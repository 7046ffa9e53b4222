"""Where published labelled sets keep their files, and what their labels mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IGNORE = 255
"""Label of pixels that do not count."""


@dataclass(frozen=True)
class Layout:
    """Where a published data set keeps its files, below its root.

    Attributes:
        images, labels: folders of a split; ``{split}`` stands for the split's own name.
        splits: our name -> the data set's.
        image_ending, label_ending: what differs between the two file names of a pair.
        lists: file with a split's names, one a line; empty where folders tell.
        classes: number of classes.
        reduce_zero_label: label 0 is ignored, the others count from 0.
        relabel: label in the files -> class; others are ignored. Empty: as they are.
    """

    images: str
    labels: str
    splits: dict[str, str]
    classes: int
    image_ending: str = ""
    label_ending: str = ""
    lists: str = ""
    reduce_zero_label: bool = False
    relabel: dict[int, int] = field(default_factory=dict)


# The 19 classes of Cityscapes among its label ids (its own labels.py).
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_SPLITS = {"train": "train", "val": "val"}
# COCO's ids of its 80 things and 91 kinds of stuff; in stuffthingmaps each is one less.
_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_COCO = [number - 1 for number in range(1, 183) if number not in _GAPS]
_COCO_FILES: dict[str, Any] = {
    "images": "images/{split}",
    "labels": "annotations/{split}",
    "splits": {"train": "train2017", "val": "val2017"},
}
_CONTEXT_FILES: dict[str, Any] = {
    "images": "JPEGImages",
    "labels": "SegmentationClassContext",
    "splits": _SPLITS,
    "lists": "ImageSets/SegmentationContext/{split}.txt",
}
_VOC_FILES: dict[str, Any] = {
    "images": "JPEGImages",
    "labels": "SegmentationClass",
    "splits": _SPLITS,
    "lists": "ImageSets/Segmentation/{split}.txt",
}
LAYOUTS = {
    "ade20k": Layout(
        images="images/{split}",
        labels="annotations/{split}",
        splits={"train": "training", "val": "validation"},
        classes=150,
        reduce_zero_label=True,
    ),
    "cityscapes": Layout(
        images="leftImg8bit/{split}",
        labels="gtFine/{split}",
        splits=_SPLITS,
        classes=19,
        image_ending="_leftImg8bit",
        label_ending="_gtFine_labelIds",
        relabel={label: number for number, label in enumerate(_CITYSCAPES)},
    ),
    "voc": Layout(**_VOC_FILES, classes=21),
    "voc20": Layout(**_VOC_FILES, classes=20, reduce_zero_label=True),
    "context60": Layout(**_CONTEXT_FILES, classes=60),
    "context59": Layout(**_CONTEXT_FILES, classes=59, reduce_zero_label=True),
    "coco_object": Layout(
        **_COCO_FILES,
        classes=81,
        relabel={
            **{label: 1 + number for number, label in enumerate(_COCO[:80])},
            **{label: 0 for label in (*_COCO[80:], IGNORE)},
        },
    ),
    "coco_stuff": Layout(
        **_COCO_FILES,
        classes=171,
        relabel={label: number for number, label in enumerate(_COCO)},
    ),
}
