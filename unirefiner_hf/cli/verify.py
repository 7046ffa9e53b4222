"""``unirefiner verify``: weight files against the sha256 in the card."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument(
        "checkpoint", metavar="USER/NAME", help="repository on the Hub, or a folder"
    )
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument(
        "--force-download",
        action="store_true",
        help="fetch every file anew instead of trusting the cache",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify; 1 if a file is not what was published.

    Raises:
        HubError: the card states no checksums.
    """
    from ..hub.verify import verify

    found = verify(
        arguments.checkpoint,
        revision=arguments.revision,
        force_download=arguments.force_download,
    )
    for name in found.right:
        print(f"right     {name}")
    for name, (stated, actual) in found.wrong.items():
        print(f"WRONG     {name}: the card says {stated}, the file is {actual}")
    for name in found.missing:
        print(f"MISSING   {name}")
    for name in found.unlisted:
        print(f"UNLISTED  {name}: the card does not name it")
    if found.passed:
        print(f"{len(found.right)} weight files are as published.")
        return 0
    print(
        "Do not use this checkpoint. If a download went wrong, --force-download mends it; "
        "otherwise tell its owner."
    )
    return 1
