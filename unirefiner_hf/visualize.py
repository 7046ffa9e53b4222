"""Pictures of token maps: principal components, spurious tokens, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .modeling.errors import UniRefinerError

FPGP_COLOUR = (230, 60, 50)
AH_COLOUR = (40, 120, 230)
SPURIOUS_KEY = (
    (FPGP_COLOUR, "fixed pattern or global proxy (FP-GP)"),
    (AH_COLOUR, "attention hijackee (AH)"),
)
"""What the two colours stand for."""
_VIRIDIS = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)
_INK, _PAPER, _MARGIN, _TITLE = (30, 30, 30), (255, 255, 255), 12, 26


@dataclass(frozen=True)
class PcaBasis:
    """Three principal components and the range each is coloured over.

    Attributes:
        mean: ``(channels,)``.
        components: ``(channels, 3)``.
        low: ``(3,)``, projected value drawn black.
        high: ``(3,)``, projected value drawn at full colour.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor


def fit_pca(tokens: Tensor) -> PcaBasis:
    """Principal components of tokens, coloured from the 2nd to the 98th percentile.

    The sign of each component is fixed: its largest weight is positive.

    Args:
        tokens: ``(..., channels)``, at least 4 tokens.

    Raises:
        UniRefinerError: too few tokens or channels for three components.
    """
    flat = tokens.detach().reshape(-1, tokens.shape[-1]).float()
    if flat.shape[0] < 4 or flat.shape[1] < 3:
        raise UniRefinerError(
            f"Three components need at least 4 tokens of 3 channels; got {tuple(flat.shape)}."
        )
    mean = flat.mean(dim=0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, -3:].flip(1)
    largest = components.abs().argmax(dim=0)
    components = components * components[largest, range(3)].sign()
    projected = centred @ components
    ends = torch.tensor([0.02, 0.98], dtype=projected.dtype)
    low, high = torch.quantile(projected, ends, dim=0)
    return PcaBasis(mean, components, low, high)


def pca_rgb(
    tokens: Tensor, grid: tuple[int, int], basis: PcaBasis | None = None
) -> np.ndarray:
    """Colour tokens by their first three principal components.

    Args:
        tokens: ``(batch, patches, channels)`` in raster order.
        grid: rows and columns.
        basis: from `fit_pca`; None fits one on these tokens. Pictures that share a basis
            share their colours.

    Returns:
        ``(batch, rows, columns, 3)`` uint8.

    Raises:
        UniRefinerError: the tokens do not fill the grid.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise UniRefinerError(
            f"Tokens {tuple(tokens.shape)} do not fill a grid of {grid[0]}x{grid[1]}."
        )
    basis = basis or fit_pca(tokens)
    projected = (tokens.detach().float() - basis.mean) @ basis.components
    scaled = (projected - basis.low) / (basis.high - basis.low).clamp_min(1e-8)
    colours = (scaled.clamp(0, 1) * 255).round().to(torch.uint8)
    return colours.unflatten(1, grid).cpu().numpy()


def scale_rgb(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to colours from dark blue (`low` and below) to yellow (`high` and above).

    Returns:
        uint8 of the values' shape with 3 colours at the end.
    """
    share = (values - low) / max(high - low, 1e-12)
    stops = np.linspace(0, 1, len(_VIRIDIS))
    parts = [np.interp(share, stops, part) for part in zip(*_VIRIDIS, strict=True)]
    return np.stack(parts, axis=-1).round().astype(np.uint8)


@dataclass(frozen=True)
class FigureRow:
    """One image of a before/after picture.

    Attributes:
        image: ``(height, width, 3)`` uint8.
        before: ``(patches, channels)`` tokens of the bare backbone.
        after: ``(all patches, channels)`` tokens of the refined model, those of its border
            of register patches among them.
        grid: rows and columns of the image in patches.
        register_width: border of `after` in patches.
        fpgp_before, ah_before, fpgp_after, ah_after: ``(patches,)`` bool, the spurious
            tokens of each kind.
    """

    image: np.ndarray
    before: Tensor
    after: Tensor
    grid: tuple[int, int]
    register_width: int
    fpgp_before: Tensor
    ah_before: Tensor
    fpgp_after: Tensor
    ah_after: Tensor


def before_after_figure(rows: Sequence[FigureRow], cell: int = 224) -> Image.Image:
    """A picture with a row an image: image, PCA before, PCA after, spurious tokens.

    Both PCA maps of a row share one basis, fitted on the image's tokens before and after,
    each around its own mean; the refined map shows the border of register patches, outside
    the white line. `cell` is a column's width in pixels.

    Raises:
        UniRefinerError: no rows.
    """
    if not rows:
        raise UniRefinerError("A before/after picture needs at least one image.")
    titles = (
        "image",
        "PCA, base",
        "PCA, refined, with border",
        "spurious, base",
        "spurious, refined",
    )
    drawn = [_row_cells(row, cell) for row in rows]
    heights = [max(image.height for image in cells) for cells in drawn]
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    width = len(titles) * (cell + _MARGIN) + _MARGIN
    height = 2 * _TITLE + sum(h + _MARGIN for h in heights) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = _MARGIN + column * (cell + _MARGIN)
        draw.text((x, _MARGIN), title, fill=_INK, font=font)
    y = _MARGIN + _TITLE
    for cells, row_height in zip(drawn, heights, strict=True):
        for column, image in enumerate(cells):
            x = _MARGIN + column * (cell + _MARGIN)
            canvas.paste(image, (x, y + (row_height - image.height) // 2))
        y += row_height + _MARGIN
    _legend(draw, y, small)
    return canvas


def _row_cells(row: FigureRow, cell: int) -> list[Image.Image]:
    rows, columns = row.grid
    image = Image.fromarray(row.image).resize((cell, round(cell * rows / columns)))
    width = row.register_width
    framed = (rows + 2 * width, columns + 2 * width)
    inside = row.after.unflatten(0, framed)
    inside = inside[width : width + rows, width : width + columns].flatten(0, 1)
    # Both around one mean: what sets a picture's tokens apart, not what moved them all.
    shift = row.before.mean(dim=0) - inside.mean(dim=0)
    basis = fit_pca(torch.cat((row.before, inside + shift)))
    before = _enlarge(pca_rgb(row.before[None], row.grid, basis)[0], image.size)
    after = _enlarge(
        pca_rgb((row.after + shift)[None], framed, basis)[0],
        (cell, round(cell * framed[0] / framed[1])),
    )
    if width:
        left = round(after.width * width / framed[1])
        top = round(after.height * width / framed[0])
        edges = (left, top, after.width - left, after.height - top)
        ImageDraw.Draw(after).rectangle(edges, outline=_PAPER, width=2)
    return [
        image,
        before,
        after,
        spurious_map(image, row.fpgp_before, row.ah_before, row.grid),
        spurious_map(image, row.fpgp_after, row.ah_after, row.grid),
    ]


def _enlarge(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def spurious_map(
    image: Image.Image, fpgp: Tensor, ah: Tensor, grid: tuple[int, int]
) -> Image.Image:
    """The image in grey, its spurious tokens in `FPGP_COLOUR` and `AH_COLOUR`.

    Args:
        fpgp, ah: ``(patches,)`` bool in raster order, on the CPU.
        grid: rows and columns of patches.
    """
    colours = np.zeros((*grid, 4), dtype=np.uint8)
    colours[fpgp.view(grid).numpy()] = (*FPGP_COLOUR, 190)
    colours[ah.view(grid).numpy()] = (*AH_COLOUR, 190)
    overlay = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGBA")
    marked = Image.alpha_composite(grey, overlay).convert("RGB")
    share = (fpgp | ah).float().mean().item()
    draw, font = ImageDraw.Draw(marked), ImageFont.load_default(size=14)
    text = f"{share:.0%}"
    box = draw.textbbox((6, 4), text, font=font)
    draw.rectangle((box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), fill=_INK)
    draw.text((6, 4), text, fill=_PAPER, font=font)
    return marked


def _legend(
    draw: ImageDraw.ImageDraw,
    y: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x = _MARGIN
    for colour, text in SPURIOUS_KEY:
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=colour)
        draw.text((x + 18, y), text, fill=_INK, font=font)
        x += 36 + int(draw.textlength(text, font=font))
    draw.text((x, y), "by the base's reference thresholds", fill=_INK, font=font)
