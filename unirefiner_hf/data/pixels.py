"""From RGB to the pixels a backbone takes: one reading for all that show it images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class PixelReading:
    """How a backbone's image processor brings an image to numbers.

    Whatever the processor does (normalise or not, rescale by any factor or not) is one
    subtraction and one division of values in [0, 1].

    Attributes:
        mean, std: of each channel, for values in [0, 1].
        resample: how images are resized.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Resize an RGB image to exactly `size` and normalise it.

        Args:
            size: height and width in pixels.

        Returns:
            ``(3, height, width)`` float32.
        """
        height, width = size
        resized = image.resize((width, height), self.resample)
        return self.normalised(np.asarray(resized))

    def normalised(self, values: np.ndarray) -> Tensor:
        """``(height, width, 3)`` in [0, 255] to ``(3, height, width)`` float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(values, np.float32) / 255)
        pixels = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return pixels.permute(2, 0, 1).contiguous()

    def denormalised(self, pixel_values: Tensor) -> np.ndarray:
        """``(..., 3, height, width)`` back to uint8 ``(..., height, width, 3)``."""
        pixels = pixel_values.detach().float().cpu().movedim(-3, -1)
        pixels = pixels * torch.tensor(self.std) + torch.tensor(self.mean)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
