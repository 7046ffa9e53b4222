"""Composites: an image with a strip of the unrelated reference glued to one side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDES = ("left", "top", "right", "bottom")


def strip_width(patches: int, ratio: float = 0.35) -> int:
    """Patches of reference glued to a crop `patches` wide: rounded down, made even."""
    width = math.floor(ratio * patches)
    return max(2, width + width % 2)


def draw_side() -> str:
    """The side the strip goes to, drawn once per batch."""
    return SIDES[int(torch.randint(len(SIDES), ()))]


def add_strip(
    crops: Tensor, reference: Tensor, side: str, patch_size: int, ratio: float = 0.35
) -> Tensor:
    """Glue a strip of the reference image to one side of each crop (composite).

    The strip is taken from the same side of the reference.

    Args:
        crops: ``(batch, 3, height, width)``.
        reference: ``(1, 3, height, width)``.
        side: one of `SIDES`.

    Returns:
        The composite, wider or higher than the crop by `strip_width` patches.

    Raises:
        ValueError: crops and reference differ in size, or the side is unknown.
    """
    if crops.shape[-2:] != reference.shape[-2:]:
        raise ValueError(
            f"The reference is {tuple(reference.shape[-2:])} pixels, the crops are "
            f"{tuple(crops.shape[-2:])}: resize the reference first."
        )
    if side not in SIDES:
        raise ValueError(f"Unknown side {side!r}: use one of {', '.join(SIDES)}.")
    dim = 3 if side in ("left", "right") else 2
    extent = crops.shape[dim]
    width = strip_width(extent // patch_size, ratio) * patch_size
    start = 0 if side in ("left", "top") else extent - width
    strip = reference.narrow(dim, start, width).expand(crops.shape[0], -1, -1, -1)
    parts = (strip, crops) if side in ("left", "top") else (crops, strip)
    return torch.cat(parts, dim=dim)


def split_strip(
    tokens: Tensor, grid: tuple[int, int], side: str, ratio: float = 0.35
) -> tuple[Tensor, Tensor]:
    """Divide a composite's tokens into those of the crop and of the strip.

    Args:
        tokens: ``(batch, composite patches, channels)`` in raster order.
        grid: rows and columns of the crop, without the strip.

    Returns:
        Crop tokens ``(batch, patches, channels)`` and strip tokens
        ``(batch, strip patches, channels)``, both in raster order.
    """
    rows, columns = grid
    if side in ("left", "right"):
        width = strip_width(columns, ratio)
        maps, dim = tokens.unflatten(1, (rows, columns + width)), 2
    else:
        width = strip_width(rows, ratio)
        maps, dim = tokens.unflatten(1, (rows + width, columns)), 1
    extent = maps.shape[dim] - width
    if side in ("left", "top"):
        strip, crop = maps.split((width, extent), dim=dim)
    else:
        crop, strip = maps.split((extent, width), dim=dim)
    return crop.flatten(1, 2), strip.flatten(1, 2)
