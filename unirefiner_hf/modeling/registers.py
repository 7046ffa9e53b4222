"""Register regions: a frame of patches round the image, and taking it off again.

UniRefiner (arXiv 2605.19622): a frame of R patches turns a grid of ``h x w`` patches
into ``(h + 2R) x (w + 2R)``. Tokens of the frame are the registers; no parameter is
added. Everything here counts in raster order: row by row, left to right.

PH-Reg (arXiv 2505.21501) has register tokens instead: parameters that join the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import UniRefinerError

FILLS = ("zero", "randn", "rand", "learnable")
WIDEST = 256
"""Patches of the widest border; published ones have 1 to 4."""


def check_width(width: int) -> None:
    """Refuse the width of a border.

    Raises:
        UniRefinerError: no whole number from 0 to `WIDEST`.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 0:
        raise UniRefinerError(
            f"register_width is {width!r}; it must be 0 or more patches."
        )
    if width > WIDEST:
        raise UniRefinerError(
            f"register_width is {width}; it must be {WIDEST} patches at most."
        )


def frame_pixels(
    pixel_values: Tensor,
    width: int,
    patch_size: int,
    fill: str,
    *,
    generator: torch.Generator | None = None,
    patch: Tensor | None = None,
) -> Tensor:
    """Put a frame of `width` patches round every image of a batch.

    Args:
        pixel_values: ``(batch, 3, height, width)``, pixels, normalised.
        width: width of the frame in patches; 0 returns `pixel_values` itself.
        patch_size: side of a patch in pixels.
        fill: ``zero``; ``randn``, N(0, 1); ``rand``, uniform in [0, 1);
            ``learnable``, `patch` tiled. In normalised space.
        generator: CPU generator for ``randn`` and ``rand``. One float32 frame is drawn
            on the CPU and shared by the batch, so it depends on the generator and the
            image size only. None draws a frame per image from the global generator
            of the device.
        patch: ``(3, patch_size, patch_size)``, for ``learnable``.

    Returns:
        ``(batch, 3, height + 2 * width * patch_size, width + 2 * width * patch_size)``
        in the dtype and on the device of `pixel_values`.

    Raises:
        UniRefinerError: a negative width, an unknown fill, or ``learnable`` without patch.
    """
    check_width(width)
    if fill not in FILLS:
        raise UniRefinerError(
            f"register_fill is {fill!r}; choose one of {', '.join(FILLS)}."
        )
    if width == 0:
        return pixel_values
    margin = width * patch_size
    framed = functional.pad(pixel_values, (margin, margin, margin, margin))
    if fill == "zero":
        return framed
    batch, channels, rows, columns = framed.shape
    if fill == "learnable":
        if patch is None:
            raise UniRefinerError("register_fill 'learnable' needs a patch to tile.")
        filling = patch.repeat(1, rows // patch_size, columns // patch_size)
    else:
        draw = torch.randn if fill == "randn" else torch.rand
        if generator is None:
            filling = draw(
                batch, channels, rows, columns, dtype=framed.dtype, device=framed.device
            )
        else:
            filling = draw(channels, rows, columns, generator=generator)
    outside = torch.ones(rows, columns, dtype=torch.bool, device=framed.device)
    outside[margin:-margin, margin:-margin] = False
    return torch.where(outside, filling.to(framed), framed)


def register_mask(grid: tuple[int, int], width: int) -> Tensor:
    """Which tokens of a framed grid are registers.

    Args:
        grid: ``(h, w)``, the image in patches, without the frame.
        width: width of the frame in patches.

    Returns:
        ``((h + 2 * width) * (w + 2 * width),)`` bool in raster order, True = register.

    Raises:
        UniRefinerError: a negative width.
    """
    check_width(width)
    h, w = grid
    mask = torch.ones(h + 2 * width, w + 2 * width, dtype=torch.bool)
    bottom, right = width + h, width + w
    mask[width:bottom, width:right] = False
    return mask.flatten()


def split_frame(
    tokens: Tensor, grid: tuple[int, int], width: int
) -> tuple[Tensor, Tensor]:
    """Part image tokens from register tokens.

    Args:
        tokens: ``(batch, (h + 2 * width) * (w + 2 * width), channels)``.
        grid: ``(h, w)``, the image in patches, without the frame.
        width: width of the frame in patches.

    Returns:
        Image tokens ``(batch, h * w, channels)`` and register tokens
        ``(batch, registers, channels)``, both in raster order.

    Raises:
        ValueError: the number of tokens is not that of the framed grid.
    """
    h, w = grid
    rows, columns = h + 2 * width, w + 2 * width
    if tokens.shape[1] != rows * columns:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not make a grid of {h} x {w} patches with a "
            f"frame of {width}: that has {rows} x {columns} = {rows * columns} tokens."
        )
    bottom, right = width + h, width + w
    cells = tokens.unflatten(1, (rows, columns))
    middle = cells[:, width:bottom]
    image = middle[:, :, width:right]
    sides = torch.cat([middle[:, :, :width], middle[:, :, right:]], dim=2)
    frame = [cells[:, :width], sides, cells[:, bottom:]]
    return image.flatten(1, 2), torch.cat([part.flatten(1, 2) for part in frame], dim=1)


class JoiningTokens:
    """A forward hook that puts a model's register tokens behind the patches.

    They get no position embedding. Attention does not ask where a token stands, so before
    the CLS token (PH-Reg's DINOv2) they would do the same.

    It stays on the module for good: one that came and went with every pass would not be
    seen by `torch.export` and `torch.compile`, and would be doubled by two threads.

    Args:
        owner: the model; its ``joining_tokens()``, ``(registers, hidden)`` or None, are
            looked up at each call.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @classmethod
    def put_on(cls, module: nn.Module, owner: Any) -> None:
        """Hook a module, once.

        Args:
            module: its output goes to the layers: ``(batch, tokens, hidden)``, alone or
                first of a tuple.
        """
        for hook in module._forward_hooks.values():
            if isinstance(hook, cls) and hook.owner is owner:
                return
        module.register_forward_hook(cls(owner))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens = self.owner.joining_tokens()
        if tokens is None:
            return output
        embedded = output[0] if isinstance(output, tuple) else output
        registers = tokens.to(embedded).expand(len(embedded), -1, -1)
        longer = torch.cat([embedded, registers], dim=1)
        return (longer, *output[1:]) if isinstance(output, tuple) else longer
