"""The training images: folders, local data sets and the Hub, through one option."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..images import MIN_SIDE, ImageError, list_images, load_rgb, preprocess

Sample = dict[str, Any]
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


@dataclass
class DataReport:
    """What was found and what was left out.

    Attributes:
        source: the folder's name or the data set's id, never a whole path.
        total: images found; None where a stream does not tell.
        skipped: name -> reason of the images left out so far.
    """

    source: str
    total: int | None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> int | None:
        """Images that are trained on."""
        return None if self.total is None else self.total - len(self.skipped)


@dataclass(frozen=True)
class ToPixels:
    """Image to normalised pixels ``(3, height, width)``."""

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, source: Any, name: str) -> Tensor:
        return preprocess(load_rgb(source, name), self.size, self.mean, self.std)


class RefinementImages(Dataset):
    """Images by number; one that turns out unreadable is replaced by the next.

    Batches keep their size that way, on every process. The replaced image is named in the
    sample's ``skipped``, so nothing is left out in silence.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], Any],
        to_pixels: ToPixels,
        report: DataReport,
    ) -> None:
        self.names = names
        self.report = report
        self.read = read
        self.to_pixels = to_pixels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        skipped: list[str] = []
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            try:
                pixels = self.to_pixels(self.read(number), self.names[number])
            except ImageError as problem:
                skipped.append(str(problem))
                continue
            return {"pixel_values": pixels, "skipped": skipped}
        raise ImageError(f"None of the {len(self)} images can be read: {skipped[0]}")


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack the pixels; join the names of what was skipped."""
    pixels = [torch.as_tensor(sample["pixel_values"]) for sample in samples]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    return {"pixel_values": torch.stack(pixels), "skipped": skipped}


def build_dataset(
    data: str,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> RefinementImages | datasets.IterableDataset:
    """Open the images `data` names.

    Args:
        data: an image folder, a parquet, arrow or WebDataset file or a folder of them, a
            folder saved by `datasets`, or a Hub id.
        image_size: height and width in pixels.
        max_images: a random subset of this size, the same for the same seed.

    Returns:
        The images, each ``{"pixel_values": (3, height, width), "skipped": [names]}``, with
        a `DataReport` as attribute ``report``.

    Raises:
        ImageError: nothing there, nothing readable, or no such split or column.
    """
    to_pixels = ToPixels(image_size, tuple(mean), tuple(std))
    path = Path(data).expanduser()
    if path.is_dir() and _builder(path) is None and not _is_saved(path):
        if streaming:
            raise ImageError(f"{path.name}: a folder of images is not streamed.")
        return _open_folder(path, to_pixels, max_images, seed)
    table = load_table(data, path, config_name, split, streaming)
    columns = table.column_names
    if columns is not None and image_column not in columns:
        raise ImageError(
            f"{_short(data)} has no column {image_column!r}; it has {', '.join(columns)}. "
            "Name one with image_column."
        )
    if table.features is not None:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    if streaming:
        return _open_stream(table, data, image_column, to_pixels, max_images, seed)
    table = table.select_columns([image_column])
    if max_images is not None:
        table = table.select(_subset(len(table), max_images, seed))
    names = [f"{_short(data)}[{number}]" for number in range(len(table))]

    def read(number: int) -> Any:
        return source_of(table[number][image_column])

    report = DataReport(_short(data), len(table))
    return RefinementImages(names, read, to_pixels, report)


def _open_folder(
    folder: Path, to_pixels: ToPixels, max_images: int | None, seed: int
) -> RefinementImages:
    paths = list_images(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    if max_images is not None:
        picked = _subset(len(paths), max_images, seed)
        paths, names = [paths[i] for i in picked], [names[i] for i in picked]
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(_header_problem, paths))
    skipped = {n: p for n, p in zip(names, problems, strict=True) if p is not None}
    kept = [i for i, problem in enumerate(problems) if problem is None]
    if not kept:
        listed = "; ".join(
            f"{name}: {reason}" for name, reason in list(skipped.items())[:3]
        )
        raise ImageError(
            f"{folder.name}: none of {len(names)} images can be used. {listed}"
        )
    report = DataReport(folder.name, len(names), skipped)
    files = [paths[i] for i in kept]
    names = [names[i] for i in kept]
    return RefinementImages(names, files.__getitem__, to_pixels, report)


def _header_problem(path: Path) -> str | None:
    """Why the file's header rules it out; decoding is left to training."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as problem:
        return f"not an image ({type(problem).__name__})"
    if min(width, height) < MIN_SIDE:
        return f"{width}x{height} pixels, shorter than {MIN_SIDE}"
    return None


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _builder(path: Path) -> str | None:
    """The `datasets` builder of a file, or of the first such file in a folder."""
    if path.is_file():
        return BUILDERS.get(path.suffix)
    found = {p.suffix for p in path.rglob("*") if p.suffix in BUILDERS}
    return BUILDERS[sorted(found)[0]] if found else None


def load_table(
    data: str, path: Path, config_name: str | None, split: str, streaming: bool
) -> Any:
    if path.exists():
        if _is_saved(path):
            table = datasets.load_from_disk(str(path))
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise ImageError(
                        f"{path.name} has no split {split!r}; it has {', '.join(table)}."
                    )
                table = table[split]
            return table.to_iterable_dataset() if streaming else table
        builder = _builder(path)
        if builder is None:
            raise ImageError(
                f"{path.name}: not a folder, nor one of {', '.join(BUILDERS)} files."
            )
        suffix = next(key for key, value in BUILDERS.items() if value == builder)
        files = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
        names = [str(file) for file in files]
        return datasets.load_dataset(
            builder, data_files={"train": names}, split="train", streaming=streaming
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data) or data.startswith("."):
        raise ImageError(f"{data}: there is no such folder or file.")
    try:
        return datasets.load_dataset(
            data, config_name, split=split, streaming=streaming
        )
    except ValueError as problem:
        raise ImageError(f"{data}: {problem}") from None
    except (FileNotFoundError, ConnectionError) as problem:
        raise ImageError(
            f"{data} is neither here nor to be had from the Hub: {problem}"
        ) from None


def _open_stream(
    table: Any,
    data: str,
    image_column: str,
    to_pixels: ToPixels,
    max_images: int | None,
    seed: int,
) -> datasets.IterableDataset:
    report = DataReport(_short(data), max_images)
    table = table.shuffle(seed=seed, buffer_size=1000)
    if max_images is not None:
        table = table.take(max_images)
    pending: list[str] = []

    def convert(
        batch: dict[str, list[Any]], indices: list[int]
    ) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"pixel_values": [], "skipped": []}
        for value, number in zip(batch[image_column], indices, strict=True):
            try:
                pixels = to_pixels(
                    source_of(value), f"{report.source} (number {number} of the stream)"
                )
            except ImageError as problem:
                pending.append(str(problem))
                continue
            out["pixel_values"].append(pixels.numpy())
            out["skipped"].append(list(pending))
            pending.clear()
        return out

    columns = table.column_names or [image_column]
    stream = table.map(
        convert, batched=True, batch_size=1, with_indices=True, remove_columns=columns
    )
    stream.report = report
    return stream


def source_of(value: Any) -> Any:
    """What `load_rgb` takes of a cell: bytes, a path, an image or an array."""
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, (list, np.ndarray)):
        return Image.fromarray(np.asarray(value, dtype=np.uint8))
    if value is None:
        raise ImageError("an empty cell.")
    return value


def _short(data: str) -> str:
    path = Path(data).expanduser()
    return path.name if path.exists() else data


def _subset(total: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


def sample_images(
    dataset: RefinementImages | datasets.IterableDataset, count: int
) -> list[Tensor]:
    """Pixels of some images: evenly spaced in the data set, the first of a stream."""
    if isinstance(dataset, RefinementImages):
        count = min(count, len(dataset))
        numbers = [index * len(dataset) // count for index in range(count)]
        return [dataset[number]["pixel_values"] for number in numbers]
    return [torch.as_tensor(sample["pixel_values"]) for sample in dataset.take(count)]
