"""``unirefiner push``: a run onto the Hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .merge import add_merge_options, merge_options
from .parser import place

if TYPE_CHECKING:
    from ..hub.push import Pushed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=place,
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
        help="replace the model of a repository that another hand filled, and remove its "
        "weights and code",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=place,
        help="folder to build in (default: published/ in the run)",
    )
    add_merge_options(parser)


def run(arguments: argparse.Namespace) -> Pushed:
    """Push.

    Raises:
        HubError: the Hub refuses, or would have to be overwritten.
        RunFolderError: no run, or not of this base.
        ExportError: the folder could not be written.
        ReloadError: the folder does not give the trained model's tokens.
    """
    from ..hub.push import push

    return push(
        arguments.run,
        arguments.repo_id,
        output=arguments.output,
        private=arguments.private,
        create_pr=arguments.create_pr,
        force=arguments.force,
        tag=arguments.tag,
        **merge_options(arguments),
    )
