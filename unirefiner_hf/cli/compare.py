"""``unirefiner compare``: the tokens of two models on the same images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_place, positive
from .parser import place

if TYPE_CHECKING:
    from ..evaluation.compare import FeatureComparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.add_argument(
        "a",
        metavar="A",
        help="the base: starter, a Hub id, or a folder of a backbone, a run or a merged "
        "checkpoint",
    )
    parser.add_argument(
        "b", metavar="B", help="what is compared with it, of the same base"
    )
    parser.add_argument(
        "--images",
        required=True,
        type=place,
        metavar="PATH",
        help="a folder of images, or one image",
    )
    parser.add_argument(
        "--click",
        type=_place,
        metavar="X,Y",
        help="the patch every other is compared with, from the top left corner: 0.5,0.25 "
        "are shares of width and height, 112,56 pixels of the resized image (default: the "
        "middle)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side every image is resized to, rounded up to patches (default: 224)",
    )
    parser.add_argument(
        "--max-images",
        type=positive,
        default=8,
        metavar="N",
        help="images to compare, evenly spaced in the folder (default: 8)",
    )
    add_place(parser)


def _place(word: str) -> tuple[float, float]:
    """Two whole numbers, or two floats."""
    parts = word.split(",")
    try:
        kind = int if all(part.strip().isdigit() for part in parts) else float
        x, y = (kind(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is not x,y such as 0.5,0.25 or 112,56"
        ) from None
    return x, y


def run(arguments: argparse.Namespace) -> FeatureComparison:
    """Compare.

    Raises:
        UniRefinerError: images, a place or checkpoints that do not fit.
    """
    from ..evaluation.compare import compare

    return compare(
        arguments.a,
        arguments.b,
        arguments.images,
        size=arguments.size,
        max_images=arguments.max_images,
        click=arguments.click,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
