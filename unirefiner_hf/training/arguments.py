"""Everything a run is told beside its backbone, its images and its method."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ..data.arguments import DataArguments
from ..errors import UniRefinerError, as_users, require
from ..loading.arguments import BackboneArguments
from ..values import check_values
from .distributed import connect_cpus, needs_gloo
from .options import TrainingOptions
from .refused import BOUNDS, REFUSED

PUBLISHED_BATCH = 16
"""Images a step at which the published learning rate holds."""
MEASURING = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a measurement."""


@dataclass
class UniRefinerArguments(  # type: ignore[misc]
    TrainingOptions,
    DataArguments,
    BackboneArguments,
    TrainingArguments,
):
    """Arguments of a run: ``UniRefinerArguments("runs/mine", max_steps=75)``.

    The fields are those of `transformers.TrainingArguments` with the published defaults of
    a refinement, of `BackboneArguments` (image size, border of registers, adapter) and of
    `DataArguments`. Nothing changes them: a trainer works on a copy.

    UniRefiner (arXiv 2605.19622): AdamW, learning rate 1e-4 at a total batch of 16
    scaled linearly, weight decay 0.1, constant schedule, 2 epochs, bf16. Gradient
    clipping is not published: 1.0, the default of transformers. Activation
    checkpointing, where switched on, is the non-reentrant one, its default too.

    Raises:
        UniRefinerError: a value is outside its range, or output_dir is not set.
    """

    def __post_init__(self) -> None:
        self.check_backbone()
        self.check_data()
        if not self.output_dir:
            raise UniRefinerError(
                "output_dir is not set: name a folder for the run (--output-dir)."
            )
        self._check_training()
        if self.push_to_hub and "/" not in (self.hub_model_id or ""):
            raise UniRefinerError(
                f"push_to_hub needs hub_model_id, as user/name; it is {self.hub_model_id!r}."
            )
        if self.bf16 is None:
            self.bf16 = (
                not self.use_cpu
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported()
            )
        if self.dataloader_num_workers is None:
            gpu = not self.use_cpu and torch.cuda.is_available()
            self.dataloader_num_workers = min(4, os.cpu_count() or 1) if gpu else 0
        if self.ddp_backend is None and needs_gloo():
            self.ddp_backend = "gloo"
        connect_cpus(self.ddp_timeout)
        with as_users("arguments of the run", Exception):
            TrainingArguments.__post_init__(self)
        if self.device.type == "cpu":  # torch warns of what it cannot do
            self.dataloader_pin_memory = False

    def _check_training(self) -> None:
        """Refuse what a run does not read, and numbers that are out of range."""
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), _default(field)
            # HfArgumentParser takes "no" for False.
            unset = value == default or (value is False and default == "no")
            if field.name in REFUSED and not unset:
                raise UniRefinerError(
                    f"{field.name} is {value!r}, which is not "
                    f"supported: {REFUSED[field.name]}."
                )
        check_values(self, TrainingOptions)
        check_values(self, TrainingArguments, bounds=BOUNDS)
        require(
            self,
            "max_steps",
            self.max_steps != 0,
            "at least 1, or -1 for num_train_epochs",
        )
        require(
            self,
            "lr_scheduler_type",
            self.lr_scheduler_type not in MEASURING,
            "another schedule: a run measures nothing that this one could follow",
        )
        require(
            self,
            "save_strategy",
            self.save_strategy != "best",
            "no, steps or epoch: a run measures nothing to know the best",
        )
        require(
            self,
            "train_sampling_strategy",
            self.train_sampling_strategy in ("random", "sequential"),
            "random or sequential: all images are of one size",
        )

    def scaled_learning_rate(self, total_batch: int) -> float:
        """The learning rate for a total batch, linear with the published one at 16."""
        if not self.scale_learning_rate:
            return self.learning_rate
        return self.learning_rate * total_batch / PUBLISHED_BATCH


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
