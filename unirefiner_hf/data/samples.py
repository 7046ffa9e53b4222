"""What a data set gives the trainer: pixels, and the names of what was skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import ImageError, load_rgb
from .left_out import reason_of
from .pixels import PixelReading
from .report import DataReport

Sample = dict[str, Any]


@dataclass(frozen=True)
class ToPixels:
    """Image to normalised pixels ``(3, height, width)``; unset until a backbone is known."""

    size: tuple[int, int] | None
    reading: PixelReading | None

    def __call__(self, source: Any, name: str) -> Tensor:
        assert self.size is not None and self.reading is not None
        return self.reading(load_rgb(source, name), self.size)


class RefinementImages(Dataset):
    """Images by number; one that turns out unreadable is replaced by the next.

    Batches keep their size that way, on every process. The replaced image stands in the
    sample's ``skipped``, as (name, reason), so nothing is left out in silence.
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
        skipped: list[tuple[str, str]] = []
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            name = self.names[number]
            try:
                pixels = self.to_pixels(self.read(number), name)
            except ImageError as problem:
                skipped.append((name, reason_of(problem, name)))
                continue
            return {"pixel_values": pixels, "skipped": skipped}
        first = ": ".join(skipped[0])
        raise ImageError(f"None of the {len(self)} images can be read: {first}")


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack the pixels; join what was skipped; where a stream's batch ends."""
    pixels = [torch.as_tensor(sample["pixel_values"]) for sample in samples]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    batch = {"pixel_values": torch.stack(pixels), "skipped": skipped}
    if "position" in samples[-1]:
        batch["position"] = samples[-1]["position"]
    return batch
