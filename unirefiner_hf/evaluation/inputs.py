"""The images that are diagnosed or compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..data.images import ImageError
from ..data.left_out import reason_of
from ..data.sources import InputError, open_images


@dataclass(frozen=True)
class Pictures:
    """Images that could be read.

    Attributes:
        names, images: of each, RGB.
        skipped: name -> why it was left out.
        passed_over: folder or table that was not read -> why.
    """

    names: list[str]
    images: list[Image.Image]
    skipped: dict[str, str]
    passed_over: dict[str, str] = field(default_factory=dict)


def load_pictures(images: Any, count: int, image_column: str | None = None) -> Pictures:
    """Read at most `count` images, evenly spaced.

    Args:
        images: see `open_images`.

    Raises:
        InputError: none of them can be read, or see `open_images`.
    """
    if count < 1:
        raise InputError(f"max_images is {count}; it must be at least 1.")
    opened = open_images(images, image_column)
    chosen = opened.spread(count)
    found = Pictures([], [], dict(opened.left_out), dict(opened.passed_over))
    reason = ""
    for number, name in enumerate(chosen.names):
        try:
            found.images.append(chosen.load(number))
            found.names.append(name)
        except ImageError as problem:
            found.skipped[name] = reason = reason_of(problem, name)
    if not found.images:
        raise InputError(
            f"None of the {len(chosen)} images can be read: {chosen.names[-1]}: {reason}"
        )
    return found
