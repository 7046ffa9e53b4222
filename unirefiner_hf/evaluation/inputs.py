"""The images that are diagnosed, compared or encoded: each has a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..data.images import ImageError, list_images, load_rgb
from ..data.unlabelled import source_of
from ..modeling.errors import UniRefinerError

FORMS = (
    "a folder, a path, a PIL image, a list of paths or PIL images, or a datasets.Dataset "
    "with an image column"
)


class InputError(UniRefinerError):
    """There are no images in what was given; the message tells what is taken."""


@dataclass(frozen=True)
class Images:
    """Images by number.

    Attributes:
        names: one for each image, all different.
        read: number -> what `load_rgb` takes.
    """

    names: Sequence[str]
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, number: int) -> Image.Image:
        """The image, RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return load_rgb(self.read(number), self.names[number])

    def spread(self, count: int) -> Images:
        """Evenly spaced images, at most `count`."""
        total, count = len(self), min(count, len(self))
        picked = [index * total // count for index in range(count)]
        return Images(
            [self.names[number] for number in picked],
            lambda number: self.read(picked[number]),
        )


@dataclass(frozen=True)
class Pictures:
    """Images that could be read.

    Attributes:
        names, images: of each, RGB.
        skipped: name -> why it was left out.
    """

    names: list[str]
    images: list[Image.Image]
    skipped: dict[str, str]


def load_pictures(images: Any, count: int, image_column: str | None = None) -> Pictures:
    """Read at most `count` images, evenly spaced.

    Args:
        images: see `open_images`.

    Raises:
        InputError: none of them can be read, or see `open_images`.
    """
    if count < 1:
        raise InputError(f"max_images is {count}; it must be at least 1.")
    chosen = open_images(images, image_column).spread(count)
    found = Pictures([], [], {})
    for number, name in enumerate(chosen.names):
        try:
            found.images.append(chosen.load(number))
            found.names.append(name)
        except ImageError as problem:
            found.skipped[name] = str(problem)
    if not found.images:
        raise InputError(
            f"None of the {len(chosen)} images can be read: "
            f"{next(iter(found.skipped.values()))}"
        )
    return found


def open_images(images: Any, image_column: str | None = None) -> Images:
    """Open images for reading; nothing is decoded yet.

    Args:
        images: a folder (searched through), a path, a PIL image, a list of paths or PIL
            images, or a `datasets.Dataset`.
        image_column: of a `datasets.Dataset`; None: ``image``, or the only column of
            images. Images of a set are called ``row-0``, ``row-1``, ...

    Raises:
        InputError: anything else, nothing in it, or a path that is given twice.
        ImageError: a folder without images.
    """
    if isinstance(images, datasets.Dataset):
        return _of_dataset(images, image_column)
    if image_column is not None:
        raise InputError(
            f"image_column is {image_column!r}, but images is a {type(images).__name__}: "
            "only a datasets.Dataset has columns."
        )
    if isinstance(images, (str, Path)):
        path = Path(images).expanduser()
        if not path.is_file():
            files = list_images(path)
            names = [file.relative_to(path).as_posix() for file in files]
            return Images(names, files.__getitem__)
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


def _of_dataset(table: datasets.Dataset, column: str | None) -> Images:
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
    if not isinstance(feature, kinds) or (
        isinstance(feature, datasets.Value)
        and feature.dtype not in ("string", "binary")
    ):
        raise InputError(
            f"Column {column!r} holds {feature}; it must hold images, or paths or bytes "
            f"of image files: cast_column({column!r}, datasets.Image())."
        )
    if not len(table):
        raise InputError("The data set has no rows: there is nothing to measure.")
    table = table.with_format(None).select_columns([column])
    if isinstance(feature, datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return Images(
        [f"row-{number}" for number in range(len(table))],
        lambda number: source_of(table[number][column]),
    )
