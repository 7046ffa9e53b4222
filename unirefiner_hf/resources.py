"""Where the recipes and the templates of model cards lie."""

from __future__ import annotations

import difflib
from pathlib import Path

from .errors import UniRefinerError

PACKAGE = Path(__file__).resolve().parent


class RecipeNotFoundError(UniRefinerError, FileNotFoundError):
    """There is no recipe of that name."""


def resource_folder(name: str) -> Path:
    """Folder `recipes` or `model_cards`.

    In an installed wheel it lies inside the package, in a checkout beside it.

    Raises:
        FileNotFoundError: it lies in neither place: a broken installation.
    """
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(
        f"unirefiner_hf is installed without its folder {name!r}: install it again."
    )


def recipe_names() -> list[str]:
    """Names of the shipped recipes, such as ``dinov2/small``, sorted."""
    folder = resource_folder("recipes")
    files = folder.rglob("*.yaml")
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeNotFoundError: neither; names the nearest shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = name.removesuffix(".yaml")
    if shipped in recipe_names():
        return resource_folder("recipes") / f"{shipped}.yaml"
    near = difflib.get_close_matches(shipped, recipe_names(), n=3, cutoff=0.4)
    hint = f"Near: {', '.join(near)}. " if near else ""
    raise RecipeNotFoundError(
        f"{name!r} is neither a file nor a shipped recipe. {hint}"
        "'unirefiner recipes' lists them."
    )
