"""Images that are read while training, in an order that can be taken up again.

The order belongs to the run, not to the processes that happen to read it. A stream is
parted into lanes when the run starts: one for each process and each of its readers (the
workers of its loader). Batch ``g`` of the run, counted over all processes, is the next one of
lane ``g % processes, g // processes % readers``. Whoever continues the run, with however many
processes and readers, reads the same lanes and gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import fsspec
import fsspec.asyn
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as loader_worker

from ..modeling.errors import UniRefinerError
from .images import ImageError
from .left_out import reason_of
from .report import DataReport
from .samples import Sample, ToPixels
from .tables import source_of

Lane: TypeAlias = tuple[int, int]
"""A process and a reader of it, as they were when the run started."""


class StreamStateError(UniRefinerError):
    """A stream cannot go on from where a checkpoint says it was."""


@dataclass(frozen=True, order=True)
class StreamPosition:
    """How far a lane of a stream is.

    Attributes:
        epoch: passes over the stream that are complete.
        row: rows of this pass that were read, unusable ones included.
        process, reader: the lane.
        readers: of each process, when the run started.
    """

    epoch: int
    row: int
    process: int
    reader: int
    readers: int

    @property
    def lane(self) -> Lane:
        """Which one it is."""
        return self.process, self.reader


class RefinementStream(IterableDataset):
    """One process's share of a shuffled stream; unusable images are passed over.

    Each is named once, in the first pass, with the reader that met it and the row.

    A data set is shared out by its files where their number divides by the processes,
    else image by image. A pick of `max_images` is the same for any number of processes:
    each reads it all, and decodes every n-th image. Where a run goes on with more processes
    or readers than it started with, some share a lane: each decodes the whole of it, since
    only that tells which images can be used, and leaves the others' batches to them.

    Args:
        table: the shuffled stream.
        endless: start over at the end, in another order unless `max_images` is set.
            Processes then never run out of step, however their shares end.

    Attributes:
        shards: files the share is made of; more readers than that have nothing to do.
        batch: images the loader takes at once.
        taken: batches that were trained on, over all processes.
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
        self.whole = table
        self.process, self.processes = process, processes
        divides = table.num_shards % processes == 0 and max_images is None
        self.shards = table.num_shards // processes if divides else table.num_shards
        self.image_column = image_column
        self.to_pixels = to_pixels
        self.report = report
        self.fixed = max_images is not None
        self.endless = endless
        self.batch = 1
        self.taken = 0
        self.positions: dict[Lane, StreamPosition] = {}
        self._started: tuple[int, int] | None = None

    def state(self) -> dict[str, Any]:
        """Where the process is in the stream, as plain numbers."""
        return {
            "started": self._started,
            "batch": self.batch,
            "taken": self.taken,
            "lanes": [astuple(position) for position in self.positions.values()],
        }

    def resume(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on where all processes of a run were; rows before are read, not trained on.

        Raises:
            StreamStateError: batches of another size.
        """
        first = _of_today(states, self.batch)[0]
        if first["batch"] != self.batch:
            raise StreamStateError(
                f"The stream was read {first['batch']} images at once, this run takes "
                f"{self.batch}: keep per_device_train_batch_size, and change "
                "gradient_accumulation_steps."
            )
        self.taken = first["taken"]
        self._started = None if first["started"] is None else tuple(first["started"])
        lanes = sorted(
            StreamPosition(*lane)
            for state in _of_today(states, self.batch)
            for lane in state["lanes"]
        )
        # Of a shared lane, who took the last batch knows best.
        self.positions = {position.lane: position for position in lanes}

    def note(self, position: StreamPosition) -> None:
        """A batch that ends at this position has been trained on, as one of each process."""
        if self._started is None:
            self._started = (self.processes, position.readers)
        self.taken += self.processes
        self.positions[position.lane] = position

    def first(self, number: int) -> list[Tensor]:
        """Pixels of the stream's first images, the same on every process."""
        rows = (self._decode(row, str(n)) for n, row in enumerate(self.whole))
        found = (pixels for pixels in rows if isinstance(pixels, Tensor))
        return list(islice(found, number))

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        number, readers = (0, 1) if info is None else (info.id, info.num_workers)
        processes, parts = self._started or (self.processes, readers)
        taken = self.taken
        lanes: dict[Lane, _Batches] = {}
        # Loaders ask their workers in turn, and start with the first.
        for own in count(number, readers):
            turn, process = divmod(
                taken + own * self.processes + self.process, processes
            )
            index, reader = divmod(turn, parts)
            lane = process, reader
            if lane not in lanes:
                turns = max(0, -(-(taken - process) // processes))
                begin = max(0, -(-(turns - reader) // parts))
                samples = self._samples(lane, (processes, parts))
                lanes[lane] = _Batches(samples, self.batch, begin)
            batch = lanes[lane].get(index)
            yield from batch
            if len(batch) < self.batch:
                return

    def _samples(self, lane: Lane, started: tuple[int, int]) -> Iterator[Sample]:
        """Samples of a lane from where it was left."""
        process, reader = lane
        processes, readers = started
        # A table's epoch lies in memory that all readers share: a copy has one of its own.
        table = self.whole.with_format(None)
        every = processes
        if not self.fixed and processes > 1:
            table = split_dataset_by_node(table, process, processes)
            process, every = 0, 1
        start = self.positions.get(lane, StreamPosition(0, 0, *lane, readers))
        epoch, begin = start.epoch, start.row
        skipped: list[tuple[str, str]] = []
        while True:
            if not self.fixed:
                table.set_epoch(epoch)
            usable, failed = 0, "it is empty"
            for number, row in enumerate(_rows(table, reader, readers)):
                if number < begin or number % every != process:
                    continue
                name = self._name(row, number, lane)
                pixels = self._decode(row, name)
                if isinstance(pixels, str):
                    # A later pass meets the same images: each counts once.
                    if epoch == 0:
                        skipped.append((name, pixels))
                    failed = f"{name}: {pixels}"
                    continue
                usable += 1
                position = StreamPosition(epoch, number + 1, *lane, readers)
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

    def _name(self, row: dict[str, Any], number: int, lane: Lane) -> str:
        """What a row is called: its place, whoever reads it, and its file if it has one."""
        cell = row[self.image_column]
        file = cell.get("path") if isinstance(cell, dict) else None
        said = f"row {number} of reader {lane[1]} of process {lane[0]}"
        if isinstance(file, str):
            said = f"{Path(file).name}, {said}"
        return f"{self.report.source} ({said})"

    def _decode(self, row: dict[str, Any], name: str) -> Tensor | str:
        """The pixels, or what is wrong with them."""
        try:
            return self.to_pixels(source_of(row[self.image_column]), name)
        except ImageError as problem:
            return reason_of(problem, name)


class _Batches:
    """A lane's samples in batches, by number; those that are passed over go elsewhere."""

    def __init__(self, samples: Iterator[Sample], size: int, begin: int) -> None:
        self.samples, self.size, self.next = samples, size, begin

    def get(self, index: int) -> list[Sample]:
        """A batch that was not passed yet, shorter where the lane ends."""
        passed = list(islice(self.samples, (index - self.next) * self.size))
        batch = list(islice(self.samples, self.size))
        self.next = index + 1
        if batch and passed:
            known = [entry for sample in passed for entry in sample["skipped"]]
            batch[0] = {**batch[0], "skipped": known + batch[0]["skipped"]}
        return batch


def _rows(
    table: datasets.IterableDataset, reader: int, readers: int
) -> Iterator[dict[str, Any]]:
    """Rows of a table's share of a reader, whichever worker reads it."""
    rows = iter(table)
    with _as_worker(reader, readers):
        first = next(rows, None)  # datasets looks who asks when it starts
    if first is not None:
        yield first
        yield from rows


@contextmanager
def _as_worker(reader: int, readers: int) -> Iterator[None]:
    """Pass for a worker of a loader, by whose number datasets shares out."""
    before = loader_worker._worker_info
    passed: Any = None
    if readers > 1:
        about: dict[str, Any] = {"id": reader, "num_workers": readers, "seed": 0}
        about["dataset"] = None
        passed = loader_worker.WorkerInfo(**about)
    elif before is not None:
        fsspec.asyn.reset_lock()  # datasets does it where it knows of a worker
    loader_worker._worker_info = passed
    try:
        yield
    finally:
        loader_worker._worker_info = before


def _of_today(states: Sequence[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """States as this version writes them; earlier ones had a number a reader."""
    if all("lanes" in state for state in states):
        return list(states)
    readers = max(len(state["rows"]) for state in states)
    return [
        {
            "started": [len(states), readers],
            "batch": batch,
            "taken": state["taken"] * len(states),
            "lanes": [
                [*place, process, int(reader), readers]
                for reader, place in state["rows"].items()
            ],
        }
        for process, state in enumerate(states)
    ]
