"""``unirefiner diagnose``: how clean tokens are, on any folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.epilog = (
        "Every measure can be fooled by something; the module "
        "unirefiner_hf.evaluation.cleanliness says what by."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="starter, a Hub id, or a folder of a backbone, a run or a merged checkpoint; "
        "of several, the first is the base, whose reference thresholds tell which tokens "
        "are spurious",
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
        "--num_classes", type=positive, metavar="N", help="classes of the labels"
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side of the images, rounded up to patches (default: 224)",
    )
    parser.add_argument(
        "--max_images",
        type=positive,
        default=32,
        metavar="N",
        help="images to measure, evenly spaced in the folder (default: 32)",
    )
    parser.add_argument(
        "--own_thresholds",
        "--own_yardstick",
        action="store_true",
        help="tell spurious tokens by each model's own thresholds",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there, too"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with pictures there, too",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda or cpu")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run a model repository's own code",
    )


def positive(word: str) -> int:
    """The type of an option that is 1 or more."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table.

    Raises:
        ValueError: images, labels or checkpoints that do not fit.
    """
    from ..evaluation.diagnose import diagnose
    from ..outputs import check_file, write_json

    for file in (arguments.json, arguments.html):
        if file is not None:
            check_file(file)
    found = diagnose(
        arguments.checkpoints,
        arguments.images,
        size=arguments.size,
        max_images=arguments.max_images,
        labels=arguments.labels,
        num_classes=arguments.num_classes,
        own_thresholds=arguments.own_thresholds,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(found)
    if arguments.json is not None:
        write_json(arguments.json, found.to_dict())
    if arguments.html is not None:
        found.save_html(arguments.html)
