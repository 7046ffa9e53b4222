"""``unirefiner recipes``: list the shipped recipes, or copy one to edit."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..resources import find_recipe, recipe_names
from .parser import place


@dataclass(frozen=True)
class Recipes:
    """What ships: name -> backbone, None of one for accelerate launch."""

    models: dict[str, str | None]

    def to_dict(self) -> dict[str, str | None]:
        """As plain values."""
        return dict(self.models)

    def __str__(self) -> str:
        width = max(map(len, self.models))
        return "\n".join(
            f"{name:{width}}  {model or 'for accelerate launch'}"
            for name, model in self.models.items()
        )


@dataclass(frozen=True)
class Copied:
    """A recipe that was copied."""

    name: str
    file: Path

    def __fspath__(self) -> str:
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)

    def to_dict(self) -> dict[str, str]:
        """As plain values."""
        return {"name": self.name, "file": str(self.file)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.usage = "unirefiner recipes [copy NAME [DEST]]"
    parser.add_argument(
        "action", nargs="?", choices=["copy"], help="copy a recipe to edit it"
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="of a recipe, such as dinov2/small"
    )
    parser.add_argument(
        "dest",
        nargs="?",
        type=place,
        default=Path("."),
        metavar="DEST",
        help="file or folder to copy it to (default: here)",
    )


def run(arguments: argparse.Namespace) -> Recipes | Copied:
    """List or copy.

    Raises:
        RecipeNotFoundError: no such recipe.
        FileExistsError: there is such a file at the destination.
    """
    if arguments.action == "copy":
        if arguments.name is None:
            arguments.parser.error("the following arguments are required: NAME")
        return Copied(arguments.name, copy_recipe(arguments.name, arguments.dest))
    models = {}
    for name in recipe_names():
        recipe = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        models[name] = recipe.get("model")
    return Recipes(models)


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a recipe to a file or into a folder, over nothing; returns the new file."""
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() or target.is_symlink():
        raise FileExistsError(
            f"{target} exists; remove it or name another destination."
        )
    return Path(shutil.copyfile(source, target))
