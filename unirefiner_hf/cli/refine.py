"""``unirefiner refine``: a recipe and the options that differ from it."""

from __future__ import annotations

import argparse
import dataclasses

from ..methods.settings import UniRefinerSettings
from ..resources import find_recipe
from ..training.arguments import DataArguments, ModelArguments, RefineTrainingArguments
from ..training.recipe import Values, build_arguments, expected_values, load_recipe

GROUPS = {
    "model": ModelArguments,
    "data": DataArguments,
    "method (UniRefiner)": UniRefinerSettings,
    "training": RefineTrainingArguments,
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
        ValueError: an unknown key, or a value that does not fit.
    """
    model, data, method, training = build_arguments(
        recipe_values(arguments), DATACLASSES
    )

    from ..training.distributed import disconnect
    from ..training.run import refine

    refine(model, data, method, training)
    disconnect()


def recipe_values(arguments: argparse.Namespace) -> dict[str, Values]:
    """The recipe's words with the options over them.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key.
    """
    options = vars(arguments)
    path = None if arguments.config is None else find_recipe(arguments.config)
    fields = expected_values(DATACLASSES)
    overrides = {name: options[name] for name in options if name in fields}
    return load_recipe(path, overrides, DATACLASSES)
