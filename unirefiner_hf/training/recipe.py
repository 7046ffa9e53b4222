"""Recipes: flat YAML whose keys are fields of the arguments and of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UniRefinerError
from ..methods.registry import (
    DEFAULT,
    check_setting,
    method_named,
    methods_with,
    setting_names,
)
from ..methods.settings import MethodSettings
from ..resources import find_recipe
from ..results import Result, Table
from .arguments import UniRefinerArguments
from .fields import (
    RecipeError,
    Values,
    build_arguments,
    check_keys,
    is_null,
    read_recipe,
    to_words,
)
from .keywords import ARGUMENTS


@dataclass(frozen=True)
class Recipe(Result):
    """What a run is made of: `refine(recipe=...)` takes it, and so do the four parts.

    Attributes:
        model: name or folder of the backbone; None where the recipe names none.
        train_dataset: name or folder of the images; None where the recipe names none.
        args: of the run.
        method: settings of the method.
        name: of the recipe, None of one made of keywords alone.
        keys: fields of `args` and `method` that are set.
        left_out: keys of the recipe that the method asked for in place of its own does not
            read.
    """

    model: str | None
    train_dataset: str | None
    args: UniRefinerArguments
    method: MethodSettings
    name: str | None = None
    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and method."""
        return f"{self.name or 'recipe'}: {self.method.name}"

    def to_dict(self) -> dict[str, Any]:
        """Every key that is set, as a recipe file has them."""
        values: dict[str, Any] = {}
        for key in self.keys:
            holder = self.method if hasattr(self.method, key) else self.args
            values[key] = getattr(holder, key)
        named = {"model": self.model, "data": self.train_dataset}
        named = {key: value for key, value in named.items() if value is not None}
        return {**named, "method": self.method.name, **values}

    def tables(self) -> list[Table]:
        """Key and value of all that is set."""
        rows = [(name, str(value)) for name, value in self.to_dict().items()]
        return [Table(("key", "value"), rows)]


def load_recipe(recipe: str | Path | None = None, /, **fields: Any) -> Recipe:
    """A recipe with some of its keys set otherwise.

    Args:
        recipe: name of a shipped one, such as ``dinov2/small``, or a YAML file; None starts
            from nothing.
        fields: keys of a recipe: ``model``, ``data``, ``method``, fields of
            `UniRefinerArguments` and of the method's settings. With another ``method`` than
            the recipe's, settings of the recipe that it does not read are left out.

    Raises:
        RecipeNotFoundError: no such recipe.
        RecipeError: no such key (names the nearest valid one), a setting of
            another method, a value of another type, or as `read_recipe`.
        UniRefinerError: a value that is out of its range.
    """
    words = {name: to_words(value) for name, value in fields.items()}
    return recipe_of_words(recipe, words)


def recipe_of_words(
    recipe: str | Path | None, overrides: Mapping[str, Values]
) -> Recipe:
    """`load_recipe` with the words of a command line."""
    path = None if recipe is None else find_recipe(str(recipe))
    told = {} if path is None else read_recipe(path)
    before, after = _method_of(told), _method_of({**told, **overrides})
    left_out = []
    if after is not before:
        left_out = [key for key in told if _unread(key, after)]
        told = {key: words for key, words in told.items() if key not in left_out}
    for source, keys in ((path, told), (None, overrides)):
        where = "" if source is None else f"{source.name}: "
        for key in keys:
            _check_key(key, after, where)
    values = {**told, **overrides}
    places = {key: values.pop(key, None) for key in ("model", "data", "method")}
    args, settings = build_arguments(values, (UniRefinerArguments, after))
    return Recipe(
        model=_one_word("model", places["model"]),
        train_dataset=_one_word("data", places["data"]),
        args=args,
        method=settings,
        name=None if recipe is None else str(recipe),
        keys=tuple(values),
        left_out=tuple(left_out),
    )


def _method_of(values: Mapping[str, Values]) -> type[MethodSettings]:
    name = _one_word("method", values.get("method"))
    return method_named(DEFAULT if name is None else name)


def _one_word(key: str, words: Values) -> str | None:
    if words is None or is_null(words):
        return None
    if len(words) != 1:
        given = " ".join(words) or "without a value"
        raise RecipeError(f"{key} is {given}; expected one word.")
    return words[0]


def _unread(key: str, method: type[MethodSettings]) -> bool:
    """Whether a key belongs to methods, and not to this one."""
    if key in method.unread:
        return True
    return bool(methods_with(key)) and key not in setting_names(method)


def _check_key(key: str, method: type[MethodSettings], where: str) -> None:
    known = ("model", "data", "method", *ARGUMENTS, *setting_names(method))
    if key not in known and methods_with(key):
        try:
            check_setting(method, key)
        except UniRefinerError as problem:
            raise RecipeError(f"{where}{problem}") from None
    check_keys([key], known, where)
