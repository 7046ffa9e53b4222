"""Words of a YAML file or of a command line -> fields of dataclasses; imports no torch.

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
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import UniRefinerError

Values = list[str] | None
"""What stands behind a key: words, or nothing (null)."""

MOST_PARTS = 1000
"""Of the value of a key."""
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


def read_recipe(path: str | Path) -> dict[str, Values]:
    """Keys of a YAML file and the words behind them, untyped.

    A mapping becomes one word of JSON; a key may have '-' in place of '_'.

    Raises:
        RecipeError: not YAML, not a flat mapping, a key that stands there twice, or aliases
            without end.
    """
    path = Path(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path.name} is not valid YAML: {problem}") from problem
    except RecursionError:
        raise RecipeError(f"{path.name} is nested too deeply: keys are flat.") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path.name} has to be a mapping of 'key: value' lines.")
    values: dict[str, Values] = {}
    for key_node, node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            line = key_node.start_mark.line + 1
            raise RecipeError(f"{path.name}, line {line}: a key has to be a word.")
        key = str(key_node.value).replace("-", "_")
        if key in values:
            line = key_node.start_mark.line + 1
            raise RecipeError(f"{path.name}, line {line}: {key!r} stands there twice.")
        if not _is_small(node):
            raise RecipeError(
                f"{path.name}: the value of {key!r} has more than {MOST_PARTS} parts; "
                "aliases (*name) that hold themselves, or each other many times, are not "
                "taken."
            )
        try:
            values[key] = _words(node)
        except (yaml.YAMLError, TypeError, ValueError) as problem:
            raise RecipeError(
                f"{path.name}: {key} cannot be read: {problem}"
            ) from problem
    return values


def _is_small(node: yaml.Node) -> bool:
    """Whether a value has a number of parts that somebody wrote, its aliases written out."""
    waiting, parts = [node], 0
    while waiting and parts <= MOST_PARTS:
        part, parts = waiting.pop(), parts + 1
        if isinstance(part, yaml.SequenceNode):
            waiting += part.value
        elif isinstance(part, yaml.MappingNode):
            waiting += [child for pair in part.value for child in pair]
    return parts <= MOST_PARTS


def _words(node: yaml.Node) -> Values:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else [str(node.value)]
    if isinstance(node, yaml.SequenceNode):
        return [word for item in node.value for word in _words(item) or ["null"]]
    return [json.dumps(yaml.load(yaml.serialize(node), Loader=_MappingLoader))]


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
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        dataclass_types,  # type: ignore[arg-type]
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    tokens: list[str] = []
    for key, words in values.items():
        if words is None or (_optional(types[key]) and is_null(words)):
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
    except RecursionError:
        raise RecipeError("a value is nested too deeply.") from None
    except argparse.ArgumentError as problem:
        key = str(problem.argument_name).split("/")[0].removeprefix("--")
        given = " ".join(values[key] or ())
        raise RecipeError(f"{key} is {given!r}; expected {expected[key]}.") from problem


def check_keys(keys: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Refuse keys that are none.

    Args:
        where: the file they stand in, said before.

    Raises:
        RecipeError: names the nearest one.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise RecipeError(f"{where}unknown key {key!r}{nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message on an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def is_null(words: list[str]) -> bool:
    """Whether one word stands for nothing."""
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
