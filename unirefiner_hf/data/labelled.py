"""Images with label or depth maps: folder pairs, published layouts, `datasets` sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import UniRefinerError
from ..modeling.files import read_json
from .folders import HIDDEN, LOCKED, Contents, check_images, look_through
from .images import ImageError, decoding, load_upright, opened, orientation, turned
from .layouts import IGNORE, LAYOUTS
from .tables import load_table, source_of

MAP_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".bmp", ".gif")


class LabelError(UniRefinerError):
    """Labels are missing or wrong; the message names the file and the value."""


@dataclass(frozen=True)
class LabelledImages:
    """Pairs of image and map by number.

    Attributes:
        names: of the pairs, for messages.
        read_image: number -> what `load_rgb` takes.
        read_map: number -> array ``(height, width)``, and whether it was turned by an
            EXIF orientation of its own.
    """

    names: Sequence[str]
    read_image: Callable[[int], Any]
    read_map: Callable[[int], tuple[np.ndarray, bool]]

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """Image and map of one size, upright.

        A map without an EXIF orientation of its own is taken to lie over the image as it is
        stored, and turned with it, unless its size fits the upright image alone.

        Raises:
            ImageError: the image cannot be read.
            LabelError: the map cannot be read, or is of another size.
        """
        image, turn = load_upright(self.read_image(number), self.names[number])
        label, upright = self.read_map(number)
        stored = (
            (image.width, image.height) if turn >= 5 else (image.height, image.width)
        )
        if not upright and label.shape == stored:
            label = turned(label, turn)
        if label.shape != (image.height, image.width):
            shape = "x".join(map(str, label.shape[::-1]))
            raise LabelError(
                f"{self.names[number]}: the image is {image.width}x{image.height} pixels, "
                f"its label {shape}. They must be of one size, one value a pixel."
            )
        return image, label

    def first(self, count: int | None) -> LabelledImages:
        """Evenly spaced pairs, at most `count`; None takes all."""
        if count is None or count >= len(self):
            return self
        picked = [index * len(self) // count for index in range(count)]
        return LabelledImages(
            [self.names[i] for i in picked],
            lambda number: self.read_image(picked[number]),
            lambda number: self.read_map(picked[number]),
        )


@dataclass(frozen=True)
class ClassLabels:
    """What the values of label maps mean.

    Attributes:
        names: of the classes.
        reduce_zero_label: 0 is ignored, the others count from 0.
        relabel: value in the files -> class; others are ignored.
        ignore: value of pixels that do not count.
    """

    names: tuple[str, ...]
    reduce_zero_label: bool = False
    relabel: dict[int, int] = field(default_factory=dict)
    ignore: int = IGNORE

    def __len__(self) -> int:
        return len(self.names)

    def read(self, values: np.ndarray, name: str) -> np.ndarray:
        """File values to classes, ``(height, width)`` uint8 or int64; 255 is ignored.

        Raises:
            LabelError: a value that is no class; names the file and the value.
        """
        if values.dtype.kind not in "ui":
            raise LabelError(
                f"{name}: labels are {values.dtype}; whole numbers are needed."
            )
        labels = values.astype(np.int64)
        ignored = labels == self.ignore
        if self.relabel:
            classes = np.full_like(labels, IGNORE)
            for value, number in self.relabel.items():
                classes[values == value] = number
            return classes
        if self.reduce_zero_label:
            ignored |= labels == 0
            labels = labels - 1
        wrong = labels[~ignored & ((labels < 0) | (labels >= len(self)))]
        if len(wrong):
            value = int(wrong[0]) + int(self.reduce_zero_label)
            first = int(self.reduce_zero_label)
            raise LabelError(
                f"{name}: a label is {value}; there are {len(self)} classes, {first} to "
                f"{len(self) - 1 + first}, and {self.ignore} for ignored pixels. Set "
                "num_classes (or the lines of classes_file) or reduce_zero_label to what "
                "the files hold."
            )
        labels[ignored] = IGNORE
        return labels


def open_pairs(
    data: str | Mapping[str, Any],
    split: str,
    *,
    layout: str = "folder",
    images: str | None = None,
    labels: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> LabelledImages:
    """Open one split of a data set.

    Args:
        data: folder of the data set, a set saved by `datasets`, a Hub id, or a
            `datasets.DatasetDict`.
        split: ``train`` or ``val``, or a name the data set has.
        layout: ``folder`` for ``<split>/images`` and ``<split>/labels``, or one of
            `LAYOUTS`.
        images, labels: folders of the split, in place of the layout's.
        image_column, label_column: of a `datasets` set.

    Raises:
        LabelError: no such folder or split, or a file without its partner.
        ImageError: a folder without images.
    """
    if layout != "folder" and layout not in LAYOUTS:
        raise LabelError(
            f"dataset is {layout!r}; choose folder or one of {', '.join(LAYOUTS)}."
        )
    if isinstance(data, Mapping):
        if split not in data:
            raise LabelError(f"data has no split {split!r}; it has {', '.join(data)}.")
        return _pair_columns(data[split], split, image_column, label_column)
    if isinstance(data, str) and not data.strip():
        raise LabelError(
            "data is empty: name a folder of images and labels, or a Hub id."
        )
    root = Path(data).expanduser()
    if images is not None or labels is not None:
        if images is None or labels is None:
            raise LabelError(f"Name both folders of {split}, of images and of labels.")
        return pair_folders(Path(images), Path(labels))
    if layout == "folder":
        if not root.exists() or _has_splits(root):
            return _open_table(data, root, split, image_column, label_column)
        _check_split(root, split, f"{split}/images")
        return pair_folders(root / split / "images", root / split / "labels")
    known = LAYOUTS[layout]
    name = known.splits.get(split, split)
    _check_split(root, split, known.images.format(split=name))
    listed = None
    if known.lists:
        file = root / known.lists.format(split=name)
        if not file.is_file():
            raise LabelError(f"{file}: there is no such list of the split {split!r}.")
        listed = file.read_text().split()
    return pair_folders(
        root / known.images.format(split=name),
        root / known.labels.format(split=name),
        known.image_ending,
        known.label_ending,
        listed,
    )


def _check_split(root: Path, split: str, below: str) -> None:
    if (root / below).is_dir():
        return
    if not root.is_dir():
        raise LabelError(f"{root}: there is no such folder.")
    holds = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir()))
    raise LabelError(
        f"{root} has no split {split!r}: there is no folder {below}. It holds "
        f"{holds or 'no folders'}."
    )


def pair_folders(
    images: Path,
    labels: Path,
    image_ending: str = "",
    label_ending: str = "",
    listed: Sequence[str] | None = None,
) -> LabelledImages:
    """Pair files of two folders by their path without suffix.

    Args:
        image_ending, label_ending: cut off the names before they are compared.
        listed: keep only these names.

    Raises:
        LabelError: an image without label (names it), or a listed name without image.
    """
    contents = look_through(images)
    check_images(contents)
    if not labels.is_dir():
        raise LabelError(f"{labels}: there is no such folder of labels.")
    maps = look_through(labels)
    if listed is None:
        _check_whole(contents)
        _check_whole(maps)
    paths = _by_key(contents.images, images, image_ending)
    found = _by_key(
        [
            path
            for path in maps.files
            if path.suffix.lower() in MAP_SUFFIXES and path.stem.endswith(label_ending)
        ],
        labels,
        label_ending,
    )
    names = sorted(paths) if listed is None else list(listed)
    for held, folder in ((paths, images), (found, labels)):
        missing = [name for name in names if name not in held]
        if missing:
            raise LabelError(
                f"{folder} holds no file for {len(missing)} of {len(names)} names, the "
                f"first is {missing[0]}."
            )
    return LabelledImages(
        [paths[name].relative_to(images).as_posix() for name in names],
        lambda number: paths[names[number]],
        lambda number: read_map(found[names[number]], found[names[number]].name),
    )


def _by_key(paths: Sequence[Path], folder: Path, ending: str) -> dict[str, Path]:
    keyed: dict[str, Path] = {}
    for path in paths:
        other = keyed.setdefault(_key(path, folder, ending), path)
        if other is not path:
            raise LabelError(
                f"{folder} holds both {other.name} and {path.name}: files are paired by "
                "their names without endings, so leave one of them out."
            )
    return keyed


def _check_whole(contents: Contents) -> None:
    """Refuse to measure on a part of a folder."""
    for name, reason in {**contents.passed_over, **contents.left_out}.items():
        if name in contents.left_out and reason != HIDDEN or reason.startswith(LOCKED):
            raise LabelError(f"{contents.folder}: {name} cannot be used: {reason}.")


def _key(path: Path, folder: Path, ending: str) -> str:
    relative = path.relative_to(folder).with_suffix("").as_posix()
    return relative.removesuffix(ending)


def read_map(source: Path | bytes | Image.Image, name: str) -> tuple[np.ndarray, bool]:
    """Values of a label or depth map as they are; of a palette image, the indices.

    Returns:
        The values, and whether they were turned by the file's EXIF orientation.

    Raises:
        LabelError: the file cannot be read.
    """
    if isinstance(source, Path) and source.suffix.lower() == ".npy":
        with decoding(name, LabelError):
            return np.load(source, allow_pickle=False), False
    with opened(source, name, LabelError) as image, decoding(name, LabelError):
        turn = orientation(image)
        image.load()
        return np.asarray(ImageOps.exif_transpose(image)), turn != 1


def _has_splits(root: Path) -> bool:
    """Whether `datasets` saved a set with splits there."""
    if root.is_file() or (root / "state.json").is_file():
        raise LabelError(
            f"{root} is one table without splits, and the probe must not be measured on "
            "what it was trained on: save a DatasetDict with both splits."
        )
    return (root / "dataset_dict.json").is_file()


def _open_table(
    data: str, root: Path, split: str, image_column: str, label_column: str
) -> LabelledImages:
    table = load_table(data, None, split, streaming=False)
    name = root.name if root.exists() else data
    return _pair_columns(table, name, image_column, label_column)


def _pair_columns(
    table: Any, name: str, image_column: str, label_column: str
) -> LabelledImages:
    import datasets

    if not isinstance(table, datasets.Dataset):
        raise LabelError(
            f"{name} is a {type(table).__name__}; labelled images are read by number, "
            "from a datasets.Dataset."
        )
    for column in (image_column, label_column):
        if column not in table.column_names:
            raise LabelError(
                f"{name} has no column {column!r}; it has {', '.join(table.column_names)}."
            )
    encoded = isinstance(table.features[label_column], datasets.Image)
    encoded = encoded and table.format["type"] is None
    for column in (image_column, label_column) if encoded else (image_column,):
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))

    def read(number: int) -> tuple[np.ndarray, bool]:
        value = table[number][label_column]
        if not encoded:
            return np.asarray(value), False
        name = f"{names[number]}, {label_column}"
        try:
            source = source_of(value)
        except ImageError as problem:
            raise LabelError(f"{name}: {problem}") from None
        return read_map(Path(source) if isinstance(source, str) else source, name)

    names = [f"{name}[{number}]" for number in range(len(table))]
    return LabelledImages(
        names, lambda number: source_of(table[number][image_column]), read
    )


def class_labels(
    data: str | Mapping[str, Any],
    layout: str = "folder",
    *,
    num_classes: int | None = None,
    reduce_zero_label: bool | None = None,
    ignore: int = IGNORE,
) -> ClassLabels:
    """Classes of a data set: from its layout, its ``dataset.json``, or `num_classes`.

    Raises:
        LabelError: nothing says how many classes there are.
    """
    held = isinstance(data, Mapping)
    file = None if held else Path(str(data)).expanduser() / "dataset.json"
    relabel: dict[int, int] = {}
    if layout in LAYOUTS:
        known = LAYOUTS[layout]
        names = tuple(map(str, range(known.classes)))
        relabel = known.relabel
        if reduce_zero_label is None:
            reduce_zero_label = known.reduce_zero_label
    elif num_classes is not None:
        names = tuple(map(str, range(num_classes)))
    elif file is not None and file.is_file():
        told = read_json(file).get("classes")
        if not isinstance(told, list) or not all(isinstance(n, str) for n in told):
            raise LabelError(
                f'{file} lists no classes: write {{"classes": [names]}} into it, in the '
                "order of the labels."
            )
        names = tuple(told)
    else:
        raise LabelError(
            f"Nothing says how many classes {'the set' if held else data} has: set "
            'num_classes, or put a dataset.json with {"classes": [names]} into the folder.'
        )
    return ClassLabels(names, bool(reduce_zero_label), relabel, ignore)
