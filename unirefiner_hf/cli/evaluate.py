"""``unirefiner evaluate``: the base, its controls and refined models in one table."""

from __future__ import annotations

import argparse
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from ..evaluation.arguments import EvaluationArguments
from ..evaluation.settings import DepthSettings, SegmentationSettings, ZeroShotSettings
from ..resources import find_recipe
from ..training.fields import build_arguments, check_keys, read_recipe
from .options import add_options, options_of

if TYPE_CHECKING:
    from ..evaluation.results import Evaluation

GROUPS = {
    "data and output": EvaluationArguments,
    "--task segmentation": SegmentationSettings,
    "--task depth": DepthSettings,
    "--task zero_shot": ZeroShotSettings,
}
BRIEF = (
    *("data", "task", "dataset", "num_classes", "max_train", "max_val", "seeds"),
    *("framed_base", "evaluation_output", "pictures", "device", "trust_remote_code"),
    *("fast", "crop", "stride", "iterations", "batch"),
    *("depth_scale", "depth_crop_height", "depth_crop_width", "depth_iterations"),
    *("variant", "classes_file", "window", "background_threshold"),
)
"""What --help shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options: the checkpoints and one for each field."""
    _add(parser, BRIEF)
    parser.epilog = (
        "The base with each checkpoint's border of register patches is measured, too. The "
        "self-distillation baseline ('unirefiner refine --method distillation') is the "
        "control a refined model should beat. More: --help-all."
    )


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the help every option, whole."""
    _add(parser, None)
    parser.epilog = (
        "--task zero_shot trains nothing: patches take the class whose words are nearest. "
        "The base brings the text encoder, or a refined model that kept it in text/."
    )


def _add(parser: argparse.ArgumentParser, brief: Container[str] | None) -> None:
    parser.usage = (
        "unirefiner evaluate BASE [CHECKPOINT ...] --data DATA [--field value ...]"
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="starter, Hub id, or folder of a backbone, run or merged model; base first",
    )
    what.add_argument(
        "--config", metavar="FILE", help="a YAML file of the fields below"
    )
    for title, dataclass_type in GROUPS.items():
        options = options_of(dataclass_type).values()
        add_options(parser.add_argument_group(title), options, brief, one_word=True)


def run(arguments: argparse.Namespace) -> Evaluation | None:
    """Evaluate.

    Raises:
        UniRefinerError: a value that does not fit, data or checkpoints that do not.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.tasks import is_main
    from ..training.distributed import disconnect

    evaluation = evaluate(arguments.checkpoints, **_fields(arguments))
    writes = is_main()
    disconnect()
    return evaluation if writes else None


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that a file or an option sets, each of the type of its field."""
    kinds = tuple(GROUPS.values())
    known = options_of(*kinds)
    words = {}
    if arguments.config is not None:
        path = find_recipe(arguments.config)
        words = read_recipe(path)
        check_keys(words, known, f"{path.name}: ")
    given = vars(arguments)
    words.update({name: [given[name]] for name in given if name in known})
    built = build_arguments(words, kinds)
    return {
        name: getattr(instance, name)
        for instance in built
        for name in words
        if hasattr(instance, name)
    }
