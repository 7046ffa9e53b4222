"""``unirefiner recipes``: list the shipped recipes, or copy one to edit."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import yaml

from ..resources import find_recipe, recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.usage = "unirefiner recipes [copy NAME [DEST]]"
    actions = parser.add_subparsers(
        dest="action", metavar="copy", prog="unirefiner recipes"
    )
    copy = actions.add_parser("copy", help="copy a recipe to edit it")
    copy.add_argument("name", help="name of a recipe, such as dinov2/small")
    copy.add_argument(
        "dest",
        nargs="?",
        type=Path,
        default=Path("."),
        help="file or folder to copy it to (default: here)",
    )


def run(arguments: argparse.Namespace) -> None:
    """List or copy.

    Raises:
        FileNotFoundError: no such recipe.
        FileExistsError: there is such a file at the destination.
    """
    if arguments.action == "copy":
        print(copy_recipe(arguments.name, arguments.dest))
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        recipe = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        print(f"{name:{width}}  {recipe.get('model', 'for accelerate launch')}")


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a recipe to a file or into a folder, over nothing; returns the new file."""
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise FileExistsError(
            f"{target} exists; remove it or name another destination."
        )
    return Path(shutil.copyfile(source, target))
