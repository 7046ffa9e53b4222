"""``unirefiner extract``: dense features of images, as safetensors on disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_place, positive
from .parser import place

if TYPE_CHECKING:
    from ..evaluation.extract import Features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.epilog = "unirefiner_hf.evaluation.extract.Features reads the folder back."
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="starter, a Hub id, or a folder of a backbone, a run or a merged checkpoint",
    )
    parser.add_argument(
        "--images",
        required=True,
        type=place,
        metavar="PATH",
        help="a folder of images, searched through, or one image",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=place,
        metavar="FOLDER",
        help="a new folder, or with --overwrite one that this command wrote",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        type=positive,
        metavar="PIXELS",
        help="a side, or height and width, that every image is resized to, rounded up to "
        "patches (default: that of the pretraining)",
    )
    parser.add_argument(
        "--register-width",
        type=int,
        metavar="N",
        help="border of register patches (default: the model's own)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="images the model takes at once (default: 8)",
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=["float16", "bfloat16", "float32"],
        help="of the features (default: float16)",
    )
    parser.add_argument(
        "--shard-size",
        default="500MB",
        metavar="SIZE",
        help="largest size of a file (default: 500MB)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace features that this command wrote",
    )
    add_place(parser)


def run(arguments: argparse.Namespace) -> Features:
    """Extract.

    Raises:
        UniRefinerError: images, options or a checkpoint that do not fit.
    """
    from ..evaluation.extract import extract_features

    size = arguments.size
    return extract_features(
        arguments.model,
        arguments.images,
        arguments.output,
        size=size[0] if size is not None and len(size) == 1 else size,
        register_width=arguments.register_width,
        batch=arguments.batch,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
