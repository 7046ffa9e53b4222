"""``unirefiner diagnose``: how clean a tower's tokens are, on any folder of images."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from ..evaluation.checkpoints import Checkpoint
    from ..methods.settings import UniRefinerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.epilog = (
        "Every measure can be fooled by something; the module "
        "unirefiner_hf.evaluation.cleanliness says what by."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="starter, a Hub id, or a folder of a tower, a run or a merged checkpoint; of "
        "several, the first is the base, whose limits the filters' shares are measured by",
    )
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="images of any kind, unlike each other",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FOLDER",
        help="label maps named as the images, for k-NN retrieval",
    )
    parser.add_argument(
        "--num_classes", type=_positive, metavar="N", help="classes of the labels"
    )
    parser.add_argument(
        "--size",
        type=_positive,
        default=224,
        metavar="PIXELS",
        help="side of the images, rounded up to patches (default: 224)",
    )
    parser.add_argument(
        "--max_images",
        type=_positive,
        default=32,
        metavar="N",
        help="images to measure, evenly spaced in the folder (default: 32)",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="FOLDER",
        help="an adapter that plants known dirt in the tower: tell how well each filter "
        "finds it, instead of the measures (see unirefiner_hf.evaluation.filter_agreement)",
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="with --truth: the filters' settings are this recipe's (default: the "
        "published ones)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="with --truth: draw precision over recall there, .png, .svg or .pdf",
    )
    parser.add_argument(
        "--own_yardstick",
        action="store_true",
        help="measure the filters' shares by each tower's own limits",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there, too"
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda or cpu")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run a model repository's own code",
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table.

    Raises:
        ValueError: images, labels or checkpoints that do not fit.
    """
    from ..data.images import ImageError, list_images, load_rgb
    from ..data.labelled import LabelError, class_labels, pair_folders
    from ..evaluation.arguments import EvaluationArguments
    from ..evaluation.cleanliness import (
        Cleanliness,
        cleanliness_table,
        knn_retrieval,
        measure_cleanliness,
    )
    from ..evaluation.compare import load_compared

    if arguments.truth is not None:
        _refuse_beside_truth(arguments)
    elif arguments.plot is not None:
        raise ValueError("--plot draws what --truth measures: give both.")
    elif arguments.config is not None:
        raise ValueError("--config is of the filters that --truth measures: give both.")
    paths = list_images(arguments.images)
    count = min(arguments.max_images, len(paths))
    pictures, skipped = [], []
    for index in range(count):
        try:
            pictures.append(load_rgb(paths[index * len(paths) // count]))
        except ImageError as problem:
            skipped.append(str(problem))
    if arguments.labels is not None and arguments.num_classes is None:
        raise LabelError("--labels needs --num_classes.")
    options = EvaluationArguments(
        data=str(arguments.images),
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    checkpoints = load_compared(arguments.checkpoints, options)
    if arguments.truth is not None:
        _tell_truth(arguments, checkpoints[0], pictures, skipped)
        return
    rows: list[Cleanliness] = []
    for checkpoint in checkpoints:
        own = arguments.own_yardstick or not rows
        row = measure_cleanliness(
            checkpoint, pictures, arguments.size, base=None if own else rows[0]
        )
        if arguments.labels is not None:
            classes = class_labels("", num_classes=arguments.num_classes)
            pairs = pair_folders(arguments.images, arguments.labels).first(count)
            row.values.update(knn_retrieval(checkpoint, pairs, classes, arguments.size))
        rows.append(row)
    print(cleanliness_table(rows))
    print(f"\n{len(pictures)} images at {checkpoints[0].side(arguments.size)} px.")
    _tell_skipped(skipped)
    if arguments.json is not None:
        content = {
            "images": len(pictures),
            "skipped": skipped,
            "size": checkpoints[0].side(arguments.size),
            "checkpoints": {row.name: row.values for row in rows},
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def _tell_skipped(skipped: list[str]) -> None:
    for reason in skipped:
        print(f"Left out {reason}")


def _refuse_beside_truth(arguments: argparse.Namespace) -> None:
    if len(arguments.checkpoints) > 1:
        raise ValueError(
            f"--truth takes one tower, the one its adapter was trained on; there are "
            f"{len(arguments.checkpoints)}."
        )
    for name in ("labels", "num_classes", "own_yardstick"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} has no meaning with --truth: leave it out.")


def _filters_of(recipe: str) -> UniRefinerSettings:
    """The method's part of a recipe.

    Raises:
        ValueError: a method without filters, or a recipe that is none.
    """
    from ..methods.settings import UniRefinerSettings
    from ..resources import find_recipe
    from ..training.recipe import build_arguments, load_recipe
    from .refine import DATACLASSES

    values = load_recipe(find_recipe(recipe), {}, DATACLASSES)
    names = {field.name for field in fields(UniRefinerSettings)}
    own = {name: value for name, value in values.items() if name in names}
    (settings,) = build_arguments(own, (UniRefinerSettings,))
    if settings.method != "unirefiner":
        raise ValueError(
            f"{recipe} is of method {settings.method}, which has no filters."
        )
    return settings


def _tell_truth(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    pictures: list[Image.Image],
    skipped: list[str],
) -> None:
    from ..evaluation.agreement_report import plot_truth, truth_table
    from ..evaluation.filter_agreement import measure_truth

    settings = None if arguments.config is None else _filters_of(arguments.config)
    report = measure_truth(
        checkpoint, arguments.truth, pictures, arguments.size, settings
    )
    print(truth_table(report))
    cosines = ", ".join(f"{k} {v:.3f}" for k, v in report.cosine_to_clean.items())
    print(
        f"\n{report.images} images at {report.size} px; {report.planted:.1%} of the tokens "
        f"are planted. Mean cosine to the clean tower: {cosines}."
    )
    _tell_skipped(skipped)
    if arguments.json is not None:
        content = {**report.to_dict(), "skipped": skipped}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.plot is not None:
        plot_truth(report.filters, report.planted).savefig(arguments.plot, dpi=150)
