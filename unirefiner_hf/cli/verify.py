"""``unirefiner verify``: a model's files against the sha256 in the card."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hub.verify import Verified


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.epilog = "Exits with 1 if a file is not what was published."
    parser.add_argument(
        "checkpoint", metavar="USER/NAME", help="repository on the Hub, or a folder"
    )
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument(
        "--force-download",
        action="store_true",
        help="fetch every file anew instead of trusting the cache",
    )


def run(arguments: argparse.Namespace) -> Verified:
    """Verify.

    Raises:
        HubError: the card states no checksums.
    """
    from ..hub.verify import verify

    return verify(
        arguments.checkpoint,
        revision=arguments.revision,
        force_download=arguments.force_download,
    )
