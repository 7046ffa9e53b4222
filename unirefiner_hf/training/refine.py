"""One refinement from start to finish: train, merge, and publish where asked."""

from __future__ import annotations

from collections.abc import Sequence
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
    trainer.train()
    trainer.save_model()
    pushed = trainer.push_to_hub() if trainer.args.push_to_hub else None
    if not trainer.is_world_process_zero():
        return None
    return Refined(trainer.folder, trainer.record, pushed)
