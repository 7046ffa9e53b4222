"""A run stops where its numbers mean nothing: gradients, weights, and filters that reject all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import UniRefinerError
from ..modeling.files import check_finite

REJECTED = 50
"""Batches in a row of which every token is rejected, after which a run stops."""
REMEDIES = {
    "rejected_fpgp_reference": "raise fpgp_sigma (or fpgp_cosine), or name another "
    "reference_image",
    "rejected_fpgp_strip": "raise fpgp_sigma (or fpgp_cosine), or name another "
    "reference_image",
    "rejected_detectors": "raise detector_cosine",
    "rejected_ah": "raise ah_sigma, or choose other ah_layers",
}
"""Filter -> what makes it reject less."""


class NonFiniteError(UniRefinerError, ArithmeticError):
    """Gradients or weights became NaN or infinite."""


class AllRejectedError(UniRefinerError):
    """The filters leave nothing to learn from."""


class FiniteWeights(TrainerCallback):
    """Stops a run before gradients that are not finite change weights, or these are saved.

    Those that no process holds whole (ZeRO, FSDP) are not looked at here.

    Args:
        last_good: what is left of the run, in a sentence.
    """

    def __init__(self, last_good: Callable[[], str]) -> None:
        self.last_good = last_good

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before the weights change.

        Raises:
            NonFiniteError: names the step and the first weight.
        """
        found = {
            name: parameter.grad
            for name, parameter in _trained(model)
            if parameter.grad is not None
        }
        if found and not _all_finite(list(found.values())):
            self._check(
                found,
                f"Step {state.global_step + 1}: the gradients of the weights",
                "The weights were not updated.",
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Before a checkpoint.

        Raises:
            NonFiniteError: names the step and the first weight.
        """
        if control.should_save or state.global_step >= state.max_steps:
            where = f"Step {state.global_step}: the trained weights"
            self._check(dict(_trained(model)), where, "They were not saved.")

    def _check(self, tensors: Mapping[str, Tensor], what: str, done: str) -> None:
        remedy = (
            f"{done} {self.last_good()} Lower the learning rate, or train in float32."
        )
        try:
            check_finite(tensors.items(), what, remedy)
        except UniRefinerError as problem:
            raise NonFiniteError(str(problem)) from None


def _trained(model: nn.Module | None) -> list[tuple[str, Tensor]]:
    if model is None:
        return []
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "full_tensor")
    ]


def _all_finite(values: list[Tensor]) -> bool:
    """One answer of the device for all of them."""
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(values))).all())


class Rejections:
    """Counts batches in a row of which the filters reject every token."""

    def __init__(self) -> None:
        self.batches = 0

    def too_many(self, outputs: Mapping[str, Tensor]) -> bool:
        """Take in what a batch gave; whether there were `REJECTED` such batches."""
        clean = outputs.get("clean_ratio")
        all_rejected = clean is not None and float(clean) == 0
        self.batches = self.batches + 1 if all_rejected else 0
        return self.batches >= REJECTED

    def error(self, step: int, outputs: Mapping[str, Tensor]) -> AllRejectedError:
        """What is said of it: which filter rejects most, and what to change.

        Args:
            step: from 1.
            outputs: of the last batch.
        """
        shares = {name: float(outputs[name]) for name in REMEDIES if name in outputs}
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        worst = max(shares, key=shares.__getitem__, default=None)
        remedy = "loosen the filters" if worst is None else REMEDIES[worst]
        return AllRejectedError(
            f"Step {step}: the filters rejected every token of the last {REJECTED} batches "
            f"({told or 'of another process'}), so that the run learns from all tokens alike. "
            f"To go on, {remedy}."
        )
