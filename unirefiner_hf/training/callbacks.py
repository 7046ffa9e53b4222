"""What happens beside the steps: progress, a graceful stop, pictures."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

SHOWN = {
    "loss": "loss",
    "loss_regu": "regu",
    "loss_uni": "uni",
    "loss_spu": "spu",
    "loss_scd": "scd",
    "clean_ratio": "clean",
    "rejected_fpgp_reference": "-ref",
    "rejected_fpgp_strip": "-strip",
    "rejected_detectors": "-detect",
    "rejected_ah": "-ah",
    "skipped_images": "skipped",
}


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
                short: f"{logs[name]:.3g}"
                for name, short in SHOWN.items()
                if name in logs
            }
            self.training_bar.set_postfix(shown)


class GracefulStop(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

    A second Ctrl-C ends it at once.

    Attributes:
        received: name of the signal that ended the run, None if none did.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch both signals for as long as the context lasts."""
        watched = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in watched}

        def stop(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
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
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control
