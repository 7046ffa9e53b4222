"""``unirefiner merge``: a run's adapter into a checkpoint that loads by itself."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .parser import place

if TYPE_CHECKING:
    from ..export.merge import Merged

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=place,
        help="folder of a finished run, or a checkpoint-N inside a run",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", type=place, help="folder to write"
    )
    add_merge_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that unirefiner wrote"
    )


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options of what is written."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="where the base lies, if the run started from a local model",
    )
    parser.add_argument(
        "--license", help="of the base, such as apache-2.0, if the run does not know it"
    )
    parser.add_argument(
        "--register-width",
        metavar="PATCHES",
        type=int,
        help="border of register patches of the merged model (default: the run's)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the saved weights; the merge is in float32 (default: float32)",
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="save the bare backbone, without the border of registers and its code",
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="leave out text/, the unchanged text encoder of a dual encoder",
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="put before_after.png, which shows training images, beside the model",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest file of weights (default: 5GB)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the base repository's own code",
    )


def merge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options as keywords of `merge` and `push`."""
    return {
        "model": arguments.model,
        "model_license": arguments.license,
        "register_width": arguments.register_width,
        "keep_text": False if arguments.no_text else None,
        "dtype": arguments.dtype,
        "native": arguments.native,
        "max_shard_size": arguments.max_shard_size,
        "pictures": arguments.pictures,
        "trust_remote_code": arguments.trust_remote_code,
    }


def run(arguments: argparse.Namespace) -> Merged:
    """Merge.

    Raises:
        RunFolderError: no run, or not of this base.
        ExportError: the folder is not empty, or could not be written.
    """
    from ..export.merge import merge

    return merge(
        arguments.run,
        arguments.output,
        overwrite=arguments.overwrite,
        **merge_options(arguments),
    )
