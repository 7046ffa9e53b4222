"""The views of one training step: crops of the images and of their tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def propose_crops(
    images: int,
    crops: int,
    area: tuple[float, float] = (0.25, 0.5),
    max_aspect: float = 1.5,
) -> Tensor:
    """Draw crop boxes from the global random state (paper, crop proposals).

    Area uniform in `area` (share of the image), aspect ratio log-uniform in
    ``[1/max_aspect, max_aspect]``, centre uniform and then moved so that the box
    lies inside the image.

    Returns:
        ``(images, crops, 4)`` boxes x0, y0, x1, y1 in [0, 1], float32.
    """
    shape = (images, crops)
    areas = torch.empty(shape).uniform_(*area)
    limit = math.log(max_aspect)
    aspects = torch.empty(shape).uniform_(-limit, limit).exp()
    widths = (areas * aspects).sqrt().clamp(max=1.0)
    heights = (areas / aspects).sqrt().clamp(max=1.0)
    x0 = (torch.rand(shape) - widths / 2).clamp(min=0.0).minimum(1 - widths)
    y0 = (torch.rand(shape) - heights / 2).clamp(min=0.0).minimum(1 - heights)
    return torch.stack((x0, y0, x0 + widths, y0 + heights), dim=-1)


def crop_maps(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample the boxes of maps onto a grid: RoIAlign with one sample per bin.

    Bilinear and aligned; equal to RoIAlign wherever a bin is at most one cell of the
    map wide, which holds for crops resampled to their image's own size.

    Args:
        maps: ``(batch, channels, height, width)``.
        boxes: ``(batch, crops, 4)`` x0, y0, x1, y1 in [0, 1].
        size: height and width of the result.

    Returns:
        ``(batch * crops, channels, *size)``, the crops of an image side by side.
    """
    batch, crops, _ = boxes.shape
    height, width = size
    boxes = boxes.to(maps)
    x0, y0, x1, y1 = (edge.reshape(-1, 1) for edge in boxes.unbind(dim=-1))
    columns = (torch.arange(width, device=maps.device) + 0.5) / width
    rows = (torch.arange(height, device=maps.device) + 0.5) / height
    xs = (x0 + (x1 - x0) * columns).unsqueeze(1).expand(-1, height, -1)
    ys = (y0 + (y1 - y0) * rows).unsqueeze(2).expand(-1, -1, width)
    grid = torch.stack((xs, ys), dim=-1) * 2 - 1
    return functional.grid_sample(
        maps.repeat_interleave(crops, dim=0),
        grid.to(maps.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def crop_tokens(tokens: Tensor, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """Tokens of each crop, sampled from the image's tokens onto the full grid.

    Args:
        tokens: ``(batch, patches, channels)`` in raster order.
        grid: rows and columns of patches.
        boxes: ``(batch, crops, 4)``.

    Returns:
        ``(batch * crops, patches, channels)``, not renormalised.
    """
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    return crop_maps(maps, boxes, grid).flatten(2).transpose(1, 2)
