"""Checkpoints of a run: whole or not at all, and without a pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

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
from .distributed import (
    fail_together,
    gather_named,
    highest,
    wait_for_all,
    whole_trainable,
)
from .state_tree import load_tree, random_states, restore_random_states, save_tree


class RefinementCheckpoints(Trainer):
    """The part of the trainer that saves and resumes.

    - A checkpoint holds the adapter (as PEFT saves it), the learnable border if there is
      one, and the state needed to resume, all as safetensors or JSON; under DeepSpeed
      and FSDP the optimiser's state is the engine's own.
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

    lazy_channels: list[int]
    asked: dict[str, Any]
    skipped: dict[str, str]
    last_metrics: dict[str, float]
    objective_type: type[Objective]
    _is_staging = False
    _is_wrapped = False

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
        self._check_shape_of_run(folder)
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
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps
        kind = self.accelerator.distributed_type.value if self.is_sharded else "whole"
        return {
            "total_batch": batch * args.world_size,
            "processes": args.world_size,
            "state": f"{kind} ZeRO-{self._zero_stage}" if self._zero_stage else kind,
        }

    @property
    def _zero_stage(self) -> int:
        if not self.is_deepspeed_enabled:
            return 0
        return int(self.accelerator.state.deepspeed_plugin.zero_stage)

    def _check_shape_of_run(self, folder: Path) -> None:
        saved, now = read_refiner_state(folder), self._shape_of_run()
        sharded = self.is_sharded or saved.get("state", "whole") != "whole"
        for name in ("total_batch", "state", "processes"):
            before = saved.get(name, now[name])
            if before != now[name] and (sharded or name != "processes"):
                raise CheckpointError(
                    f"{folder.name} was written with {name} {before}, this run has "
                    f"{now[name]}: launch with the same number of processes, batch and "
                    "accumulation, and the same accelerate file."
                )

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
            self._check_shape_of_run(folder)
            self._resume_stream(folder)
            self.skipped.update(read_refiner_state(folder)["skipped"])
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # The base would insist on the frozen weights, which checkpoints leave out.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        loaded, _ = self._engine.load_checkpoint(
            resume_from_checkpoint, load_module_strict=False
        )
        if loaded is None:
            raise CheckpointError(
                f"{Path(resume_from_checkpoint).name} holds no DeepSpeed state."
            )
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, engine = Path(output_dir), self._engine
        if engine is not None:
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            for state, name in self._stateful:
                save_tree(state.state_dict(), folder / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for state, name in self._stateful:
            state.load_state_dict(load_tree(Path(checkpoint) / name))

    @property
    def _engine(self) -> Any:
        """DeepSpeed's engine, None without DeepSpeed."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    @property
    def _stateful(self) -> list[tuple[Any, str]]:
        """What is saved beside the adapter; DeepSpeed keeps the optimiser's itself."""
        scheduler = (self.lr_scheduler, SCHEDULER_STATE)
        if self.is_deepspeed_enabled:
            return [scheduler]
        return [(self.optimizer, OPTIMIZER_STATE), scheduler]

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
        file = folder / stream_file(self.args.process_index)
        if not file.is_file():
            raise CheckpointError(
                f"{folder.name} has no {file.name}: it was written without --streaming, or "
                "by fewer processes. Continue as it was started."
            )
        self.train_dataset.resume(json.loads(file.read_text()))
