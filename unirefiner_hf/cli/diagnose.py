"""``unirefiner diagnose``: how clean a tower's tokens are, on any folder of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


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
