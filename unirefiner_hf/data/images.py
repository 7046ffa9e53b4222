"""Opening images of any kind as RGB: the one way, for training, measuring and users."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import UniRefinerError
from .values import to_eight_bits

MIN_SIDE = 16
FORMATS = tuple("JPEG PNG WEBP TIFF BMP GIF PPM JPEG2000 AVIF".split())
"""What is opened, whatever a file is called; others (EPS, DDS, ...) never are."""


class ImageError(UniRefinerError):
    """An image cannot be used; the message names it and the reason."""


def load_rgb(
    source: str | Path | bytes | Image.Image, name: str | None = None
) -> Image.Image:
    """Read an image as RGB, the way it is meant to be seen.

    EXIF orientation is applied; CMYK, palette and greyscale are converted, transparent
    pixels laid over white. Values of 16 bits are scaled to 8, those of 32 bits and of
    floating point by the range they lie in (see `to_eight_bits`). Of an animation, the
    first frame. Training, evaluation and diagnosis open every image by this function.

    Args:
        source: path, encoded bytes, or an image.
        name: what to call it in errors; by default the file's name.

    Raises:
        ImageError: not an image of one of `FORMATS`, truncated, of more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, of values whose range is not known, or a side
            shorter than 16 pixels.
    """
    return load_upright(source, name)[0]


def load_upright(
    source: str | Path | bytes | Image.Image, name: str | None = None
) -> tuple[Image.Image, int]:
    """`load_rgb`, and the EXIF orientation (1 to 8) that the image was turned by."""
    name = name or _name_of(source)
    with opened(source, name) as image:
        with decoding(name):
            turn = orientation(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
            wide = upright.mode.startswith("I") or upright.mode == "F"
        if wide:
            try:
                upright = to_eight_bits(upright, scaled=image.format == "PPM")
            except UniRefinerError as problem:
                raise ImageError(f"{name}: {problem}") from None
        with decoding(name):
            rgb = _over_white(upright)
    if min(rgb.size) < MIN_SIDE:
        width, height = rgb.size
        raise ImageError(f"{name}: shorter than {MIN_SIDE} pixels ({width}x{height}).")
    return rgb, turn


def image_size(source: str | Path | bytes | Image.Image, name: str) -> tuple[int, int]:
    """Width and height by the file's header, as stored; nothing is decoded.

    Raises:
        ImageError: as `load_rgb`, of what the header tells.
    """
    with opened(source, name) as image:
        width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: shorter than {MIN_SIDE} pixels ({width}x{height}).")
    return width, height


@contextmanager
def opened(
    source: str | Path | bytes | Image.Image,
    name: str,
    error: type[UniRefinerError] = ImageError,
) -> Iterator[Image.Image]:
    """An image of one of `FORMATS`, its pixels not decoded yet.

    Raises:
        UniRefinerError: of the class `error`: no such file, no image, too large, or no
            form of an image at all.
    """
    if isinstance(source, Image.Image):
        yield source
        return
    if not isinstance(source, (str, Path, bytes)):
        raise error(
            f"{name}: a {type(source).__name__}; an image is a path, encoded bytes or a PIL "
            "image."
        )
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with decoding(name, error):
        try:
            image = Image.open(stream, formats=_formats())
        except UnidentifiedImageError:
            raise error(f"{name}: {_unknown(source)}") from None
    with image:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            raise error(
                f"{name}: too large to be safe ({image.width}x{image.height} pixels; at "
                f"most {most} in all). Scale it down first."
            )
        yield image


@contextmanager
def decoding(name: str, error: type[UniRefinerError] = ImageError) -> Iterator[None]:
    """Whatever a decoder raises about a file becomes one `error` that names its cause.

    Damaged files make Pillow raise nearly anything (SyntaxError, struct.error, ...). Put
    round calls of decoders alone: what our own code raises there would be hidden.
    """
    try:
        yield
    except UniRefinerError:
        raise
    except FileNotFoundError:
        raise error(f"{name}: there is no such file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise error(
            f"{name}: too large to be safe ({problem}) Scale it down first."
        ) from None
    except Exception as problem:
        cause = str(problem)
        if isinstance(problem, OSError) and problem.strerror:
            cause = problem.strerror  # without the path
        elif not isinstance(problem, (OSError, SyntaxError, ValueError)) or not cause:
            cause = f"{type(problem).__name__}: {cause}".rstrip(": ")
        raise error(f"{name}: cannot be decoded ({cause}).") from problem


def orientation(image: Image.Image) -> int:
    """The EXIF orientation an image is stored in, 1 (upright) to 8."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """An array ``(height, width)`` turned as `ImageOps.exif_transpose` turns an image."""
    turns: dict[int, Any] = {
        2: np.fliplr,
        3: lambda v: np.rot90(v, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda v: np.rot90(v, -1),
        7: lambda v: np.rot90(v, 2).T,
        8: np.rot90,
    }
    return turns[orientation](values) if orientation in turns else values


def default_reference() -> Image.Image:
    """The unrelated image that tokens are compared with where the user gives none."""
    with as_file(files("unirefiner_hf") / "assets" / "reference.jpg") as path:
        return load_rgb(path)


def _name_of(source: Any) -> str:
    return Path(source).name if isinstance(source, (str, Path)) else "image"


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unknown(source: str | Path | bytes) -> str:
    """What to say of a file that no decoder takes."""
    if isinstance(source, bytes):
        start = source[:4]
    else:
        with open(source, "rb") as file:
            start = file.read(4)
    if not start:
        return "an empty file."
    if start in (b"II*\0", b"MM\0*"):
        return (
            "a TIFF of a kind that Pillow does not read (16 bits a colour, for one). Save "
            "it with 8 bits, or as PNG."
        )
    return f"not an image that is read ({', '.join(_formats())})."


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa") or image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")
