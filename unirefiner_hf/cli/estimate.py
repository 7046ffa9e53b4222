"""``unirefiner estimate``: what a refinement takes, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import refine
from .options import add_options

if TYPE_CHECKING:
    from ..estimation.estimate import Estimate

ANY_OPTION = True
WHERE = ("gpu", "gpus", "strategy", "efficiency", "images")

BRIEF = (
    *("model", "base_dtype", "base_quantization", "teacher_float8", "image_size"),
    *("register_factor", "lora_rank", "max_images", "method"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "bf16", "num_train_epochs", "max_steps"),
)
"""What --help shows: what memory and time hang on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options: where it would run, and what of ``refine`` counts."""
    _where(parser, " More: --help-all.")
    for title, options in refine.groups().items():
        group = parser.add_argument_group(title)
        if title == "backbone":
            refine.add_config(group)
        add_options(group, options, BRIEF)


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the help every option of ``refine``, too; imports torch."""
    _where(parser)
    refine.add_all_arguments(parser)


def _where(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.usage = "unirefiner estimate --config RECIPE [--gpu NAME] [--gpus N] [--field value ...]"
    parser.epilog = (
        "The backbone's config is enough: a Hub id, or a folder with config.json. The step "
        "runs on tensors without data, so nothing is loaded." + more
    )
    where = parser.add_argument_group("where it would run")
    where.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="h200, h100, a100, l40s, ..., or cpu for this machine [h100]",
    )
    where.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="how many of them [1]"
    )
    where.add_argument(
        "--strategy",
        default="ddp",
        metavar="NAME",
        help="how several share: ddp, zero2 or zero3 [ddp]",
    )
    where.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the published rate a step reaches [0.4, 0.7 on a CPU]",
    )
    where.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images of the data set [the recipe's max_images, or 5000]",
    )


def run(arguments: argparse.Namespace) -> Estimate:
    """Estimate.

    Raises:
        UniRefinerError: no such recipe, key, GPU or strategy, or a value that does not fit.
    """
    from ..estimation.estimate import estimate, recipe_elsewhere

    where = {name: getattr(arguments, name) for name in WHERE}
    for name in WHERE:
        delattr(arguments, name)
    words = refine.words_asked(arguments)
    recipe = recipe_elsewhere(arguments.config, words)
    refine.note_left_out(recipe, arguments)
    return estimate(recipe=recipe, **where)
