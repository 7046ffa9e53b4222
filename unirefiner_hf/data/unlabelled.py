"""The training images: folders, data sets on disk, in memory and on the Hub."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from .images import ImageError, decoding, image_size
from .left_out import left_out_lines, reason_of
from .pixels import PixelReading
from .report import DataReport
from .samples import RefinementImages, ToPixels
from .sources import TEXT, holds_tables, images_of_folder, images_of_table
from .streams import RefinementStream
from .tables import FORMS, FormError, load_table, unread

SHUFFLE_BUFFER = 1000
DECODERS_RAISE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What a data set that opens its images itself may raise of a damaged one."""
SOURCES = (
    "a folder of images, a parquet, arrow or WebDataset file, a folder saved by datasets, a "
    "Hub id, a datasets.Dataset or IterableDataset, or a torch Dataset of PIL images"
)


def open_training_images(
    data: Any,
    *,
    image_size: tuple[int, int] | None = None,
    reading: PixelReading | None = None,
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
) -> RefinementImages | RefinementStream:
    """Open the images of a training run.

    Args:
        data: see `SOURCES`. Items of a torch `Dataset` are PIL images, dicts with
            `image_column`, or tuples whose first part is the image.
        image_size: height and width in pixels.
        reading: of pixels, as the backbone takes them. Without either the images are found
            and looked through; `to_pixels` of what is returned is to be set before one is
            read.
        split, config_name, streaming: of a name or path; a data set in memory has its own.
        max_images: a random subset of this size, the same for the same seed. Every
            subset is equally likely; of a stream it is drawn on the way, from up to ten
            files at once and a buffer of `SHUFFLE_BUFFER` images.
        process, processes: whose share of a stream; images are shared out by samplers.

    Returns:
        The images, each ``{"pixel_values": (3, height, width), "skipped": [...]}`` with the
        (name, reason) of what was left out, and a `DataReport` as attribute ``report``.

    Raises:
        ImageError: nothing there, nothing readable, no such split or column, or items of
            a form that is not taken.
    """
    to_pixels = ToPixels(image_size, reading)
    report = DataReport("", None)
    if not isinstance(data, (str, Path)):
        _check_in_memory(split, config_name, streaming)
        if not isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
            return _open_indexed(data, to_pixels, image_column, max_images, seed)
        if isinstance(data, datasets.Dataset) and data.format["type"] == "custom":
            # Its transform is the user's: items are taken as it gives them.
            return _open_indexed(data, to_pixels, image_column, max_images, seed)
        table, name = data, _name_of(data)
        streaming = isinstance(data, datasets.IterableDataset)
    else:
        if not str(data).strip():
            raise ImageError(f"data is empty: give {SOURCES}.")
        path, name = Path(data).expanduser(), _short(str(data))
        if path.is_dir() and not holds_tables(path):
            if streaming:
                raise ImageError(f"{path.name}: a folder of images is not streamed.")
            for option, value, default in (
                ("data_config", config_name, None),
                ("image_column", image_column, "image"),
            ):
                if value != default:
                    raise unread(
                        option, value, path.name, "a folder of images has none"
                    )
            return _open_folder(path, split, to_pixels, max_images, seed)
        table = load_table(str(data), config_name, split, streaming, report)
    report.source = name
    _check_column(table, name, image_column)
    if streaming:
        if table.features is not None:
            table = table.cast_column(image_column, datasets.Image(decode=False))
        table = table.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        if max_images is not None:
            report.total = max_images + len(report.skipped)
        return RefinementStream(
            table, image_column, to_pixels, report, max_images, process, processes
        )
    if not len(table):
        raise ImageError(f"{name} has no rows: there is no image to train on.")
    opened = images_of_table(table, image_column, lambda row: f"{name}[{row}]")
    if max_images is not None:
        opened = opened.pick(subset(len(opened), max_images, seed))
    report.total = len(opened) + len(report.skipped)
    return RefinementImages(opened.names, opened.read, to_pixels, report)


def _check_in_memory(split: str, config_name: str | None, streaming: bool) -> None:
    given = {
        "data_split": split if split != "train" else None,
        "data_config": config_name,
        "streaming": streaming or None,
    }
    for name, value in given.items():
        if value is not None:
            raise ImageError(
                f"{name} is {value!r}, and the data set is in memory: choose the split, the "
                "configuration or an IterableDataset where it is loaded."
            )


def _check_column(table: Any, name: str, column: str) -> None:
    columns, features = table.column_names, table.features
    if columns is not None and column not in columns:
        raise ImageError(
            f"{name} has no column {column!r}; it has {', '.join(columns)}. "
            "Name one with image_column."
        )
    feature = None if features is None else features[column]
    taken = isinstance(feature, datasets.Image) or (
        isinstance(feature, datasets.Value) and feature.dtype in TEXT
    )
    # A struct of bytes and path is what an image looks like before it is cast.
    if feature is not None and not taken and not isinstance(feature, dict):
        raise FormError(f"Column {column!r} of {name} holds {feature}. {FORMS}")


def _open_indexed(
    data: Any, to_pixels: ToPixels, image_column: str, max_images: int | None, seed: int
) -> RefinementImages:
    """Anything that gives its items by number."""
    kind = type(data).__name__
    if isinstance(data, dict):  # a datasets.DatasetDict, too
        raise ImageError(
            f"The data set is a {kind} of {', '.join(map(str, data))}: give one of them, such "
            f"as data[{next(iter(data), 'train')!r}]."
        )
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise ImageError(
            f"The data set is a {kind}, which gives no image by its number: give {SOURCES}."
        )
    total = len(data)
    if not total:
        raise ImageError(f"{kind} holds no images: there is none to train on.")
    picked = list(range(total))
    if max_images is not None:
        picked = subset(total, max_images, seed)

    def read(number: int) -> Any:
        try:
            item = data[picked[number]]
        except DECODERS_RAISE as problem:
            with decoding(f"{kind}[{picked[number]}]"):
                raise problem
        return _image_of(item, kind, image_column)

    try:
        read(0)
    except FormError:
        raise
    except ImageError:
        pass  # one bad image: it is counted when its turn comes
    names = [f"{kind}[{number}]" for number in picked]
    return RefinementImages(names, read, to_pixels, DataReport(kind, len(picked)))


def _image_of(item: Any, kind: str, image_column: str) -> Any:
    """The image of an item of a torch `Dataset`."""
    if isinstance(item, dict):
        if image_column not in item:
            raise FormError(
                f"An item of {kind} has no {image_column!r}; it has "
                f"{', '.join(map(str, item))}. Name one with image_column."
            )
        item = item[image_column]
    elif image_column != "image":
        raise unread(
            "image_column", image_column, f"a {kind}", "its items have no names"
        )
    elif isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, (str, bytes, Path)):
        raise FormError(
            f"An item of {kind} holds a {type(item).__name__}: open it (PIL.Image.open), "
            "or name the folder."
        )
    if not isinstance(item, Image.Image):
        raise FormError(f"An item of {kind} holds a {type(item).__name__}. {FORMS}")
    return item


def _name_of(table: Any) -> str:
    """What a data set in memory is called: never a path."""
    info = table.info
    return str(info.dataset_name or info.builder_name or "a data set in memory")


def _open_folder(
    folder: Path, split: str, to_pixels: ToPixels, max_images: int | None, seed: int
) -> RefinementImages:
    opened = images_of_folder(folder, split)
    if max_images is not None:
        opened = opened.pick(subset(len(opened), max_images, seed))
    with ThreadPoolExecutor() as pool:
        problems = list(
            pool.map(
                _header_problem, map(opened.read, range(len(opened))), opened.names
            )
        )
    bad = {n: p for n, p in zip(opened.names, problems, strict=True) if p is not None}
    kept = [i for i, problem in enumerate(problems) if problem is None]
    if not kept:
        lines = " ".join(left_out_lines(bad)[:3])
        raise ImageError(
            f"{folder.name}: none of {len(opened)} images can be used. {lines}"
        )
    report = DataReport(
        source=folder.name,
        total=len(opened) + len(opened.left_out),
        skipped={**opened.left_out, **bad},
        passed_over=dict(opened.passed_over),
    )
    opened = opened.pick(kept)
    return RefinementImages(opened.names, opened.read, to_pixels, report)


def _header_problem(path: Path, name: str) -> str | None:
    """Why the file's header rules it out; decoding is left to training."""
    try:
        image_size(path, name)
    except ImageError as problem:
        return reason_of(problem, name)
    return None


def _short(data: str) -> str:
    """The folder's name or the data set's id, never a whole path."""
    path = Path(data).expanduser()
    return path.name if path.exists() else data


def subset(total: int, count: int, seed: int) -> list[int]:
    """Numbers of a random subset, sorted; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


def sample_images(
    dataset: RefinementImages | RefinementStream, count: int
) -> list[Tensor]:
    """Pixels of some images: evenly spaced in the data set, the first of a stream.

    The same on every process.
    """
    if isinstance(dataset, RefinementImages):
        count = min(count, len(dataset))
        numbers = [index * len(dataset) // count for index in range(count)]
        return [dataset[number]["pixel_values"] for number in numbers]
    return dataset.first(count)
