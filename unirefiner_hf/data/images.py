"""Reading images of any kind into RGB, and into the tower's normalised pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UniRefinerError

MIN_SIDE = 16
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"}
)


class ImageError(UniRefinerError):
    """An image cannot be used; the message names it and the reason."""


def load_rgb(
    source: str | Path | bytes | Image.Image, name: str | None = None
) -> Image.Image:
    """Read an image as RGB, the way it is meant to be seen.

    EXIF orientation is applied; CMYK, palette and greyscale are converted, 16-bit values
    scaled to 8, transparent pixels laid over white. Of an animation, the first frame.

    Args:
        source: path, encoded bytes, or an image.
        name: what to call it in errors; by default the file's name.

    Raises:
        ImageError: not an image, truncated, too large to be safe, or a side shorter than
            16 pixels.
    """
    if name is None:
        name = Path(source).name if isinstance(source, (str, Path)) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = source.copy()
            else:
                stream = io.BytesIO(source) if isinstance(source, bytes) else source
                with Image.open(stream) as opened:
                    opened.load()
                    image = opened.copy()
            image = _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image Pillow can read, or empty.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise ImageError(f"{name}: {problem} Scale it down first.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as problem:
        raise ImageError(f"{name}: cannot be decoded ({problem}).") from None
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise ImageError(
            f"{name}: {width}x{height} pixels; both sides must be {MIN_SIDE} or longer."
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        high = values.max(initial=0)
        if image.mode != "F" or high > 255:
            values = values * (255 / 65535)
        elif high <= 1:
            values = values * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8), "L")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def preprocess(
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Resize to exactly `size` (bicubic) and normalise.

    Args:
        image: RGB.
        size: height and width in pixels.
        mean: of each channel, in [0, 1].
        std: of each channel.

    Returns:
        ``(3, height, width)`` float32.
    """
    height, width = size
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
    return (
        ((pixels - torch.tensor(mean)) / torch.tensor(std))
        .permute(2, 0, 1)
        .contiguous()
    )


def denormalise(
    pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Normalised ``(..., 3, height, width)`` back to uint8 ``(..., height, width, 3)``."""
    pixels = pixel_values.detach().float().cpu().movedim(-3, -1)
    pixels = pixels * torch.tensor(std) + torch.tensor(mean)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def list_images(folder: str | Path) -> list[Path]:
    """Image files below a folder, sorted.

    Raises:
        ImageError: the folder is missing or holds no file with an image's suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder.")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not images:
        kinds = sorted({path.suffix.lower() or "no suffix" for path in found})
        holds = f"only files with {', '.join(kinds)}" if kinds else "no files"
        raise ImageError(f"{folder}: holds no image, {holds}.")
    return images


def default_reference() -> Image.Image:
    """The unrelated image that tokens are compared with where the user gives none."""
    with as_file(files("unirefiner_hf") / "assets" / "reference.jpg") as path:
        return load_rgb(path)
