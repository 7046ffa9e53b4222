"""How a run's batches are split over processes, and when another split may go on with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..export.run_folder import read_refiner_state, stream_file
from ..loading.adapter import CheckpointError
from .arguments import UniRefinerArguments

logger = logging.get_logger(__name__)

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".distcp")
"""Endings of files that DeepSpeed and FSDP write as pickles."""


@dataclass(frozen=True)
class Split:
    """Images of a step: those of a process at once, times accumulation, times processes."""

    batch: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, args: UniRefinerArguments) -> Split:
        """As the arguments and the launcher say."""
        return cls(
            args.train_batch_size, args.gradient_accumulation_steps, args.world_size
        )

    @property
    def total(self) -> int:
        """Images of a step over all processes."""
        return self.batch * self.accumulation * self.processes

    def __str__(self) -> str:
        return (
            f"{self.total} images a step ({self.batch} at once x {self.accumulation} "
            f"accumulated x {self.processes} processes)"
        )

    def to_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {
            "total_batch": self.total,
            "batch": self.batch,
            "accumulation": self.accumulation,
            "processes": self.processes,
        }


def accumulation_for(total: int, batch: int, processes: int) -> int | None:
    """The accumulation that makes the same total batch, None where none does."""
    whole, rest = divmod(total, batch * processes)
    return whole if whole and not rest else None


def check_split(checkpoint: Path, args: UniRefinerArguments) -> None:
    """Refuse to continue with other batches than the run's; reads small files only.

    Raises:
        CheckpointError: another total batch (names both, and what makes it the same), a
            split that would lose or repeat images, or an optimiser's state that only the
            launch that wrote it can read, or that is a pickle nobody allowed.
    """
    saved, now = read_refiner_state(checkpoint), Split.of(args)
    total = saved.get("total_batch", now.total)
    if total != now.total:
        before = _before(saved)
        raise CheckpointError(
            f"{checkpoint.name} was written with {before or f'{total} images a step'}, this "
            f"run has {now}. {_advice(total, now)}"
        )
    _check_data(checkpoint, saved, now, args)
    _check_state(checkpoint, saved, now, args)


def _before(saved: dict[str, Any]) -> Split | None:
    names = ("batch", "accumulation", "processes")
    if any(name not in saved for name in names):
        return None
    return Split(*(int(saved[name]) for name in names))


def _advice(total: int, now: Split) -> str:
    accumulation = accumulation_for(total, now.batch, now.processes)
    if accumulation is not None:
        return f"Set gradient_accumulation_steps to {accumulation}."
    fitting = [n for n in range(1, total + 1) if total % (n * now.batch) == 0]
    if not fitting:
        return f"Set per_device_train_batch_size to a divisor of {total}."
    return (
        f"With {now.batch} images at once, it goes on with "
        f"{' or '.join(map(str, fitting[-4:]))} processes."
    )


def _check_data(
    checkpoint: Path, saved: dict[str, Any], now: Split, args: UniRefinerArguments
) -> None:
    """What follows from another split for the images."""
    before = _before(saved)
    if before is None or before == now:
        return
    if args.dataloader_drop_last:
        raise CheckpointError(
            f"{checkpoint.name} was written with {before}, this run has {now}, and "
            "dataloader_drop_last drops as many images at a pass's end as do not fill a "
            "batch of all processes, which would be others now. Continue as before."
        )
    streamed = (checkpoint / stream_file(0)).is_file()
    if before.batch != now.batch and streamed:
        raise CheckpointError(
            f"{checkpoint.name} was written with {before}, this run has {now}, and a stream "
            "goes on with as many images at once as it started with: set "
            f"per_device_train_batch_size to {before.batch}, and "
            "gradient_accumulation_steps to make up for the processes."
        )
    if before.batch != now.batch:
        logger.warning(
            f"{checkpoint.name} took {before.batch} images at once, this run takes "
            f"{now.batch}: each step sees the same images as before, but draws other "
            "crops, and the filters' statistics are of other groups. Keep "
            "per_device_train_batch_size and change the accumulation to go on exactly."
        )


def _check_state(
    checkpoint: Path, saved: dict[str, Any], now: Split, args: UniRefinerArguments
) -> None:
    """Whether the optimiser's state can be read as it lies."""
    pickled = sorted(
        str(file.relative_to(checkpoint))
        for file in checkpoint.rglob("*")
        if file.suffix in PICKLES
    )
    kind, current = str(saved.get("state", "whole")), current_state(args)
    if not pickled and kind == "whole" and current != "FSDP":
        return
    processes = saved.get("processes", now.processes)
    if kind != current or processes != now.processes:
        raise CheckpointError(
            f"The optimiser's state in {checkpoint.name} was written by {processes} "
            f"processes ({kind}), this run has {now.processes} ({current}), and one of the "
            "two has a form that no other launch reads: launch as before. What goes on "
            "with any number of processes are runs of one process, DDP, and ZeRO of any "
            "stage since the state is kept by parameter; not FSDP, and no optimiser that "
            "packs weights in blocks."
        )
    if not pickled:
        raise CheckpointError(
            f"The optimiser's state is missing from {checkpoint.name}: copy the files that "
            f"{kind} wrote there back, or continue from another checkpoint."
        )
    if not args.allow_pickled_checkpoint:
        raise CheckpointError(
            f"The optimiser's state in {checkpoint.name} is pickled ({pickled[0]}), and "
            "reading a pickle can run anything that was put into it. If you wrote it "
            "yourself and nobody else could change it, set allow_pickled_checkpoint "
            "(--allow_pickled_checkpoint true)."
        )


def current_state(args: UniRefinerArguments) -> str:
    """How engines of this launch would write the optimiser's state themselves."""
    if _flag("ACCELERATE_USE_FSDP") or args.fsdp:
        return "FSDP"
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return f"DEEPSPEED ZeRO-{int(plugin.zero_stage)}"
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return (
            f"DEEPSPEED ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
        )
    return "whole"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
