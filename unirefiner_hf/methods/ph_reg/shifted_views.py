"""PH-Reg's views: the image moved by whole patches and mirrored, and the way back.

Source: arXiv 2505.21501, section 3, and the authors' release. Offsets are rows and columns of
patches; a view holds at ``(y, x)`` what the image holds at ``(y, x) + offset``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """How one view is made: moved by `offset` patches, then mirrored if `flip`."""

    offset: tuple[int, int]
    flip: bool


def draw_views(
    count: int,
    grid: tuple[int, int],
    random: np.random.Generator,
    *,
    shift: float = 0.15,
    candidates: int = 100,
    flip: float = 0.5,
) -> list[View]:
    """Offsets far from each other, out of many drawn uniformly; the first is no view at all.

    Farthest-point sampling keeps `count` of `candidates` offsets within
    ``round(shift * grid)`` patches; the first kept gives way to the identity.

    Args:
        grid: rows and columns of patches.
        flip: probability that a view is mirrored.
    """
    reach = [round(shift * side) for side in grid]
    drawn = np.stack(
        [random.integers(-r, r, candidates, endpoint=True) for r in reach], axis=1
    )
    views = [View((0, 0), False)]
    distance = np.full(candidates, np.inf)
    chosen = drawn[random.integers(candidates)]
    for _ in range(count - 1):
        distance = np.minimum(distance, ((drawn - chosen) ** 2).sum(axis=1))
        chosen = drawn[distance.argmax()]
        offset = int(chosen[0]), int(chosen[1])
        views.append(View(offset, bool(random.random() < flip)))
    return views


def make_view(pixels: Tensor, view: View, patch_size: int, white: Tensor) -> Tensor:
    """One view of an image ``(3, height, width)``; what moved out of sight is white.

    Args:
        white: ``(3,)``, in the space of the pixels.
    """
    target, source = _windows(view.offset, tuple(pixels.shape[-2:]), patch_size)
    moved = white.to(pixels)[:, None, None].expand_as(pixels).clone()
    moved[:, target[0], target[1]] = pixels[:, source[0], source[1]]
    return moved.flip(-1) if view.flip else moved


def mean_over_views(
    tokens: Tensor, views: Sequence[View], grid: tuple[int, int]
) -> Tensor:
    """Put the tokens of an image's views back and average them where a view has any.

    Args:
        tokens: ``(views, patches, channels)`` in raster order.

    Returns:
        ``(patches, channels)``; the first view reaches every place.
    """
    maps = tokens.unflatten(1, grid)
    total = torch.zeros_like(maps[0])
    count = total.new_zeros((*grid, 1))
    for cells, view in zip(maps, views, strict=True):
        if view.flip:
            cells = cells.flip(1)
        target, source = _windows(view.offset, grid)
        total[source] += cells[target]
        count[source] += 1
    return (total / count).flatten(0, 1)


def _windows(
    offset: tuple[int, int], size: tuple[int, ...], unit: int = 1
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a view shows something, and where in the image that is."""
    target, source = [], []
    for move, length in zip(offset, size, strict=True):
        move *= unit
        low, high = max(0, move), min(length, length + move)
        source.append(slice(low, high))
        target.append(slice(low - move, high - move))
    return (target[0], target[1]), (source[0], source[1])
