"""``unirefiner push``: a run onto the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from .merge import add_merge_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="folder of a finished run, or a checkpoint-N inside a run",
    )
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub")
    parser.add_argument(
        "--private", action="store_true", help="create a private repository"
    )
    parser.add_argument(
        "--create-pr", action="store_true", help="propose it as a pull request"
    )
    parser.add_argument(
        "--tag", help="tag of the commit (default: v and the version of the recipes)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the model of a repository that another hand filled",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="folder to build in (default: published/ in the run)",
    )
    add_merge_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Push.

    Raises:
        HubError: the Hub refuses, or would have to be overwritten.
        RunFolderError: no run, or not of this base.
        ExportError: the folder could not be written.
        ReloadError: the folder does not give the trained model's tokens.
    """
    import torch

    from ..hub.push import push_run

    pushed = push_run(
        arguments.run,
        arguments.repo_id,
        output=arguments.output,
        private=arguments.private,
        create_pr=arguments.create_pr,
        force=arguments.force,
        tag=arguments.tag,
        model=arguments.model,
        model_license=arguments.license,
        register_width=arguments.register_width,
        keep_text=False if arguments.no_text else None,
        dtype=getattr(torch, arguments.dtype),
        native=arguments.native,
        max_shard_size=arguments.max_shard_size,
    )
    ways = ", ".join(
        f"{way} {error:.1e}" for way, error in pushed.check.reloaded.items()
    )
    print(
        f"Tokens: merged {pushed.check.merged:.1e} from the trained model; reloaded in a "
        f"fresh process: {ways} (relative)."
    )
    if pushed.uploaded or pushed.removed:
        removed = f", removed {len(pushed.removed)}" if pushed.removed else ""
        print(f"Uploaded {len(pushed.uploaded)} files{removed} in one commit.")
    else:
        print("Nothing to upload: the repository holds it all.")
    if pushed.pull_request is not None:
        print(f"Pull request: {pushed.pull_request}")
        return
    visibility = "private" if pushed.private else "public"
    print(f"{pushed.url} ({visibility}), commit {pushed.commit[:7]}, tag {pushed.tag}")
