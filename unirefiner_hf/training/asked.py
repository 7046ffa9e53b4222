"""What a call asks for: recipe, arguments, method and keywords put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UniRefinerError
from ..methods.registry import DEFAULT, method_settings
from ..methods.settings import MethodSettings
from .arguments import UniRefinerArguments
from .keywords import ARGUMENTS, settle, split_keywords
from .recipe import Recipe, load_recipe


def asked(
    recipe: str | Path | Recipe | None,
    args: UniRefinerArguments | None,
    method: str | MethodSettings | type[MethodSettings] | None,
    fields: Mapping[str, Any],
    read: Callable[..., Recipe] = load_recipe,
) -> Recipe:
    """One recipe of what was given; nothing of it is changed.

    Args:
        recipe: name, file, or one that is loaded and therefore whole.
        fields: of `UniRefinerArguments` and of the method's settings; they go over those of
            a recipe that is read here.
        read: reads a recipe with keywords, as `load_recipe`.

    Raises:
        UniRefinerError: something is given twice; or as `settle` and `load_recipe`.
    """
    if isinstance(method, type) and issubclass(method, MethodSettings):
        method = method.name
    if args is not None:
        if recipe is not None:
            raise UniRefinerError(
                "args and recipe both say how to run: give one of them, and keywords for "
                "what differs from the recipe."
            )
        named = DEFAULT if method is None else method
        copied, settings = settle(args, named, fields)
        return Recipe(None, None, copied, settings, keys=ARGUMENTS)
    if isinstance(recipe, Recipe):
        if method is not None or fields:
            name = "method" if method is not None else next(iter(fields))
            raise UniRefinerError(
                f"{name} is given twice: in the recipe that was loaded and as a keyword. "
                "Set it in load_recipe(...)."
            )
        return recipe
    if isinstance(method, MethodSettings):
        _, of_method = split_keywords(method, fields)
        settings = method_settings(method, of_method)
        return replace(read(recipe, method=method.name, **fields), method=settings)
    if method is not None:
        fields = {"method": method, **fields}
    return read(recipe, **fields)
