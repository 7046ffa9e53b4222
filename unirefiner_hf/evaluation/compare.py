"""`compare`: the tokens of two models of one backbone, on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from ..data.images import default_reference
from ..data.left_out import left_out_lines
from ..modeling.errors import UniRefinerError
from ..results import Figure, Result, Section, Table
from ..spurious.diagnose import Diagnosis
from ..spurious.diagnose import diagnose as find_spurious
from ..visualize import SPURIOUS_KEY, fit_pca, pca_rgb, scale_rgb, spurious_map
from .checkpoints import Checkpoint, Source, load_checkpoints, measuring
from .diagnose import check_size
from .inputs import load_pictures

SHARES = {
    "fpgp": "fixed patterns and global proxies",
    "ah": "attention hijackees",
    "spurious": "spurious tokens, either",
}


class ClickError(UniRefinerError):
    """The chosen place does not lie in the image."""


@dataclass
class FeatureComparison(Result):
    """Two models on the same images.

    Attributes:
        names: of the two models, the base first.
        images: names of the images.
        size: side in pixels that every image was resized to.
        click: row and column of the chosen patch.
        cosines: ``(images, rows, columns)``, cosine between the two models' tokens of each
            patch.
        click_cosines: of each model ``(images, rows, columns)``, cosine of every token to
            that of the chosen patch.
        offset: distance between the two models' mean tokens, in units of the root mean
            square distance of the base's tokens from their mean.
        cross_image: of each model, mean cosine between tokens of different images; what
            all tokens share raises it. None for a single image.
        spurious: of each model, share of the tokens each filter finds, by the base's
            reference thresholds.
        skipped: image -> why it was left out.
        passed_over: folder or table that was not read -> why.
        sections: of the page, with its pictures.
    """

    names: tuple[str, str]
    images: Sequence[str]
    size: int
    click: tuple[int, int]
    cosines: np.ndarray
    click_cosines: tuple[np.ndarray, np.ndarray]
    offset: float
    cross_image: tuple[float, float] | None
    spurious: tuple[Mapping[str, float], Mapping[str, float]]
    skipped: Mapping[str, str]
    passed_over: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = field(default=(), repr=False)

    @property
    def title(self) -> str:
        """Which models are compared."""
        return f"{self.names[0]} and {self.names[1]}"

    @property
    def cosine(self) -> float:
        """Mean cosine between the two models' tokens of the same patch."""
        return float(self.cosines.mean())

    def measures(self) -> dict[str, tuple[float, float]]:
        """Measure in words -> its value of each model."""
        first, second = self.spurious
        found = {words: (first[key], second[key]) for key, words in SHARES.items()}
        if self.cross_image is not None:
            found["cosine between images"] = self.cross_image
        similar = [float(cosines.mean()) for cosines in self.click_cosines]
        found["cosine to the chosen patch"] = (similar[0], similar[1])
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        means = self.cosines.mean(axis=(1, 2))
        return {
            "models": list(self.names),
            "size": self.size,
            "grid": list(self.cosines.shape[1:]),
            "click": list(self.click),
            "cosine": self.cosine,
            "offset": self.offset,
            "measures": {
                words: {
                    **dict(zip(self.names, values, strict=True)),
                    "difference": values[1] - values[0],
                }
                for words, values in self.measures().items()
            },
            "images": {
                name: {"cosine": float(mean)}
                for name, mean in zip(self.images, means, strict=True)
            },
            "skipped": dict(self.skipped),
            "passed_over": dict(self.passed_over),
        }

    def tables(self) -> list[Table]:
        """A measure a row with its difference, then the cosine of each image."""
        rows = [
            [words, f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}"]
            for words, (first, second) in self.measures().items()
        ]
        caption = (
            f"{len(self.images)} images at {self.size} px. Mean cosine between the two "
            f"models' tokens: {self.cosine:.3f}; their mean tokens lie {self.offset:.2f} "
            f"apart, in units of the spread of the tokens of {self.names[0]}. Spurious "
            f"tokens by the reference thresholds of {self.names[0]}."
        )
        means = self.cosines.mean(axis=(1, 2))
        lowest = self.cosines.min(axis=(1, 2))
        each = [
            [name, f"{mean:.3f}", f"{low:.3f}"]
            for name, mean, low in zip(self.images, means, lowest, strict=True)
        ]
        return [
            Table(["measure", *self.names, "difference"], rows, caption),
            Table(
                ["image", "mean cosine", "lowest"],
                each,
                "Cosine between the two models' tokens of the same patch.",
                left_out_lines(self.skipped, self.passed_over),
            ),
        ]


@dataclass(frozen=True)
class _Seen:
    """What one model makes of the images.

    Attributes:
        tokens: ``(images, patches, hidden)`` float32 on the CPU.
        grid: rows and columns of patches.
        diagnoses: of each image.
    """

    tokens: Tensor
    grid: tuple[int, int]
    diagnoses: Sequence[Diagnosis]

    @property
    def unit(self) -> Tensor:
        """The tokens, L2-normalised."""
        return functional.normalize(self.tokens, dim=-1)

    def shares(self) -> dict[str, float]:
        """Mean share of the tokens that each filter finds."""
        shares = [diagnosis.shares() for diagnosis in self.diagnoses]
        return {key: float(np.mean([s[key] for s in shares])) for key in SHARES}


def compare(
    a: Source,
    b: Source,
    images: Any,
    *,
    size: int = 224,
    max_images: int = 8,
    click: tuple[float, float] | None = None,
    image_column: str | None = None,
    processing_class: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> FeatureComparison:
    """Compare the tokens of two models of one backbone on the same images.

    Every image is resized to ``size x size``. The page shows both models' principal
    components in one basis, the cosine of every token to a chosen patch on one scale of
    colours, and the spurious tokens.

    Args:
        a: the base; see `load_checkpoint`.
        b: what is compared with it.
        images: a folder, a path, a PIL image, a list of paths or PIL images, or a
            `datasets.Dataset`.
        size: in pixels, rounded up to patches.
        max_images: compare at most this many, evenly spaced.
        click: the chosen place, x then y from the top left corner: two floats from 0 to 1
            are shares of width and height, two whole numbers pixels of the image resized
            to ``size x size``. None: the middle.
        image_column: of a `datasets.Dataset`.
        processing_class: of models in memory.

    Raises:
        ClickError: the place is not in the image.
        InputError: no usable image, or images of another kind.
        CheckpointMismatchError: models of two backbones, or see `load_checkpoint`.
    """
    check_size(size)
    if click is not None:
        _check_click(click, size)
    pictures = load_pictures(images, max_images, image_column)
    first, second = load_checkpoints(
        [a, b],
        device=device,
        processing_class=processing_class,
        trust_remote_code=trust_remote_code,
    )
    first.check_grid(size)
    side = first.side(size)
    row, column = _patch_at(click, size, side // first.patch_size)
    resample = first.reading.resample
    squares = [image.resize((side, side), resample) for image in pictures.images]
    with measuring([first, second]):
        base = _see(first, squares)
        other = _see(second, squares, base.diagnoses)
    seen = (base, other)
    clicked = [_cosines_to(part, row * base.grid[1] + column) for part in seen]
    between = (base.unit * other.unit).sum(dim=-1).unflatten(1, base.grid).numpy()
    comparison = FeatureComparison(
        names=(first.name, second.name),
        images=pictures.names,
        size=side,
        click=(row, column),
        cosines=between,
        click_cosines=(clicked[0], clicked[1]),
        offset=_offset(base.tokens, other.tokens),
        cross_image=_cross_image(base, other),
        spurious=(base.shares(), other.shares()),
        skipped=pictures.skipped,
        passed_over=pictures.passed_over,
    )
    comparison.sections = _sections(comparison, seen, squares)
    return comparison


def _check_click(click: tuple[float, float], size: int) -> None:
    ok = isinstance(click, Sequence) and len(click) == 2
    if ok and all(type(part) is int for part in click):
        ok = all(0 <= part < size for part in click)
    elif ok:
        ok = all(type(part) is float and 0 <= part <= 1 for part in click)
    if not ok:
        raise ClickError(
            f"click is {click!r}; it must be x and y, both as shares of the image from 0.0 "
            f"to 1.0, or both as whole pixels from 0 to {size - 1}."
        )


def _patch_at(
    click: tuple[float, float] | None, size: int, patches: int
) -> tuple[int, int]:
    """Row and column of the patch at a place."""
    x, y = click or (0.5, 0.5)
    if type(x) is int:
        x, y = (x + 0.5) / size, (y + 0.5) / size
    return min(int(y * patches), patches - 1), min(int(x * patches), patches - 1)


@torch.no_grad()
def _see(
    checkpoint: Checkpoint,
    squares: Sequence[Image.Image],
    base: Sequence[Diagnosis] | None = None,
) -> _Seen:
    """Tokens and spurious tokens, these by the base's reference thresholds."""
    size = (squares[0].height, squares[0].width)
    device = checkpoint.model.device

    def pixels(image: Image.Image) -> Tensor:
        made = checkpoint.reading(image, size)
        return made[None].to(device)

    reference = pixels(default_reference())
    maps, diagnoses = [], []
    for number, image in enumerate(squares):
        batch = pixels(image)
        maps.append(checkpoint.feature_map(batch).cpu())
        found = find_spurious(
            checkpoint.model,
            batch,
            reference,
            register_width=checkpoint.register_width,
            yardstick=None if base is None else base[number].yardstick,
        )
        diagnoses.append(found)
    stacked = torch.cat(maps)
    grid = (stacked.shape[2], stacked.shape[3])
    return _Seen(stacked.flatten(2).transpose(1, 2), grid, diagnoses)


def _cosines_to(seen: _Seen, patch: int) -> np.ndarray:
    unit = seen.unit
    cosines = (unit * unit[:, patch : patch + 1]).sum(dim=-1)
    return cosines.unflatten(1, seen.grid).numpy()


def _offset(base: Tensor, other: Tensor) -> float:
    centre = base.mean(dim=(0, 1))
    spread = (base - centre).square().sum(dim=-1).mean().sqrt()
    gap = (other.mean(dim=(0, 1)) - centre).norm()
    return (gap / spread.clamp_min(1e-12)).item()


def _cross_image(*seen: _Seen) -> tuple[float, float] | None:
    """Mean cosine of all pairs of tokens of two different images."""
    found = []
    for part in seen:
        means = part.unit.mean(dim=1)
        images = len(means)
        if images < 2:
            return None
        products = means @ means.T
        apart = products.sum() - products.diagonal().sum()
        found.append((apart / (images * (images - 1))).item())
    return found[0], found[1]


def _sections(
    comparison: FeatureComparison,
    seen: tuple[_Seen, _Seen],
    squares: Sequence[Image.Image],
) -> list[Section]:
    names, images, grid = comparison.names, comparison.images, seen[0].grid
    shown = [Figure.of(s, n) for s, n in zip(squares, images, strict=True)]
    # Around one mean, as an offset would leave no colours for what differs in an image.
    shifted = [part.tokens - part.tokens.mean(dim=(0, 1)) for part in seen]
    basis = fit_pca(torch.cat(shifted))
    components = [pca_rgb(tokens, grid, basis) for tokens in shifted]
    low = min(float(cosines.min()) for cosines in comparison.click_cosines)
    clicked = [scale_rgb(c, low, 1.0) for c in comparison.click_cosines]
    marked = [
        Figure.of(_marked(square, comparison.click, grid), name)
        for square, name in zip(squares, images, strict=True)
    ]
    lowest = float(comparison.cosines.min())
    agreement = scale_rgb(comparison.cosines, lowest, 1.0)
    spurious = [
        [
            spurious_map(
                square,
                part.diagnoses[number].fpgp[0].cpu(),
                part.diagnoses[number].ah[0].cpu(),
                grid,
            )
            for number, square in enumerate(squares)
        ]
        for part in seen
    ]
    return [
        Section(
            "Principal components, one basis for both",
            "Fitted on all tokens of both, each model's around its own mean.",
            rows=_rows(shown, names, components),
        ),
        Section(
            "Cosine to the marked patch",
            "One scale of colours for both models and all images.",
            key=_scale(low),
            rows=_rows(marked, names, clicked),
        ),
        Section(
            "Cosine between the two models",
            key=_scale(lowest),
            rows=_rows(shown, ["cosine"], [agreement]),
        ),
        Section(
            "Spurious tokens",
            f"By the reference thresholds of {names[0]}.",
            key=SPURIOUS_KEY,
            rows=_rows(shown, names, spurious),
        ),
    ]


def _rows(
    first: Sequence[Figure], names: Sequence[str], columns: Sequence[Any]
) -> list[list[Figure]]:
    return [
        [
            figure,
            *(Figure.of(c[i], name) for c, name in zip(columns, names, strict=True)),
        ]
        for i, figure in enumerate(first)
    ]


def _scale(low: float) -> list[tuple[tuple[int, int, int], str]]:
    values = np.linspace(low, 1.0, 5)
    colours = scale_rgb(values, low, 1.0).tolist()
    return [
        ((red, green, blue), f"{value:.2f}")
        for (red, green, blue), value in zip(colours, values, strict=True)
    ]


def _marked(
    square: Image.Image, click: tuple[int, int], grid: tuple[int, int]
) -> Image.Image:
    """The image with a frame round the chosen patch."""
    marked = square.copy()
    height, width = square.height / grid[0], square.width / grid[1]
    top, left = click[0] * height, click[1] * width
    edges = (left - 1, top - 1, left + width, top + height)
    draw = ImageDraw.Draw(marked)
    draw.rectangle(edges, outline="white", width=2)
    draw.rectangle((edges[0] - 1, edges[1] - 1, edges[2] + 1, edges[3] + 1), outline=0)
    return marked
