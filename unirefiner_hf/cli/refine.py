"""``unirefiner refine``: a recipe and the options that differ from it."""

from __future__ import annotations

import argparse
import dataclasses

from ..methods.registry import METHODS, method_named
from ..training.arguments import UniRefinerArguments
from ..training.recipe import Values, expected_values, recipe_of_words

GROUPS = {
    "arguments": UniRefinerArguments,
    **{f"method {name}": method_named(name) for name in METHODS},
}
DATACLASSES = tuple(GROUPS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options: ``--config`` and one for each field."""
    parser.usage = "unirefiner refine --config RECIPE [--field value ...]"
    parser.epilog = "Options go over the recipe's values; 'null' unsets one."
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="a YAML file, or the name of a shipped recipe ('unirefiner recipes')",
    )
    expected = expected_values(DATACLASSES)
    for title, dataclass_type in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(dataclass_type):
            if field.init:
                _add_field(group, field, expected[field.name])


def _add_field(
    group: argparse._ArgumentGroup, field: dataclasses.Field, expected: str
) -> None:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    given = "required" if default is dataclasses.MISSING else f"default: {default}"
    group.add_argument(
        f"--{field.name}",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help=f"{field.metadata.get('help', '')} "
        f"[{f'{expected}; {given}'.replace('%', '%%')}]",
    )


def run(arguments: argparse.Namespace) -> None:
    """Refine as the recipe and the options say.

    Raises:
        FileNotFoundError: no such recipe.
        UniRefinerError: an unknown key, or a value that does not fit.
    """
    from ..training.distributed import disconnect
    from ..training.refine import refine

    recipe = recipe_of_words(arguments.config, recipe_overrides(arguments))
    refine(recipe=recipe)
    disconnect()


def recipe_overrides(arguments: argparse.Namespace) -> dict[str, Values]:
    """The options that are keys of a recipe."""
    options = vars(arguments)
    return {name: options[name] for name in options if name not in ("config", "verb")}
