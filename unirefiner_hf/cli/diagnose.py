"""``unirefiner diagnose``: how clean tokens are, on any folder of images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_place, positive
from .parser import place

if TYPE_CHECKING:
    from ..evaluation.diagnose import Diagnoses


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
        type=place,
        metavar="FOLDER",
        help="images of any kind, unlike each other",
    )
    parser.add_argument(
        "--labels",
        type=place,
        metavar="FOLDER",
        help="label maps named as the images, for k-NN retrieval",
    )
    parser.add_argument(
        "--num-classes", type=positive, metavar="N", help="classes of the labels"
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side of the images, rounded up to patches (default: 224)",
    )
    parser.add_argument(
        "--max-images",
        type=positive,
        default=32,
        metavar="N",
        help="images to measure, evenly spaced in the folder (default: 32)",
    )
    parser.add_argument(
        "--own-thresholds",
        "--own-yardstick",
        action="store_true",
        help="tell spurious tokens by each model's own thresholds",
    )
    add_place(parser)


def run(arguments: argparse.Namespace) -> Diagnoses:
    """Measure.

    Raises:
        UniRefinerError: images, labels or checkpoints that do not fit.
    """
    from ..evaluation.diagnose import diagnose

    return diagnose(
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
