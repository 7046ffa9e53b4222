"""Trainer of refinement objectives on `transformers.Trainer`."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..data.unlabelled import RefinementStream
from ..loading.unlocked import UnlockedTower
from ..methods import ph_reg
from ..methods.unirefiner import FILTERS, LOSS_TERMS, UniRefinerObjective
from ..modeling.modeling_unirefiner import UniRefinerModel
from .arguments import RefineTrainingArguments
from .callbacks import GracefulStop, RefinementProgress
from .distributed import (
    batch_seed,
    gather_named,
    highest,
    wait_for_all,
    whole_trainable,
)
from .state_tree import load_tree, random_states, restore_random_states, save_tree

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_PARAMETERS = ("register_patch", "register_tokens")
"""Of the register model itself; each in a file of its name where there is one."""
REFINER_STATE = "refiner_state.json"
OPTIMIZER_STATE = "optimizer.safetensors"
SCHEDULER_STATE = "scheduler.safetensors"
TRAINER_STATE = "trainer_state.json"
STAGING = ".unfinished"
TERMS = (*LOSS_TERMS, *ph_reg.LOSS_TERMS)
METRICS = (*TERMS, "theta", "clean_ratio", *FILTERS)


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit this run."""


class RefinementTrainer(Trainer):
    """`transformers.Trainer` for an objective whose forward returns loss and metrics.

    What differs from its base:

    - a checkpoint holds the adapter (as PEFT saves it), the learnable frame if there is
      one, and the state needed to resume, all as safetensors or JSON; under DeepSpeed
      and FSDP the optimiser's state is the engine's own;
    - a checkpoint appears whole or not at all: it is written beside the run and
      renamed, so a kill during saving leaves the one before;
    - loss terms, clean ratio and the share each filter rejects are averaged over
      steps and processes and logged with the loss;
    - a loss that is not finite in one process stops all before the weights change;
    - whatever a batch draws (crops, strips, dropout) follows from the seed and the
      batch's place in the run, so it does not matter which process computes it;
    - images the data set had to skip are counted in `skipped`, in every process.

    Args:
        lazy_channels: channels left out of cosines, kept in every checkpoint.
        kwargs: those of `transformers.Trainer`; `model` is the objective.
    """

    def __init__(
        self, *, lazy_channels: list[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.lazy_channels = lazy_channels or []
        self.skipped: dict[str, str] = {}
        self.last_metrics: dict[str, float] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._drawn = (-1, 0)
        self.graceful_stop = GracefulStop(lambda n: highest(n, self.args.device))
        self.add_callback(self.graceful_stop)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RefinementProgress)
        else:
            self.remove_callback(PrinterCallback)
            self.add_callback(PrinterCallback)

    @property
    def refiner(self) -> UniRefinerObjective:
        """The objective without the wrappers of DDP, DeepSpeed or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(str(self.args.output_dir))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; records its metrics.

        Raises:
            NonFiniteLossError: names the terms that are not finite and the step.
        """
        for entry in inputs.get("skipped", ()):
            name, _, reason = entry.partition(": ")
            self.skipped[name] = reason
        if isinstance(self.train_dataset, RefinementStream):
            self.train_dataset.note(inputs["position"])
        self._seed_batch()
        progress = self.state.global_step / max(1, self.state.max_steps)
        outputs = model(pixel_values=inputs["pixel_values"], progress=progress)
        self._stop_unless_finite(outputs)
        for name in METRICS:
            if name in outputs:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + outputs[name].detach().float(), count + 1)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; a stream comes shared out already, and knows where it is."""
        stream = self.train_dataset
        if not isinstance(stream, RefinementStream):
            return super().get_train_dataloader()
        stream.endless = True
        self.args.ignore_data_skip = True
        args = self.args
        return DataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=min(args.dataloader_num_workers, stream.shards),
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As in `Trainer`; with `final_lr_share`, an exponential fall to it."""
        args, optimizer = self.args, optimizer or self.optimizer
        share = None
        if isinstance(args, RefineTrainingArguments):
            share = args.final_lr_share
        if share is None or optimizer is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps = max(1, num_training_steps)
        self.lr_scheduler = LambdaLR(
            optimizer, lambda step: share ** min(1.0, step / steps)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _seed_batch(self) -> None:
        step, micro = self._drawn
        micro = micro + 1 if step == self.state.global_step else 0
        self._drawn = self.state.global_step, micro
        args = self.args
        place = self.state.global_step * args.gradient_accumulation_steps + micro
        place = place * args.world_size + args.process_index
        torch.manual_seed(batch_seed(args.seed, place))

    def _stop_unless_finite(self, outputs: dict[str, Tensor]) -> None:
        names = [name for name in ("loss", *TERMS) if name in outputs]
        values = torch.stack([outputs[name].detach().float() for name in names])
        finite = bool(torch.isfinite(values).all())
        if not highest(int(not finite), values.device):
            return
        if finite:
            raise NonFiniteLossError(
                f"Step {self.state.global_step + 1}: a loss of another process is not "
                f"finite. The weights were not updated. {self._last_good()}"
            )
        broken = [
            f"{name} = {value}"
            for name, value in zip(names, values.tolist(), strict=True)
            if value != value or value in (float("inf"), float("-inf"))
        ]
        raise NonFiniteLossError(
            f"Step {self.state.global_step + 1}: {', '.join(broken)}. The weights were not "
            f"updated. {self._last_good()} Lower the learning rate, or train in float32."
        )

    def _last_good(self) -> str:
        step = last_checkpoint_step(self.folder)
        if step is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is checkpoint-{step}."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics' means since the last log, over all processes."""
        if "loss" in logs and self._sums:
            logs.update(self._mean_metrics())
            self._sums.clear()
        if self.skipped:
            logs["skipped_images"] = float(len(self.skipped))
        self.last_metrics.update(
            (name, value) for name, value in logs.items() if name in ("loss", *METRICS)
        )
        super().log(logs, start_time)

    def final_metrics(self) -> dict[str, float]:
        """Last logged loss and metrics; steps since then are averaged in their place.

        To be called on every process.
        """
        if self._sums:
            self.last_metrics.update(self._mean_metrics())
        return dict(self.last_metrics)

    def _mean_metrics(self) -> dict[str, float]:
        names = list(self._sums)
        means = torch.stack([total / n for total, n in self._sums.values()])
        means = self.accelerator.reduce(means, reduction="mean")
        return dict(zip(names, means.tolist(), strict=True))

    # The Hub: `HubSync` uploads whole checkpoints, without the base class's pickles

    def init_hf_repo(
        self, token: str | None = None, private: bool | None = None
    ) -> None:
        """Nothing: `HubSync` has made the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `HubSync` uploads when the checkpoint is whole."""

    # Checkpoints

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        an_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * max(1, an_epoch))

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
            found = {k: v for k, v in entry.items() if k in ("loss", *METRICS)}
            self.last_metrics.update(found)
        return True

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_staging else folder

    _is_staging = False
    _is_wrapped = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
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
            raise CheckpointError(
                f"{name} could not be written: {problem or 'another process failed'}. "
                f"{self._last_good()} Free space in the output folder, then continue with "
                "--resume."
            ) from problem
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(staging / name, run / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run), save_total_limit=self.args.save_total_limit
            )
        wait_for_all()

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
            folder.mkdir(parents=True, exist_ok=True)
            weights = None if weights is None else _below(weights, "model.")
            save_adapter(self.refiner.model, folder, weights)

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """As in `Trainer`; of the weights, only the adapter is gathered and written."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir) if output_dir else self.folder
        self.save_adapter(folder)
        self._save_refiner_state(folder)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.refiner.model, folder)
        self._save_refiner_state(folder)

    def _save_refiner_state(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        state = {
            "lazy_channels": self.lazy_channels,
            "skipped": self.skipped,
            **self._shape_of_run(),
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
        save_tree(random_states(), Path(output_dir) / self._rng_file)
        if isinstance(self.train_dataset, RefinementStream):
            state = json.dumps(self.train_dataset.state())
            (Path(output_dir) / self._stream_file).write_text(state + "\n")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = Path(checkpoint) / self._rng_file
        # Batches seed themselves: a run on more processes than before lacks nothing.
        if file.is_file():
            restore_random_states(load_tree(file))

    def _resume_stream(self, folder: Path) -> None:
        if not isinstance(self.train_dataset, RefinementStream):
            return
        file = folder / self._stream_file
        if not file.is_file():
            raise CheckpointError(
                f"{folder.name} has no {file.name}: it was written without --streaming, or "
                "by fewer processes. Continue as it was started."
            )
        self.train_dataset.resume(json.loads(file.read_text()))

    @property
    def _stream_file(self) -> str:
        return f"stream_position_{self.args.process_index}.json"

    @property
    def _rng_file(self) -> str:
        return f"random_state_{self.args.process_index}.safetensors"


def save_adapter(
    model: UniRefinerModel, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the tower's adapter as PEFT does, and what the register model learnt beside it.

    Of an unlocked tower (PH-Reg), the trained weights under the tower's own names.

    Args:
        model: the register model with a PEFT or unlocked tower.
        state_dict: the model's gathered weights where they are sharded.
    """
    tower: PeftModel | UnlockedTower = model.tower
    weights = adapter_weights(
        tower, None if state_dict is None else _below(state_dict, "tower.")
    )
    weights = {
        name: value.detach().cpu().contiguous() for name, value in weights.items()
    }
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if isinstance(tower, PeftModel):
        config = copy.copy(tower.peft_config[tower.active_adapter])
        config.inference_mode = True
        config.save_pretrained(str(folder))
    gathered = dict(model.named_parameters()) if state_dict is None else state_dict
    for name in _own_parameters(model):
        value = gathered[name].detach().cpu().contiguous()
        save_file({name: value}, folder / f"{name}.safetensors")


def _own_parameters(model: UniRefinerModel) -> list[str]:
    parameters = dict(model.named_parameters())
    return [name for name in OWN_PARAMETERS if name in parameters]


def adapter_weights(
    tower: PeftModel | UnlockedTower, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's weights under the names PEFT saves; no look-up of the base's files."""
    if isinstance(tower, UnlockedTower):
        if state_dict is None:
            return tower.trained()
        return {name: state_dict[f"base.{name}"] for name in tower.names}
    return get_peft_model_state_dict(
        tower, state_dict=state_dict, save_embedding_layers=False
    )


def load_adapter(model: UniRefinerModel, folder: Path) -> None:
    """Read an adapter, and what the register model learnt, that `save_adapter` wrote.

    Raises:
        CheckpointError: a file is missing, or the adapter belongs to another tower.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder.name} holds no {ADAPTER_WEIGHTS}.")
    weights = load_file(file)
    expected = adapter_weights(model.tower)
    wrong = [
        name
        for name in sorted(weights.keys() | expected.keys())
        if name not in weights
        or name not in expected
        or weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"The adapter in {folder.name} does not fit this tower: {len(wrong)} of "
            f"{len(expected)} tensors differ in name or shape, the first is {wrong[0]}. "
            "Use the model, method and lora_rank of the run that wrote it."
        )
    own = _own_parameters(model)
    for name in own:
        if not (folder / f"{name}.safetensors").is_file():
            raise CheckpointError(f"{folder.name} holds no {name}.safetensors.")
    if isinstance(model.tower, UnlockedTower):
        model.tower.load_trained(weights)
    else:
        set_peft_model_state_dict(model.tower, weights)
    parameters = dict(model.named_parameters())
    for name in own:
        with (
            safe_open(folder / f"{name}.safetensors", framework="pt") as file,
            torch.no_grad(),
        ):
            parameters[name].copy_(file.get_tensor(name))


def read_refiner_state(folder: Path) -> dict[str, Any]:
    """Lazy channels and skipped images a checkpoint recorded."""
    return json.loads((folder / REFINER_STATE).read_text())


def last_checkpoint_step(run: Path) -> int | None:
    """Step of the newest checkpoint of a run, None without one."""
    steps = [
        int(folder.name.removeprefix("checkpoint-"))
        for folder in run.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
        and (folder / TRAINER_STATE).is_file()
    ]
    return max(steps, default=None)


def _below(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
