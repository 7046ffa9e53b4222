"""Recipes: flat YAML whose keys are the fields of dataclasses.

YAML is read for its structure only. What a value means is decided by the type of the
field, so ``1e-4`` is a number, ``no`` stays the word where a word is wanted, and
``0123`` is no octal.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import UniRefinerError
from ..methods.registry import check_setting, method_named, methods_with, setting_names
from ..methods.settings import MethodSettings
from ..resources import find_recipe
from ..results import Result, Table
from .arguments import UniRefinerArguments
from .keywords import ARGUMENTS

Values = list[str] | None
"""What stands behind a key: words, or nothing (null)."""

_NULLS = ("null", "none", "~")


class RecipeError(UniRefinerError):
    """A recipe or an option is wrong; the message names key, value and remedy."""


class _MappingLoader(yaml.SafeLoader):
    """Types the values of a nested mapping; unlike YAML 1.1, ``1e-4`` is a number."""


_MappingLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def field_types(dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Field name -> resolved type, over all dataclasses.

    Raises:
        RecipeError: two dataclasses have a field of the same name.
    """
    types: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            if not field.init:
                continue
            if field.name in types:
                raise RecipeError(f"two dataclasses have a field {field.name!r}.")
            types[field.name] = hints[field.name]
    return types


def read_recipe(path: str | Path) -> dict[str, Values]:
    """Keys of a YAML file and the words behind them, untyped.

    A mapping becomes one word of JSON.

    Raises:
        RecipeError: not YAML, not a flat mapping, or a key that stands there twice.
    """
    path = Path(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path.name} is not valid YAML: {problem}") from problem
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path.name} has to be a mapping of 'key: value' lines.")
    values: dict[str, Values] = {}
    for key_node, node in root.value:
        key = str(key_node.value)
        if key in values:
            line = key_node.start_mark.line + 1
            raise RecipeError(f"{path.name}, line {line}: {key!r} stands there twice.")
        values[key] = _words(node)
    return values


def _words(node: yaml.Node) -> Values:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else [str(node.value)]
    if isinstance(node, yaml.SequenceNode):
        return [word for item in node.value for word in _words(item) or ["null"]]
    return [json.dumps(yaml.load(yaml.serialize(node), Loader=_MappingLoader))]


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
        RecipeError: no such recipe or key (names the nearest valid one), a setting of
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
    return method_named("unirefiner" if name is None else name)


def _one_word(key: str, words: Values) -> str | None:
    if words is None or _is_null(words):
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
    known = ("model", "data", "method", *ARGUMENTS)
    if key in known or key in setting_names(method):
        return
    if methods_with(key):
        try:
            check_setting(method, key)
        except UniRefinerError as problem:
            raise RecipeError(f"{where}{problem}") from None
    raise RecipeError(
        f"{where}unknown key {key!r}{nearest(key, (*known, *setting_names(method)))}"
    )


def to_words(value: Any) -> Values:
    """A value of Python as a recipe writes it."""
    if value is None:
        return None
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, Enum):
        return [str(value.value)]
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in to_words(item) or ["null"]]
    return [str(value)]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message on an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def build_arguments(
    values: Mapping[str, Values], dataclass_types: Sequence[type]
) -> tuple[Any, ...]:
    """Instances of the dataclasses, in order; types come from their fields.

    Args:
        values: key -> words.

    Raises:
        RecipeError: a required key is missing, or a value is not of the field's type;
            names key, value and what was expected.
        UniRefinerError: a value its dataclass refuses.
    """
    expected = expected_values(dataclass_types)
    missing = [key for key in _required(dataclass_types) if key not in values]
    if missing:
        raise RecipeError(
            f"{missing[0]} is missing ({expected[missing[0]]}): add it to the recipe, or "
            f"give --{missing[0]}."
        )
    types = field_types(dataclass_types)
    parser = HfArgumentParser(
        dataclass_types,  # type: ignore[arg-type]
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    tokens: list[str] = []
    for key, words in values.items():
        if words is None or (_optional(types[key]) and _is_null(words)):
            if not _optional(types[key]):
                raise RecipeError(f"{key} is null; expected {expected[key]}.")
            parser.set_defaults(**{key: None})
            continue
        if not words and _holds(types[key], bool):
            words = ["true"]
        if not words or (len(words) > 1 and not _holds(types[key], list)):
            given = " ".join(words) or "without a value"
            raise RecipeError(f"{key} is {given}; expected {expected[key]}.")
        # Glued to its option, a single word may start with a dash.
        tokens += [f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words]
    try:
        return parser.parse_args_into_dataclasses(tokens, look_for_args_file=False)
    except argparse.ArgumentError as problem:
        key = str(problem.argument_name).split("/")[0].removeprefix("--")
        given = " ".join(values[key] or ())
        raise RecipeError(f"{key} is {given!r}; expected {expected[key]}.") from problem


def expected_values(dataclass_types: Sequence[type]) -> dict[str, str]:
    """Field name -> what it takes, in words: ``int``, ``'zero' or 'rand'``."""
    expected = {
        key: _type_name(annotation)
        for key, annotation in field_types(dataclass_types).items()
    }
    for dataclass_type in dataclass_types:
        for field in dataclasses.fields(dataclass_type):
            if "choices" in field.metadata:
                expected[field.name] = " or ".join(map(repr, field.metadata["choices"]))
    return expected


def _required(dataclass_types: Sequence[type]) -> list[str]:
    return [
        field.name
        for dataclass_type in dataclass_types
        for field in dataclasses.fields(dataclass_type)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def _is_null(words: list[str]) -> bool:
    return len(words) == 1 and words[0].lower() in _NULLS


def _optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _holds(annotation: Any, kind: type) -> bool:
    """Whether a type is `kind` or a union that allows it."""
    parts = get_args(annotation) if _is_union(annotation) else (annotation,)
    return any((get_origin(part) or part) is kind for part in parts)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if _is_union(annotation):
        return " or ".join(_type_name(part) for part in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(repr(member.value) for member in annotation)
    if get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation)
