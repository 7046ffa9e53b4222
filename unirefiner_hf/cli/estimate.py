"""``unirefiner estimate``: what a refinement takes, before anything is loaded."""

from __future__ import annotations

import argparse
import json

from . import refine

WHERE = ("gpu", "gpus", "strategy", "efficiency", "images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options: those of ``refine``, and where it would run."""
    refine.add_arguments(parser)
    parser.usage = (
        "unirefiner estimate --config RECIPE [--gpu NAME] [--gpus N] "
        "[--strategy ddp|zero2|zero3] [--field value ...]"
    )
    parser.epilog = (
        "The tower's config is enough: a Hub id, or a folder with config.json. The step "
        "runs on tensors without data, so nothing is loaded."
    )
    where = parser.add_argument_group("where it would run")
    where.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="h200, h100, a100, l40s, 4090, "
        "..., or cpu for this machine (default: h100)",
    )
    where.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="how many (default: 1)"
    )
    where.add_argument(
        "--strategy",
        default="ddp",
        metavar="NAME",
        help="how several share: ddp, zero2 or zero3 (default: ddp)",
    )
    where.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the published rate a step reaches (default: 0.4, 0.7 on a CPU)",
    )
    where.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images of the data set (default: the recipe's max_images, else 5000)",
    )
    where.add_argument("--json", metavar="FILE", help="also write the numbers here")


def run(arguments: argparse.Namespace) -> None:
    """Estimate and print.

    Raises:
        FileNotFoundError: no such recipe.
        UniRefinerError: an unknown key, GPU or strategy, or a value that does not fit.
    """
    from ..estimation.estimate import estimate, recipe_elsewhere

    where = {name: getattr(arguments, name) for name in WHERE}
    words = {
        name: value
        for name, value in refine.recipe_overrides(arguments).items()
        if name not in (*WHERE, "json")
    }
    found = estimate(recipe=recipe_elsewhere(arguments.config, words), **where)
    print(found)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found.to_dict(), file, indent=2)
