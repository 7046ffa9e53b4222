"""What happens beside the steps: progress, a graceful stop, pictures."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..loading.adapter import disable_adapter
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..visualize import PcaBasis, fit_pca, pca_rgb
from .distributed import is_distributed

logger = logging.get_logger(__name__)

SHOWN = {"loss_": "", "rejected_fpgp_": "-", "rejected_": "-", "clean_ratio": "clean"}
"""Starts of metrics' names -> how the progress bar writes them."""


def shown_name(metric: str) -> str | None:
    """What the progress bar calls a metric, None of one it leaves out."""
    if metric in ("loss", "skipped_images"):
        return metric.removesuffix("_images")
    for start, short in SHOWN.items():
        if metric.startswith(start):
            return short + metric.removeprefix(start)
    return None


class RefinementProgress(ProgressCallback):
    """Progress bar with the losses, the clean ratio and what each filter rejects."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {
                short: f"{value:.3g}"
                for name, value in logs.items()
                if (short := shown_name(name)) is not None
            }
            self.training_bar.set_postfix(shown)


class Snapshots(TrainerCallback):
    """Every so many steps, a picture of the principal components of some images.

    Args:
        model: the register model in training.
        images: ``(3, height, width)`` each, normalised.
        register_width: frame in patches.
        folder: gets ``step-000100.png`` and so on, and ``step-000000.png`` of the base.
    """

    def __init__(
        self,
        model: UniRefinerModel,
        images: Sequence[Tensor],
        register_width: int,
        folder: Path,
        every: int,
    ) -> None:
        self.model = model
        self.images = torch.stack(list(images[:4]))
        self.register_width = register_width
        self.folder = folder
        self.every = every
        self.basis: PcaBasis | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        with disable_adapter(self.model):
            tokens, grid = self._tokens(0)
        self.basis = fit_pca(tokens)
        if state.is_world_process_zero:
            self._save(tokens, grid, 0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0:
            tokens, grid = self._tokens(self.register_width)
            if state.is_world_process_zero:
                self._save(tokens, grid, state.global_step)

    def _tokens(self, register_width: int) -> tuple[Tensor, tuple[int, int]]:
        training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        with torch.no_grad():
            encoded = self.model.encode(self.images.to(device), register_width)
        self.model.train(training)
        return encoded.image.float().cpu(), encoded.grid

    def _save(self, tokens: Tensor, grid: tuple[int, int], step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        maps = pca_rgb(tokens, grid, self.basis)
        Image.fromarray(np.concatenate(list(maps), axis=1)).resize(
            (maps.shape[0] * 224, 224 * grid[0] // grid[1]), Image.Resampling.NEAREST
        ).save(self.folder / f"step-{step:06d}.png")


class StepsAsAsked(TrainerCallback):
    """Steps between logs and checkpoints follow the arguments, not the checkpoint.

    `Trainer` keeps to those of the checkpoint that a run goes on from.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        state.compute_steps(args, state.max_steps)


class GracefulStop(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

    One process that gets the signal is enough: all stop after the same step. In a run of
    one process a second Ctrl-C ends it at once; with several, launchers pass signals on
    once more, so repeated ones change nothing.

    Args:
        highest: the highest of all processes' numbers.

    Attributes:
        received: name of the signal that ended the run, None if none did.
    """

    def __init__(self, highest: Callable[[int], int] = int) -> None:
        self.highest = highest
        self.received: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch both signals for as long as the context lasts."""
        self.received = None
        watched = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in watched}

        def stop(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                if number == signal.SIGINT and not is_distributed():
                    raise KeyboardInterrupt
                return
            self.received = signal.Signals(number).name
            logger.warning(
                f"{self.received}: stopping after this step, a checkpoint will be left."
            )

        for number in watched:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        own = 0 if self.received is None else signal.Signals[self.received].value
        number = self.highest(own)
        if number:
            self.received = signal.Signals(number).name
            control.should_save = True
            control.should_training_stop = True
        return control
