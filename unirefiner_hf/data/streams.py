"""Images that are read while training, in an order that can be taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .images import ImageError
from .left_out import reason_of
from .report import DataReport
from .samples import Sample, ToPixels
from .tables import source_of


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

    Each is named once, in the first pass, with the reader that met it and the row.

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
        self.process, self.share = process, (process, processes)
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
        rows = (self._decode(row, str(n)) for n, row in enumerate(self.whole))
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
        skipped: list[tuple[str, str]] = []
        process, processes = self.share
        while True:
            if not self.fixed:
                self.table.set_epoch(epoch)
            usable, failed = 0, "it is empty"
            for number, row in enumerate(self.table):
                if number < begin or number % processes != process:
                    continue
                name = self._name(row, f"row {number} of reader {reader}")
                pixels = self._decode(row, name)
                if isinstance(pixels, str):
                    # A later pass meets the same images: each counts once.
                    if epoch == 0:
                        skipped.append((name, pixels))
                    failed = f"{name}: {pixels}"
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
                raise ImageError(
                    f"{self.report.source}: no image of the stream can be used: {failed}"
                )
            epoch, begin = epoch + 1, 0

    def _name(self, row: dict[str, Any], place: str) -> str:
        """What a row is called: where it was met, and its file's name if it has one."""
        cell = row[self.image_column]
        file = cell.get("path") if isinstance(cell, dict) else None
        said = f"{place} of process {self.process}"
        if isinstance(file, str):
            said = f"{Path(file).name}, {said}"
        return f"{self.report.source} ({said})"

    def _decode(self, row: dict[str, Any], name: str) -> Tensor | str:
        """The pixels, or what is wrong with them."""
        try:
            return self.to_pixels(source_of(row[self.image_column]), name)
        except ImageError as problem:
            return reason_of(problem, name)
