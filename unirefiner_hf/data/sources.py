"""Images as users have them, by number: each has a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..errors import UniRefinerError
from .folders import check_images, look_through, take_split
from .images import load_rgb
from .report import DataReport
from .tables import builder_of, check_split, is_saved, load_table, source_of

FORMS = (
    "a folder, a path, a PIL image, a list of paths or PIL images, a parquet, arrow or "
    "WebDataset file, a folder of these or one saved by datasets, or a datasets.Dataset with "
    "an image column"
)


class InputError(UniRefinerError):
    """There are no images in what was given; the message tells what is taken."""


@dataclass(frozen=True)
class Images:
    """Images by number.

    Attributes:
        names: one for each image, all different.
        read: number -> what `load_rgb` takes.
        left_out: image that is not read -> reason.
        passed_over: folder or table that is not read -> reason.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    left_out: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, number: int) -> Image.Image:
        """The image, RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return load_rgb(self.read(number), self.names[number])

    def pick(self, numbers: Sequence[int]) -> Images:
        """Some of the images."""
        return Images(
            [self.names[number] for number in numbers],
            lambda number: self.read(numbers[number]),
            self.left_out,
            self.passed_over,
        )

    def spread(self, count: int) -> Images:
        """Evenly spaced images, at most `count`."""
        total, count = len(self), min(count, len(self))
        return self.pick([index * total // count for index in range(count)])


def open_images(images: Any, image_column: str | None = None) -> Images:
    """Open images for reading; nothing is decoded yet.

    Args:
        images: a folder (searched through), a path, a PIL image, a list of paths or PIL
            images, tables (see `FORMS`), or a `datasets.Dataset`.
        image_column: of tables; None: ``image``, or the only column of images. Their images
            are called ``row-0``, ``row-1``, ...

    Raises:
        InputError: anything else, nothing in it, or a path that is given twice.
        ImageError: a folder without images.
    """
    if isinstance(images, datasets.Dataset):
        return images_of_table(images, image_column, "row-{}".format)
    if isinstance(images, str) and not images.strip():
        raise InputError(f"images is empty: give {FORMS}.")
    path = Path(images).expanduser() if isinstance(images, (str, Path)) else None
    if path is not None and holds_tables(path):
        report = DataReport(path.name, None)
        table = load_table(str(path), None, "train", streaming=False, report=report)
        opened = images_of_table(table, image_column, "row-{}".format)
        return Images(opened.names, opened.read, report.skipped, report.passed_over)
    if image_column is not None:
        raise InputError(
            f"image_column is {image_column!r}, but images is a {type(images).__name__}: "
            "only a datasets.Dataset or a table has columns."
        )
    if path is not None:
        if not path.is_file():
            return images_of_folder(path)
        images = [path]
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, Sequence) or isinstance(images, bytes):
        raise InputError(f"images is a {type(images).__name__}; it must be {FORMS}.")
    if not images:
        raise InputError("images is empty: there is nothing to measure.")
    for number, item in enumerate(images):
        if not isinstance(item, (str, Path, Image.Image)):
            raise InputError(
                f"images[{number}] is a {type(item).__name__}; images must be {FORMS}."
            )
    return Images(_names(images), list(images).__getitem__)


def holds_tables(path: Path) -> bool:
    """Whether a path is read by `datasets`: a table, a folder of them, or a saved set.

    Raises:
        ImageError: a folder with tables of several kinds.
    """
    return path.exists() and (is_saved(path) or builder_of(path) is not None)


def images_of_folder(folder: Path, split: str = "train") -> Images:
    """The image files below a folder, by their paths below it.

    Args:
        split: where the folder holds nothing but folders such as ``train`` and ``val``.

    Raises:
        ImageError: no such folder or split, or no image.
    """
    contents = look_through(folder)
    if not take_split(contents, split):
        check_split(split, folder.name)
    check_images(contents)
    files = contents.images
    return Images(
        [contents.name(file) for file in files],
        files.__getitem__,
        contents.left_out,
        contents.passed_over,
    )


def images_of_table(
    table: datasets.Dataset, column: str | None, called: Callable[[int], str]
) -> Images:
    """The images of a column.

    Args:
        column: None: ``image``, or the only column of images.
        called: row -> name.

    Raises:
        InputError: no such column, one without images, or no rows.
    """
    kinds = (datasets.Image, datasets.Value)
    if column is None:
        pictured = [k for k, v in table.features.items() if isinstance(v, kinds[0])]
        if "image" in table.features or len(pictured) != 1:
            column = "image"
        else:
            column = pictured[0]
    if column not in table.features:
        raise InputError(
            f"The data set has no column {column!r}; it has "
            f"{', '.join(table.column_names) or 'none'}. Name one with image_column."
        )
    feature = table.features[column]
    encoded = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not encoded and (
        not isinstance(feature, kinds)
        or (isinstance(feature, datasets.Value) and feature.dtype not in TEXT)
    ):
        raise InputError(
            f"Column {column!r} holds {feature}; it must hold images, or paths or bytes "
            f"of image files: cast_column({column!r}, datasets.Image())."
        )
    if not len(table):
        raise InputError("The data set has no rows: there is no image in it.")
    table = table.with_format(None).select_columns([column])
    if isinstance(feature, datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return Images(
        [called(number) for number in range(len(table))],
        lambda number: source_of(table[number][column]),
    )


TEXT = ("string", "large_string", "binary", "large_binary")
"""Types of columns that hold paths or encoded images."""


def _names(images: Sequence[str | Path | Image.Image]) -> list[str]:
    """File names where they differ, else whole paths; numbers for images in memory."""
    paths = [str(item) for item in images if not isinstance(item, Image.Image)]
    short = Counter(Path(path).name for path in paths)
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice in images.")
    names = []
    for number, item in enumerate(images):
        if isinstance(item, Image.Image):
            names.append(f"image-{number}")
        else:
            name = Path(item).name
            names.append(name if short[name] == 1 else str(item))
    return names
