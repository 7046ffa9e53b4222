"""``unirefiner refine``: a recipe and the options that differ from it."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from ..data.arguments import DataArguments
from ..loading.arguments import BackboneArguments
from ..methods.registry import METHODS, method_named, setting_names
from ..methods.settings import ADAPTER, BORDER
from ..training.fields import Values
from ..training.options import TrainingOptions
from ..training.refused import REFUSED
from .options import Option, add_options, options_of
from .output import note
from .parser import WIDTH

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.refine import Refined

ANY_OPTION = True
"""Options of the Trainer are known when it is imported, which --help does not."""
OWN = ("config", "json", "html", "quiet", "traceback", "words", "parser")
"""What is not a key of a recipe."""

ANSWERS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0", "null", "none")
"""What may stand behind ``--resume`` in place of a folder."""
PLACES = {
    "model": Option(
        "model", "str", None, "Hub id or folder of the backbone, or starter."
    ),
    "data": Option("data", "str", None, "Folder, file or Hub id of the images."),
    "method": Option("method", "str", "unirefiner", "What trains it."),
}
"""Keys of a recipe that are no fields."""
TRAINER = (
    Option("max_steps", "int", "-1", "Steps, in place of num_train_epochs."),
    Option("gradient_accumulation_steps", "int", "1", "Batches that make a step."),
    Option(
        "gradient_checkpointing", "bool", "False", "Recompute layers to save memory."
    ),
    Option("seed", "int", "42", "Of all that is drawn."),
    Option("push_to_hub", "bool", "False", "Publish checkpoints and the result."),
    Option("hub_model_id", "str", "None", "Repository to publish to, as user/name."),
)
"""Fields of `transformers.TrainingArguments` whose class would import torch."""

RESUME = Option(
    "resume",
    "folder of a run",
    "None",
    "A run to go on with; it needs no other option, and goes on from its newest whole "
    "checkpoint. Unset: a new run. Without a folder: the run in output_dir, all options "
    "given again; with push_to_hub and none there, from the checkpoint on the Hub.",
)
BRIEF = (
    *("model", "image_size", "base_quantization", "trust_remote_code"),
    *("data", "data_split", "streaming", "max_images"),
    *("register_factor", "register_fill", "inference_register_width", "lora_rank"),
    "method",
    *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_checkpointing", "learning_rate", "lr_scheduler_type", "bf16", "seed"),
    *("output_dir", "resume", "save_steps", "report_to", "push_to_hub", "hub_model_id"),
)
"""What --help shows."""
OUTPUT = (
    *("output_dir", "resume", "logging_steps", "save_steps", "save_total_limit"),
    *("report_to", "snapshot_steps", "report_images", "push_to_hub", "hub_model_id"),
    "publish_pictures",
)


def groups() -> dict[str, list[Option]]:
    """Title -> options, of all that is ours but the settings of methods."""
    backbone, data = options_of(BackboneArguments), options_of(DataArguments)
    own = {**backbone, **data, **options_of(TrainingOptions)}
    own |= {option.name: option for option in (*TRAINER, RESUME)}
    titles = {
        "backbone": [PLACES["model"]],
        "images": [PLACES["data"]],
        "border and adapter": [],
        "method": [PLACES["method"]],
        "training": [],
        "output": [],
    }
    for name, option in own.items():
        if name in REFUSED:
            continue
        title = "training"
        if name in OUTPUT:
            title = "output"
        elif name in (*BORDER, *ADAPTER):
            title = "border and adapter"
        elif name in data:
            title = "images"
        elif name in backbone:
            title = "backbone"
        titles[title].append(option)
    return titles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its options: ``--config`` and the fields of a recipe."""
    parser.usage = (
        "unirefiner refine --config RECIPE [--field value ...], or --resume RUN"
    )
    parser.epilog = (
        "Options go over the recipe's values; 'null' unsets one. More: --help-all."
    )
    for title, options in groups().items():
        group = parser.add_argument_group(title)
        if title == "backbone":
            add_config(group)
        if title == "method":
            group.title = "method, and the settings of each, as options"
            group.description = method_lines()
        add_options(group, options, BRIEF)


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the help every option, those of the Trainer among them; imports torch."""
    from ..training.arguments import UniRefinerArguments

    every = groups()
    shown = {option.name for options in every.values() for option in options}
    for method in METHODS:
        own, whole = own_settings(method)
        title = f"method {method}" + "".join(f", and those of {m}" for m in whole)
        settings = options_of(method_named(method))
        every[title] = [settings[name] for name in own if name not in shown]
        shown.update(own)
    every["transformers.TrainingArguments"] = [
        option
        for name, option in options_of(UniRefinerArguments).items()
        if name not in shown and name not in REFUSED
    ]
    for title, options in every.items():
        group = parser.add_argument_group(title)
        if title == "backbone":
            add_config(group)
        add_options(group, options)


def add_config(group: argparse._ArgumentGroup) -> None:
    """Give a group the option of the recipe."""
    group.add_argument(
        "--config",
        metavar="RECIPE",
        help="YAML file or shipped recipe ('unirefiner recipes' lists them)",
    )


def own_settings(method: str) -> tuple[list[str], list[str]]:
    """Settings of a method, and the other methods all of whose settings it has, too."""
    names = {name: setting_names(method_named(name)) for name in METHODS}
    own = names.pop(method)
    whole = [name for name, others in names.items() if set(others) < set(own)]
    return [n for n in own if not any(n in names[m] for m in whole)], whole


def method_lines() -> str:
    """Some lines of each method's settings."""
    lines = []
    for method in METHODS:
        own, whole = own_settings(method)
        words = [name.replace("_", "-") for name in own]
        words += [f"and those of {name}" for name in whole]
        lines += textwrap.wrap(
            f"{method:12}  {' '.join(words)}",
            WIDTH - 4,
            subsequent_indent=" " * 14,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> Refined | None:
    """Refine as the recipe and the options say.

    Raises:
        UniRefinerError: no such recipe or key, or a value that does not fit.
    """
    from ..training.asked_of_run import recipe_of_run
    from ..training.distributed import disconnect
    from ..training.recipe import recipe_of_words
    from ..training.refine import refine

    words = words_asked(arguments)
    going_on = run_to_resume(words)
    if going_on is not None:
        recipe = recipe_of_run(going_on, words, arguments.config)
    else:
        recipe = recipe_of_words(arguments.config, words)
    note_left_out(recipe, arguments)
    refined = refine(recipe=recipe)
    disconnect()
    return refined


def run_to_resume(words: dict[str, Values]) -> str | None:
    """The folder that ``--resume`` names; None of a bare one, or of yes and no."""
    given = words.get("resume")
    if not given or len(given) != 1 or given[0].lower() in ANSWERS:
        return None
    return given[0]


def words_asked(arguments: argparse.Namespace) -> dict[str, Values]:
    """The options that are keys of a recipe.

    Raises:
        UsageError: an option that is none.
    """
    from ..training.keywords import ARGUMENTS

    given = {k: v for k, v in vars(arguments).items() if k not in OWN}
    settings = [n for m in METHODS for n in setting_names(method_named(m))]
    known = [n for n in (*PLACES, *ARGUMENTS, *settings) if n not in REFUSED]
    arguments.parser.check_names(given.keys() - REFUSED.keys(), known, arguments.words)
    return given


def note_left_out(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Say on stderr which settings of a recipe another method leaves out."""
    if recipe.left_out:
        note(
            f"method {recipe.method.name} does not read {', '.join(recipe.left_out)}: "
            f"left out of {recipe.name}",
            arguments,
        )
