"""The register frame: put round the image's pixels, taken off its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

FILLS = ("zero", "randn", "rand", "learnable")


def frame_pixels(
    pixel_values: Tensor,
    width: int,
    patch_size: int,
    fill: str,
    *,
    generator: torch.Generator | None = None,
    patch: Tensor | None = None,
) -> Tensor:
    """Put a frame of register patches round normalised images (paper, register regions).

    Args:
        pixel_values: ``(batch, 3, height, width)``.
        width: frame in patches; 0 returns the images themselves.
        patch_size: pixels a patch.
        fill: ``"zero"``, ``"randn"`` (standard normal), ``"rand"`` (uniform in [0, 1)) or
            ``"learnable"`` (`patch` repeated over the frame).
        generator: source of the random fills, on the CPU; None takes the global one.
            One frame is drawn for the whole batch.
        patch: ``(3, patch_size, patch_size)`` for ``"learnable"``.

    Returns:
        ``(batch, 3, height + 2 * width * patch_size, ...)``.

    Raises:
        ValueError: the fill is unknown, the width negative, or the patch missing.
    """
    if fill not in FILLS:
        raise ValueError(f"Unknown register fill {fill!r}: use one of {', '.join(FILLS)}.")
    if width < 0:
        raise ValueError(f"register_width is {width}; it must be 0 or more patches.")
    if width == 0:
        return pixel_values
    batch, channels, rows, columns = pixel_values.shape
    border = width * patch_size
    rows, columns = rows + 2 * border, columns + 2 * border
    if fill == "zero":
        frame = pixel_values.new_zeros(1, channels, rows, columns)
    elif fill == "learnable":
        if patch is None:
            raise ValueError("The learnable frame needs its patch.")
        frame = patch.to(pixel_values).repeat(1, rows // patch_size, columns // patch_size)
        frame = frame.unsqueeze(0)
    else:
        draw = torch.randn if fill == "randn" else torch.rand
        frame = draw(1, channels, rows, columns, generator=generator).to(pixel_values)
    framed = frame.expand(batch, -1, -1, -1).clone()
    framed[..., border : rows - border, border : columns - border] = pixel_values
    return framed


def register_mask(grid: tuple[int, int], width: int) -> Tensor:
    """Which tokens of the framed grid are registers.

    Args:
        grid: rows and columns of the image, in patches.
        width: frame in patches.

    Returns:
        ``((rows + 2 * width) * (columns + 2 * width),)`` bool in raster order.
    """
    rows, columns = grid
    mask = torch.ones(rows + 2 * width, columns + 2 * width, dtype=torch.bool)
    mask[width : width + rows, width : width + columns] = False
    return mask.flatten()


def split_frame(tokens: Tensor, grid: tuple[int, int], width: int) -> tuple[Tensor, Tensor]:
    """Divide the tokens of a framed image into image and register tokens.

    Args:
        tokens: ``(batch, framed patches, channels)`` in raster order.
        grid: rows and columns of the image, in patches.
        width: frame in patches.

    Returns:
        ``(batch, rows * columns, channels)`` and ``(batch, registers, channels)``, both
        in raster order.
    """
    rows, columns = grid
    framed = tokens.unflatten(1, (rows + 2 * width, columns + 2 * width))
    image = framed[:, width : width + rows, width : width + columns].flatten(1, 2)
    registers = register_mask(grid, width).nonzero().flatten().to(tokens.device)
    return image, tokens.index_select(1, registers)
