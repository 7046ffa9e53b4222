"""Images of 16 or 32 bits and of floating point, brought to 8 bits by their range."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import UniRefinerError

DARKEST = 16
"""An image whose brightest value is below this part of its range is nearly black."""


def to_eight_bits(image: Image.Image, scaled: bool = False) -> Image.Image:
    """A greyscale image of mode ``I;16``, ``I`` or ``F`` as ``L``.

    Values of 16 bits lie in 0 to 65535. The others tell no range: it is taken to be 0 to
    255 or 0 to 65535 for whole numbers, 0 to 1 or 0 to 255 for floating point, whichever is
    the first to hold the brightest value.

    Args:
        image: where a value stands for transparency (PNG), it becomes white.
        scaled: its reader brought whole numbers to 0 to 65535 (PGM).

    Raises:
        UniRefinerError: negative or undefined values, values above every range, or none
            above a sixteenth of it (but 0), which a wrong range looks like.
    """
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UniRefinerError("values that are not finite (NaN or infinity).")
    if low < 0:
        raise UniRefinerError(
            f"negative values ({low:g} to {high:g}). Bring them to 0 to 255."
        )
    tops: tuple[int, ...]
    if image.mode == "F":
        tops = (1, 255)
    elif image.mode == "I" and not scaled:
        tops = (255, 65535)
    else:
        tops = (65535,)
    top = next((top for top in tops if high <= top), None)
    known = " or ".join(f"0 to {top}" for top in tops)
    if top is None:
        raise UniRefinerError(
            f"values of an unknown range (up to {high:g}, not {known}). Bring them to 0 to "
            "255."
        )
    if 0 < high < top / DARKEST:
        raise UniRefinerError(
            f"nearly black (values up to {high:g}, of {top}). If their range is another, "
            "bring them to 0 to 255."
        )
    grey = (values.astype(np.float32) * np.float32(255 / top)).round()
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
