"""`diagnose`: how clean the tokens of models are, on any images, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.labelled import LabelError, LabelledImages, class_labels, pair_folders
from ..data.left_out import left_out_lines
from ..data.sources import InputError
from ..modeling.errors import UniRefinerError
from ..results import Figure, Result, Section, Table
from ..visualize import SPURIOUS_KEY, spurious_map
from .checkpoints import (
    Checkpoint,
    Source,
    load_checkpoints,
    measuring,
    with_borders,
)
from .cleanliness import (
    LOWER_IS_CLEANER,
    Cleanliness,
    knn_retrieval,
    measure_cleanliness,
)
from .inputs import Pictures, load_pictures
from .pictures import component_section

SHOWN = 4
"""Images of the page."""


@dataclass
class Diagnoses(Result):
    """Measures of cleanliness of each checkpoint; see `unirefiner_hf.evaluation.cleanliness`.

    Attributes:
        checkpoints: name -> measure -> value, means over images; the base first.
        images: their number.
        size: side in pixels they were measured at.
        own_thresholds: the filters' shares are by each model's own thresholds; else by the
            base's reference thresholds.
        skipped: image -> why it was left out.
        passed_over: folder or table that was not read -> why.
        sections: of the page, with its pictures.
    """

    checkpoints: Mapping[str, Mapping[str, float]]
    images: int
    size: int
    own_thresholds: bool
    skipped: Mapping[str, str]
    passed_over: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = field(default=(), repr=False)

    @property
    def title(self) -> str:
        """Which models were diagnosed."""
        return f"How clean the tokens are: {', '.join(self.checkpoints)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return {
            "images": self.images,
            "size": self.size,
            "thresholds": "own" if self.own_thresholds else "base",
            "skipped": dict(self.skipped),
            "passed_over": dict(self.passed_over),
            "checkpoints": {k: dict(v) for k, v in self.checkpoints.items()},
        }

    def tables(self) -> list[Table]:
        """A measure a row, a checkpoint a column."""
        words = {True: "low", False: "high", None: "see contrast"}
        measured = list(self.checkpoints.values())
        rows = [
            [name, *(f"{values[name]:.3f}" for values in measured), words[lower]]
            for name, lower in LOWER_IS_CLEANER.items()
            if all(name in values for values in measured)
        ]
        by = "each model's own" if self.own_thresholds else "the base's reference"
        caption = f"{self.images} images at {self.size} px; spurious tokens by {by} thresholds."
        heads = ["measure", *self.checkpoints, "clean is"]
        notes = left_out_lines(self.skipped, self.passed_over)
        return [Table(heads, rows, caption, notes)]


def diagnose(
    models: Source | Sequence[Source],
    images: Any,
    *,
    size: int = 224,
    max_images: int = 32,
    labels: str | Path | None = None,
    num_classes: int | None = None,
    own_thresholds: bool = False,
    image_column: str | None = None,
    processing_class: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Diagnoses:
    """Measure how clean the tokens of one or several models of one backbone are.

    The base with each border of register patches that the others have is measured, too.

    Args:
        models: one, or several with the base first; see `load_checkpoints`.
        images: unlike each other: a folder, a list of paths or PIL images, or a
            `datasets.Dataset`.
        size: side of the images in pixels, rounded up to patches.
        max_images: measure at most this many, evenly spaced.
        labels: folder of label maps named as the images, for k-NN retrieval; `images` is
            a folder then.
        num_classes: classes of the labels.
        own_thresholds: measure the filters' shares by each model's own thresholds, not by
            the base's reference thresholds.
        image_column: of a `datasets.Dataset`.
        processing_class: of models in memory.

    Raises:
        InputError: fewer than 2 usable images, or images of another kind.
        LabelError: labels without classes or without their images, or see `pair_folders`.
        CheckpointMismatchError: see `load_checkpoints`.
    """
    check_size(size)
    pictures = load_pictures(images, max_images, image_column)
    if len(pictures.images) < 2:
        raise InputError(
            f"{len(pictures.images)} image is too few: how much the place explains shows "
            "on several."
        )
    pairs = None if labels is None else _pairs(images, labels, num_classes, pictures)
    if labels is None and num_classes is not None:
        raise LabelError("num_classes is of labels, and there are none: give both.")
    loaded = load_checkpoints(
        models,
        device=device,
        processing_class=processing_class,
        trust_remote_code=trust_remote_code,
    )
    checkpoints = with_borders(loaded)
    rows: list[Cleanliness] = []
    with measuring(loaded):
        for checkpoint in checkpoints:
            base = rows[0] if rows and not own_thresholds else None
            row = measure_cleanliness(checkpoint, pictures.images, size, base=base)
            if pairs is not None:
                classes = class_labels("", num_classes=num_classes)
                row.values.update(knn_retrieval(checkpoint, pairs, classes, size))
            rows.append(row)
        sections = _sections(checkpoints, rows, pictures, size)
    return Diagnoses(
        checkpoints={row.name: row.values for row in rows},
        images=len(pictures.images),
        size=checkpoints[0].side(size),
        own_thresholds=own_thresholds,
        skipped=pictures.skipped,
        passed_over=pictures.passed_over,
        sections=sections,
    )


def check_size(size: int) -> None:
    """Refuse a side that is no number of pixels.

    Raises:
        UniRefinerError: names it.
    """
    if type(size) is not int or size < 1:
        raise UniRefinerError(f"size is {size!r}; it must be 1 or more pixels.")


def _pairs(
    images: Any, labels: str | Path, classes: int | None, pictures: Pictures
) -> LabelledImages:
    """The images that were read, with their labels."""
    if classes is None:
        raise LabelError("labels needs num_classes: how many classes they have.")
    if not isinstance(images, (str, Path)):
        raise LabelError("labels go with a folder of images: their names are compared.")
    pairs = pair_folders(Path(images).expanduser(), Path(labels).expanduser())
    numbers = {name: number for number, name in enumerate(pairs.names)}
    chosen = [numbers[name] for name in pictures.names]
    return LabelledImages(
        pictures.names,
        lambda number: pairs.read_image(chosen[number]),
        lambda number: pairs.read_map(chosen[number]),
    )


def _sections(
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[Cleanliness],
    pictures: Pictures,
    size: int,
) -> list[Section]:
    shown = pictures.images[:SHOWN]
    side = checkpoints[0].side(size)
    figures = []
    for number, picture in enumerate(shown):
        square = picture.resize((side, side), Image.Resampling.BICUBIC)
        maps = [
            spurious_map(square, row.fpgp[number], row.ah[number], row.grid)
            for row in rows
        ]
        drawn = [Figure.of(m, row.name) for m, row in zip(maps, rows, strict=True)]
        figures.append([Figure.of(square, pictures.names[number]), *drawn])
    found = Section("Spurious tokens", key=SPURIOUS_KEY, rows=figures)
    return [found, component_section(shown, checkpoints, size)]
