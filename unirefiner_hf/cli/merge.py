"""``unirefiner merge``: a run's adapter into a checkpoint that loads by itself."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="folder of a finished run, or a checkpoint-N inside a run",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", type=Path, help="folder to write"
    )
    add_merge_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that is not empty"
    )


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Give a verb the options of what is written."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="where the base lies, if the run started from a local model",
    )
    parser.add_argument(
        "--license", help="of the base, such as apache-2.0, if the run does not know it"
    )
    parser.add_argument(
        "--register_width",
        metavar="PATCHES",
        type=int,
        help="frame of the merged model (default: the run's)",
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
        help="save the plain tower, without the frame and its code",
    )
    parser.add_argument(
        "--no_text",
        action="store_true",
        help="leave out text/, the unchanged text side of a dual encoder",
    )
    parser.add_argument(
        "--max_shard_size",
        metavar="SIZE",
        default="5GB",
        help="largest file of weights (default: 5GB)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Merge.

    Raises:
        RunFolderError: no run, or not of this base.
        ExportError: the folder is not empty, or could not be written.
    """
    import torch

    from ..export.run_folder import merge_run

    folder = merge_run(
        arguments.run,
        arguments.output,
        model=arguments.model,
        model_license=arguments.license,
        register_width=arguments.register_width,
        keep_text=False if arguments.no_text else None,
        dtype=getattr(torch, arguments.dtype),
        native=arguments.native,
        overwrite=arguments.overwrite,
        max_shard_size=arguments.max_shard_size,
    )
    print(f"The merged model is in {folder}.")
