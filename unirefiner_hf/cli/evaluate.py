"""``unirefiner evaluate``: the base, its controls and refined models in one table."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from ..evaluation.arguments import EvaluationArguments
from ..evaluation.depth import DepthSettings
from ..evaluation.segmentation import SegmentationSettings
from ..evaluation.zero_shot import ZeroShotSettings
from ..resources import find_recipe
from ..training.recipe import Values, build_arguments, expected_values, load_recipe

GROUPS = {
    "data and output": EvaluationArguments,
    "segmentation": SegmentationSettings,
    "depth": DepthSettings,
    "zero-shot segmentation": ZeroShotSettings,
}
DATACLASSES = tuple(GROUPS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options: the checkpoints and one for each field."""
    parser.usage = (
        "unirefiner evaluate BASE [CHECKPOINT ...] --data DATA [--field value]"
    )
    parser.epilog = (
        "--task zero_shot trains nothing: patches take the class whose words are nearest. "
        "The base brings the text encoder, or a refined model that kept it in text/. "
        "The base with each checkpoint's border of register patches is measured, too. The "
        "self-distillation baseline ('unirefiner refine --method plain') is the control a "
        "refined model should beat."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="the base first: starter, a Hub id, a folder of a backbone, of a run or of a "
        "merged checkpoint",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of the fields below"
    )
    expected = expected_values(DATACLASSES)
    for title, dataclass_type in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(dataclass_type):
            _add_field(group, field, expected[field.name])


def _add_field(
    group: argparse._ArgumentGroup, field: dataclasses.Field, expected: str
) -> None:
    missing = field.default is dataclasses.MISSING
    given = "required" if missing else f"default: {field.default}"
    text = f"{field.metadata.get('help', '')} [{expected}; {given}]"
    options: dict[str, typing.Any] = {"metavar": "VALUE"}
    if "bool" in expected:
        options.update(nargs="?", const="true")
    group.add_argument(
        f"--{field.name}",
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
        **options,
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print the table.

    Raises:
        ValueError: a value that does not fit, data or checkpoints that do not.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.tasks import is_main
    from ..training.distributed import disconnect

    options = vars(arguments)
    path = None if arguments.config is None else find_recipe(arguments.config)
    fields = expected_values(DATACLASSES)
    overrides: dict[str, Values] = {
        name: [options[name]] for name in options if name in fields
    }
    values = load_recipe(path, overrides, DATACLASSES)
    built = build_arguments(values, DATACLASSES)
    given = {
        name: getattr(instance, name)
        for instance in built
        for name in values
        if hasattr(instance, name)
    }
    evaluation = evaluate(arguments.checkpoints, **given)
    if is_main():
        print(evaluation)
    disconnect()
