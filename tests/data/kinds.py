"""Image files of every kind, each with the RGB it means or why it is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

SIZE = (24, 16)
"""Width and height, upright."""
_RANDOM = np.random.default_rng(0)
RGB = _RANDOM.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
GREY = RGB[..., 0]


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    """Grey as RGB."""
    return np.repeat(grey[..., None], 3, axis=-1)


def _rotated(kind: str) -> bytes:
    """Stored on its side, with an orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90)
    return encoded(stored, kind, exif=exif)


def _transparent_palette() -> tuple[bytes, np.ndarray]:
    indices = _RANDOM.integers(0, 4, (SIZE[1], SIZE[0]), dtype=np.uint8)
    colours = np.array([[9, 9, 9], [200, 0, 0], [0, 150, 0], [0, 0, 90]], np.uint8)
    image = Image.frombytes("P", SIZE, indices.tobytes())
    image.putpalette(colours.tobytes())
    meant = colours[indices]
    meant[indices == 0] = 255
    return encoded(image, transparency=0), meant


def _alpha() -> tuple[bytes, np.ndarray]:
    alpha = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    alpha[:, 12:] = 255
    meant = RGB.copy()
    meant[:, :12] = 255
    return encoded(Image.fromarray(np.dstack([RGB, alpha]))), meant


def _cmyk() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(RGB).convert("CMYK")
    return encoded(image, "tiff"), RGB


def _tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "tiff")


def _signed(values: np.ndarray) -> bytes:
    """An int16 TIFF, which Pillow reads and does not write."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[339] = 2
    return encoded(
        Image.fromarray(values.astype(np.int16).view(np.uint16)), "tiff", tiffinfo=tags
    )


def _colours_of_16_bits() -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads by its high bytes."""
    import struct
    import zlib

    wide = RGB.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


FULL = GREY.copy()
FULL[0, :2] = 0, 255
READ: dict[str, Callable[[], tuple[bytes, np.ndarray]]] = {
    "rgb.png": lambda: (encoded(Image.fromarray(RGB)), RGB),
    "exif.png": lambda: (_rotated("png"), RGB),
    "exif.tiff": lambda: (_rotated("tiff"), RGB),
    "exif_webp.webp": lambda: (
        encoded(
            Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90),
            "webp",
            lossless=True,
            exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
        ),
        RGB,
    ),
    "alpha.png": _alpha,
    "palette.png": _transparent_palette,
    "cmyk.tiff": _cmyk,
    "grey.png": lambda: (encoded(Image.fromarray(GREY)), three(GREY)),
    "grey16.png": lambda: (
        encoded(Image.fromarray(FULL.astype(np.uint16) * 257)),
        three(FULL),
    ),
    "grey16.pgm": lambda: (
        encoded(Image.fromarray(FULL.astype(np.uint16) * 257), "ppm"),
        three(FULL),
    ),
    "rgb16.png": lambda: (_colours_of_16_bits(), RGB),
    "int32_255.tiff": lambda: (_tiff(FULL.astype(np.int32)), three(FULL)),
    "int32_65535.tiff": lambda: (_tiff(FULL.astype(np.int32) * 257), three(FULL)),
    "float_1.tiff": lambda: (_tiff(FULL.astype(np.float32) / 255), three(FULL)),
    "float_255.tiff": lambda: (_tiff(FULL.astype(np.float32)), three(FULL)),
}
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "negative.tiff": (lambda: _signed(FULL.astype(int) - 100), "negative values"),
    "nan.tiff": (lambda: _tiff(np.full((16, 24), np.nan, np.float32)), "not finite"),
    "range.tiff": (lambda: _tiff(FULL.astype(np.float32) * 9), "unknown range"),
    "int32_2e9.tiff": (lambda: _tiff(FULL.astype(np.int32) * 10**6), "unknown range"),
    "int32_4000.tiff": (lambda: _tiff(FULL.astype(np.int32) * 15), "nearly black"),
    "twelve.png": (
        lambda: encoded(Image.fromarray(FULL.astype(np.uint16) * 16)),
        "nearly black",
    ),
    "dark.tiff": (lambda: _tiff(FULL.astype(np.float32) / 9999), "nearly black"),
    "spider.jpg": (
        lambda: encoded(Image.fromarray(GREY).convert("F"), "spider"),
        "not an image that is read",
    ),
    "eps.jpg": (
        lambda: encoded(Image.fromarray(RGB), "eps"),
        "not an image that is read",
    ),
    "dds.jpg": (
        lambda: encoded(Image.fromarray(RGB), "dds"),
        "not an image that is read",
    ),
    "broken.webp": (
        lambda: encoded(Image.fromarray(RGB), "webp")[:60] + bytes(200),
        "cannot be decoded|not an image",
    ),
}
