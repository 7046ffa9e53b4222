"""The training images: folders, local data sets and the Hub, through one option."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .images import MIN_SIDE, ImageError, list_images, load_rgb, preprocess

Sample = dict[str, Any]
SHUFFLE_BUFFER = 1000
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


@dataclass(frozen=True)
class StreamPosition:
    """How far one reader of a stream is.

    Attributes:
        reader: number of the reader among those of its process.
        epoch: passes over the stream that are complete.
        row: rows of this pass that were read, unusable ones included.
    """

    reader: int
    epoch: int
    row: int


class RefinementStream(IterableDataset):
    """One process's share of a shuffled stream; unusable images are passed over.

    A data set is shared out by its files where their number divides by the processes,
    else image by image. A pick of `max_images` is the same for any number of processes:
    each reads it all, and decodes every n-th image.

    Args:
        table: the shuffled stream.
        endless: start over at the end, in another order unless `max_images` is set.
            Processes then never run out of step, however their shares end.

    Attributes:
        shards: files the share is made of; more readers than that have nothing to do.
    """

    def __init__(
        self,
        table: datasets.IterableDataset,
        image_column: str,
        to_pixels: ToPixels,
        report: DataReport,
        max_images: int | None = None,
        process: int = 0,
        processes: int = 1,
        endless: bool = False,
    ) -> None:
        if max_images is not None:
            table = table.take(max_images)
        self.whole = self.table = table
        self.share = (process, processes)
        if max_images is None and processes > 1:
            self.table = split_dataset_by_node(table, process, processes)
            self.share = (0, 1)
        divides = table.num_shards % processes == 0 and max_images is None
        self.shards = table.num_shards // processes if divides else table.num_shards
        self.image_column = image_column
        self.to_pixels = to_pixels
        self.report = report
        self.fixed = max_images is not None
        self.endless = endless
        self.taken = 0
        self.positions: dict[int, StreamPosition] = {}

    def state(self) -> dict[str, Any]:
        """Where the process is in the stream, as plain numbers."""
        rows = {str(p.reader): [p.epoch, p.row] for p in self.positions.values()}
        return {"taken": self.taken, "rows": rows}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; rows before it are read, not decoded."""
        self.taken = state["taken"]
        self.positions = {
            int(reader): StreamPosition(int(reader), epoch, row)
            for reader, (epoch, row) in state["rows"].items()
        }

    def note(self, position: StreamPosition) -> None:
        """A batch that ends at this position has been trained on."""
        self.taken += 1
        self.positions[position.reader] = position

    def first(self, count: int) -> list[Tensor]:
        """Pixels of the stream's first images, the same on every process."""
        rows = (self._decode(row, n) for n, row in enumerate(self.whole))
        found = (pixels for pixels in rows if isinstance(pixels, Tensor))
        return list(islice(found, count))

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        readers = 1 if info is None else info.num_workers
        # Loaders ask their workers in turn, and start with the first again after a
        # resume: it then reads for the one whose turn it is.
        reader = (self.taken + (0 if info is None else info.id)) % readers
        if info is not None:
            object.__setattr__(info, "id", reader)  # datasets shares out by it
        start = self.positions.get(reader, StreamPosition(reader, 0, 0))
        epoch, begin = start.epoch, start.row
        skipped: list[str] = []
        process, processes = self.share
        while True:
            if not self.fixed:
                self.table.set_epoch(epoch)
            usable = 0
            for number, row in enumerate(self.table):
                if number < begin or number % processes != process:
                    continue
                pixels = self._decode(row, number)
                if isinstance(pixels, str):
                    skipped.append(pixels)
                    continue
                usable += 1
                position = StreamPosition(reader, epoch, number + 1)
                yield {
                    "pixel_values": pixels,
                    "skipped": skipped,
                    "position": position,
                }
                skipped = []
            if not self.endless:
                return
            if not usable and not begin:
                reason = skipped[0] if skipped else "it is empty"
                raise ImageError(
                    f"{self.report.source}: no image of the stream can be used: {reason}"
                )
            epoch, begin = epoch + 1, 0

    def _decode(self, row: dict[str, Any], number: int) -> Tensor | str:
        """The pixels, or what is wrong with them."""
        name = f"{self.report.source} (number {number} of the stream)"
        try:
            return self.to_pixels(source_of(row[self.image_column]), name)
        except ImageError as problem:
            return str(problem)


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack the pixels; join the names of what was skipped; where a stream's batch ends."""
    pixels = [torch.as_tensor(sample["pixel_values"]) for sample in samples]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    batch = {"pixel_values": torch.stack(pixels), "skipped": skipped}
    if "position" in samples[-1]:
        batch["position"] = samples[-1]["position"]
    return batch


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
    process: int = 0,
    processes: int = 1,
) -> RefinementImages | RefinementStream:
    """Open the images `data` names.

    Args:
        data: an image folder, a parquet, arrow or WebDataset file or a folder of them, a
            folder saved by `datasets`, or a Hub id.
        image_size: height and width in pixels.
        max_images: a random subset of this size, the same for the same seed. Every
            subset is equally likely; of a stream it is drawn on the way, from up to ten
            files at once and a buffer of `SHUFFLE_BUFFER` images.
        process, processes: whose share of a stream; images are shared out by samplers.

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
        table = table.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        report = DataReport(_short(data), max_images)
        return RefinementStream(
            table, image_column, to_pixels, report, max_images, process, processes
        )
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
