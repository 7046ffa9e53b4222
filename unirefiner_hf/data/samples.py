"""What a data set gives the trainer: pixels, and the names of what was skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import ImageError, load_rgb, preprocess

Sample = dict[str, Any]


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
    """Stack the pixels; join the names of what was skipped; where a stream's batch ends."""
    pixels = [torch.as_tensor(sample["pixel_values"]) for sample in samples]
    skipped = [entry for sample in samples for entry in sample["skipped"]]
    batch = {"pixel_values": torch.stack(pixels), "skipped": skipped}
    if "position" in samples[-1]:
        batch["position"] = samples[-1]["position"]
    return batch
