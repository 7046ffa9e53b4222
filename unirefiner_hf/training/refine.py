"""One refinement from start to finish: train, merge, and publish where asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor

from ..export.run_folder import MERGED, PICTURE
from ..hub.push import Pushed
from ..loading.backbone import Model
from ..methods.registry import DEFAULT
from ..methods.settings import MethodSettings
from ..results import Result, Table
from .arguments import UniRefinerArguments
from .asked import asked
from .asked_of_run import recipe_of_run
from .fields import to_words
from .recipe import Recipe
from .trainer import RunError, UniRefinerTrainer


@dataclass(frozen=True)
class Refined(Result):
    """What a refinement left.

    Attributes:
        folder: of the run.
        record: the content of ``run.json``.
        pushed: what was published, None where nothing was asked to be.
    """

    folder: Path
    record: dict[str, Any]
    pushed: Pushed | None = field(default=None, compare=False)

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def merged(self) -> Path:
        """The checkpoint that `AutoModel` loads."""
        return self.folder / MERGED

    @property
    def picture(self) -> Path | None:
        """Principal components before and after, None where no image was to be shown."""
        file = self.folder / PICTURE
        return file if file.is_file() else None

    @property
    def losses(self) -> dict[str, float]:
        """Last values of the loss and its parts."""
        return dict(self.record["losses"])

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason of the images that could not be used."""
        return dict(self.record["data"]["skipped"])

    @property
    def title(self) -> str:
        """Backbone and method."""
        return f"{self.record['model']['base']}, {self.record['method']['name']}"

    def to_dict(self) -> dict[str, Any]:
        """The record, and where the files are."""
        return {"folder": str(self.folder), "merged": str(self.merged), **self.record}

    def tables(self) -> list[Table]:
        """The run, its last losses, and the shares of spurious tokens."""
        training = self.record["training"]
        run = [
            ("checkpoint", str(self.merged)),
            ("steps", str(training["steps"])),
            ("seconds", str(training["seconds"])),
            ("images", str(self.record["data"]["images"])),
            ("images that could not be used", str(len(self.skipped))),
        ]
        last = [(name, f"{value:.4g}") for name, value in self.losses.items()]
        tables = [Table(("run", ""), run), Table(("last value", ""), last)]
        shares = self.record.get("spurious_shares")
        if shares:
            kinds = shares["before"]
            tables.append(
                Table(
                    ("tokens the filters call spurious", "before", "after"),
                    [
                        (k, f"{shares['before'][k]:.1%}", f"{shares['after'][k]:.1%}")
                        for k in kinds
                    ],
                    "By the base's own limits: that tokens changed, not that they got "
                    "better.",
                )
            )
        return tables


def refine(
    model: Model | None = None,
    train_dataset: Any = None,
    args: UniRefinerArguments | None = None,
    method: str | MethodSettings | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    data: Any = None,
    processing_class: BaseImageProcessor | None = None,
    resume: str | Path | bool | None = None,
    **fields: Any,
) -> Refined | None:
    """Refine a backbone and leave everything in ``args.output_dir``.

    ``merged/`` (loads with `AutoModel`), ``adapter/``, ``before_after.png``,
    ``metrics.json``, ``run.json`` and the checkpoints; with ``push_to_hub`` the model is
    published at the end. Nothing that is given is changed.

    Args:
        model, train_dataset, args, method, callbacks, processing_class, fields: see
            `UniRefinerTrainer`; where there is a recipe, they go over it.
        recipe: name or file of a recipe, or what `load_recipe` returned.
        data: another name of `train_dataset`, as recipes have it.
        resume: folder of a run to go on with, which needs nothing else but what was in
            memory (a model, images): its own record tells the rest. What is given beside
            it has to be as it was, or change nothing of the weights. True: the run in
            ``output_dir``, all else given again.

    Returns:
        What was left; None on the processes of a launch that do not write.

    Raises:
        UniRefinerError: something is missing, wrong or given twice, or as
            `UniRefinerTrainer` and its methods.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was left.
    """
    if data is not None:
        if train_dataset is not None:
            raise RunError("The images are given twice: as train_dataset and as data.")
        train_dataset = data
    if isinstance(resume, bool):
        fields["resume"] = resume
    elif resume is not None:
        recipe = _of_run(resume, recipe, args, method, fields)
        args, method, fields = None, None, {}
    if recipe is not None:
        told = asked(recipe, args, method, fields)
        fields = {}
        model = told.model if model is None else model
        train_dataset = told.train_dataset if train_dataset is None else train_dataset
        args, method = told.args, told.method
    for name, value in (("model", model), ("data", train_dataset)):
        if value is None:
            raise RunError(
                f"{name} is missing: add it to the recipe, or give --{name} (in Python "
                f"{name}=...)."
            )
    trainer = UniRefinerTrainer(
        model,
        args,
        train_dataset,
        DEFAULT if method is None else method,
        callbacks,
        processing_class=processing_class,
        **fields,
    )
    with trainer.holding():
        trainer.train()
        trainer.save_model()
        pushed = trainer.push_to_hub() if trainer.args.push_to_hub else None
    if not trainer.is_world_process_zero():
        return None
    return Refined(trainer.folder, trainer.record, pushed)


def _of_run(
    run: str | Path,
    recipe: str | Path | Recipe | None,
    args: UniRefinerArguments | None,
    method: str | MethodSettings | None,
    fields: Mapping[str, Any],
) -> Recipe:
    """The recipe of a run that goes on, with what is given beside it."""
    for name, value, is_whole in (
        ("args", args, args is not None),
        ("recipe", recipe, isinstance(recipe, Recipe)),
    ):
        if is_whole:
            raise RunError(
                f"{name} is a {type(value).__name__}, and resume={str(run)!r} tells all of "
                "it: give only what differs, as keywords."
            )
    given = dict(fields)
    if isinstance(method, MethodSettings):
        given |= {"method": method.name, **dataclasses.asdict(method)}
    elif method is not None:
        given["method"] = method
    words = {name: to_words(value) for name, value in given.items()}
    assert not isinstance(recipe, Recipe)
    return recipe_of_run(run, words, recipe)
