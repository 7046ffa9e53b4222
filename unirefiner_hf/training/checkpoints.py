"""Checkpoints of a run: whole or not at all, and without a pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ..data.streams import RefinementStream
from ..export.run_folder import (
    OPTIMIZER_STATE,
    REFINER_STATE,
    SCHEDULER_STATE,
    STAGING,
    TRAINER_STATE,
    checkpoint_name,
    last_checkpoint_step,
    random_state_file,
    read_refiner_state,
    stream_file,
)
from ..export.whole import write_manifest
from ..loading.adapter import CheckpointError, below, load_adapter, save_adapter
from ..methods.objective import Objective
from ..outputs import put_in_place
from .arguments import UniRefinerArguments
from .distributed import (
    fail_together,
    gather_named,
    highest,
    wait_for_all,
    whole_trainable,
)
from .split import Split, check_split, current_state
from .state_tree import load_tree, random_states, restore_random_states, save_tree
from .zero_state import (
    gather_optimizer,
    is_elementwise,
    names_by_group,
    restore_optimizer,
    without_empty_groups,
)


class RefinementCheckpoints(Trainer):
    """The part of the trainer that saves and resumes.

    - A checkpoint holds the adapter (as PEFT saves it), the learnable border if there is
      one, and the state needed to resume, all as safetensors or JSON, which any split over
      processes can take up (see `split`); under FSDP the optimiser's state is the engine's
      own.
    - It appears whole or not at all: it is written beside the run, flushed to the disk and
      renamed, so a kill or a power cut during saving leaves the one before. A list of its
      files with their digests tells later whether it still is whole.

    Attributes:
        lazy_channels: channels left out of cosines, kept in every checkpoint.
        asked: what the weights follow from, see `identity`; kept likewise.
        skipped: name -> reason of the images that could not be used.
        last_metrics: name -> last logged value of the loss and its parts.
        objective_type: class of the objective, which names its metrics; `refiner` walks
            through the model, too dear for every step.
    """

    args: UniRefinerArguments
    optimizer: Any
    lr_scheduler: Any
    lazy_channels: list[int]
    asked: dict[str, Any]
    skipped: dict[str, str]
    last_metrics: dict[str, float]
    objective_type: type[Objective]
    _is_staging = False
    _is_wrapped = False
    _groups: list[list[str]]

    @property
    def refiner(self) -> Objective:
        """The objective without the wrappers of DDP, DeepSpeed or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(str(self.args.output_dir))

    def last_good(self) -> str:
        """What is left of the run, in a sentence."""
        step = last_checkpoint_step(self.folder)
        if step is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {checkpoint_name(step)}."

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        raise NotImplementedError

    def restore_finished(self, folder: Path) -> bool:
        """Take a checkpoint as the run's end if there is no step left to train.

        `Trainer` would train one more. Returns whether that is so.
        """
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        if state.global_step < self.planned_steps():
            return False
        check_split(folder, self.args)
        load_adapter(self.refiner.model, folder)
        self.skipped.update(read_refiner_state(folder)["skipped"])
        self.state = state
        for entry in state.log_history:
            names = ("loss", *self.objective_type.METRICS)
            found = {k: v for k, v in entry.items() if k in names}
            self.last_metrics.update(found)
        return True

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = checkpoint_name(self.state.global_step)
        staging = run / STAGING
        wait_for_all()
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        wait_for_all()
        self.skipped = gather_named(self.skipped)
        self._is_staging = True
        problem: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            problem = error
        finally:
            self._is_staging = False
        # An engine's own saving waits for all processes: there, one that failed ends the
        # run by itself.
        failed = problem is not None
        if not (failed and self.is_sharded):
            failed = bool(highest(int(failed), self.args.device))
        if failed:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise self._unwritten(name, problem) from problem
        if self.args.should_save:
            try:
                write_manifest(staging / name)
                put_in_place(staging / name, run / name)
            except OSError as error:
                problem = self._unwritten(name, error)
            shutil.rmtree(staging, ignore_errors=True)
        fail_together(problem)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run), save_total_limit=self.args.save_total_limit
            )
        wait_for_all()

    def _unwritten(self, name: str, problem: Exception | None) -> CheckpointError:
        return CheckpointError(
            f"{name} could not be written: {problem or 'another process failed'}. "
            f"{self.last_good()} Free space in the output folder, then continue with "
            f"--resume {self.folder}."
        )

    @property
    def is_sharded(self) -> bool:
        """Whether DeepSpeed or FSDP holds the model's or the optimiser's state."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def parts_weights(self) -> bool:
        """Whether no process holds every weight (ZeRO-3, FSDP)."""
        return bool(self.is_fsdp_enabled or self._zero_stage == 3)

    def save_adapter(self, folder: Path) -> None:
        """Write the trained adapter as PEFT does; to be called on every process."""
        weights: dict[str, Tensor] | None = None
        if not self._is_wrapped:
            pass
        elif self.is_deepspeed_enabled:
            weights = whole_trainable(self.refiner)
        elif self.is_fsdp_enabled:
            weights = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            weights = None if weights is None else below(weights, "model.")
            save_adapter(self.refiner.model, folder, weights)

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> Any:
        """Of the weights, only the adapter is gathered and written: a checkpoint's."""
        folder = Path(output_dir) if output_dir else self.folder
        self.save_adapter(folder)
        self._save_refiner_state(folder)

    def _save_refiner_state(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        state = {
            "lazy_channels": self.lazy_channels,
            "skipped": self.skipped,
            **self._shape_of_run(),
            "asked": self.asked,
        }
        (folder / REFINER_STATE).write_text(json.dumps(state, indent=2) + "\n")

    def _shape_of_run(self) -> dict[str, Any]:
        """What a checkpoint's state depends on beside the recipe."""
        own = self.is_fsdp_enabled
        if self._engine is not None:
            own = not is_elementwise(self._engine)
        kind = current_state(self.args) if own else "whole"
        return {**Split.of(self.args).to_dict(), "state": kind}

    @property
    def _zero_stage(self) -> int:
        if not self.is_deepspeed_enabled:
            return 0
        return int(self.accelerator.state.deepspeed_plugin.zero_stage)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.refiner.model, Path(resume_from_checkpoint))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        self._is_wrapped = True
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            check_split(folder, self.args)
            self._resume_stream(folder)
            self.skipped.update(read_refiner_state(folder)["skipped"])
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # The base would insist on the frozen weights, which checkpoints leave out.
        folder = Path(resume_from_checkpoint)
        load_adapter(self.refiner.model, folder)
        weights = {
            name: parameter.detach().float().cpu().clone()
            for name, parameter in self.refiner.named_parameters()
            if parameter.requires_grad
        }
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if (folder / OPTIMIZER_STATE).is_file():
            self._load_optimizer_and_scheduler(resume_from_checkpoint, weights)
            return prepared
        # A pickle; `check_split` has asked.
        loaded, _ = self._engine.load_checkpoint(
            resume_from_checkpoint, load_module_strict=False
        )
        if loaded is None:
            raise CheckpointError(f"{folder.name} holds no state of the optimiser.")
        self.lr_scheduler.load_state_dict(load_tree(folder / SCHEDULER_STATE))
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, without groups that no parameter is in, as under DeepSpeed."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            groups = optimizer.param_groups
            groups[:] = [group for group in groups if group["params"]]
            if self.is_deepspeed_enabled:
                self._groups = names_by_group(optimizer, self.refiner)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, engine = Path(output_dir), self._engine
        state: dict[str, Any] | None = None
        if engine is None:
            state = self.optimizer.state_dict()
        elif is_elementwise(engine):
            state = gather_optimizer(engine, self._groups)
        else:
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if not self.args.should_save:
            return
        save_tree(self.lr_scheduler.state_dict(), folder / SCHEDULER_STATE)
        if state is not None:
            save_tree(state, folder / OPTIMIZER_STATE)

    def _load_optimizer_and_scheduler(
        self, checkpoint: str | None, weights: dict[str, Tensor] | None = None
    ) -> None:
        if checkpoint is None:
            return
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = load_tree(Path(checkpoint) / OPTIMIZER_STATE)
        schedule = load_tree(Path(checkpoint) / SCHEDULER_STATE)
        without_empty_groups(state, schedule)
        self.lr_scheduler.load_state_dict(schedule)
        if self._engine is None:
            self.optimizer.load_state_dict(state)
        else:
            restore_optimizer(self._engine, self._groups, state, weights or {})

    @property
    def _engine(self) -> Any:
        """DeepSpeed's engine, None without DeepSpeed."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_tree(
            random_states(),
            Path(output_dir) / random_state_file(self.args.process_index),
        )
        if isinstance(self.train_dataset, RefinementStream):
            state = json.dumps(self.train_dataset.state())
            (Path(output_dir) / stream_file(self.args.process_index)).write_text(
                state + "\n"
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = Path(checkpoint) / random_state_file(self.args.process_index)
        # Batches seed themselves: a run on more processes than before lacks nothing.
        if file.is_file():
            restore_random_states(load_tree(file))

    def _resume_stream(self, folder: Path) -> None:
        if not isinstance(self.train_dataset, RefinementStream):
            return
        files = [folder / stream_file(0)]
        while files[-1].is_file():
            files.append(folder / stream_file(len(files)))
        if len(files) == 1:
            raise CheckpointError(
                f"{folder.name} has no {files[0].name}: it was written without --streaming. "
                "Continue as it was started."
            )
        states = [json.loads(file.read_text()) for file in files[:-1]]
        self.train_dataset.resume(states)
