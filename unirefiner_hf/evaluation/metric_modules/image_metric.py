"""What the package's metrics share: an example is an image, measured when it is added."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor

from ...modeling.errors import UniRefinerError

_REFUSAL = "refusal"


class ImageMetric(evaluate.Metric, ABC):
    """A metric of whole images that caches what it measured of each, never its pixels.

    `evaluate` would write every pixel into its cache as a member of a nested list, and read
    them all back as Python objects: 5.6 GB on disk and twenty times that in memory for the
    2000 images of ADE20K's validation set. Here `add` and `add_batch` measure an image at
    once, and columns of the declared types hold the few numbers that came out.

    Args:
        options: of `evaluate.Metric`.

    Raises:
        UniRefinerError: an unknown option.
    """

    def __init__(self, **options: Any) -> None:
        known = set(inspect.signature(evaluate.Metric.__init__).parameters)
        for name in options:
            if name not in known - {"self", "kwargs"}:
                own = set(inspect.signature(type(self).__init__).parameters)
                names = ", ".join(sorted((known | own) - {"self", "kwargs", "options"}))
                raise UniRefinerError(
                    f"{type(self).__name__} has no option {name!r}; it has {names}."
                )
        super().__init__(**options)

    @abstractmethod
    def measure(self, prediction: Any, reference: Any) -> Any:
        """What is kept of one image; the arguments are those of `add`.

        Raises:
            UniRefinerError: a shape or value does not fit.
        """

    @abstractmethod
    def _cells(self, measured: Any) -> tuple[Any, Any]:
        """What the columns ``predictions`` and ``references`` keep of an image."""

    @abstractmethod
    def _scores(self, predictions: list, references: list) -> dict[str, Any]:
        """Scores of the cells of all images.

        Raises:
            UniRefinerError: they have no score.
        """

    def add(
        self, *, prediction: Any = None, reference: Any = None, **named: Any
    ) -> None:
        """One image; see `measure`. `evaluate.combine` says predictions and references.

        Raises:
            UniRefinerError: one is missing, or a shape or value does not fit.
        """
        prediction = named.pop("predictions", prediction)
        reference = named.pop("references", reference)
        self._refuse_inputs(named)
        self.add_measured([self.measure(prediction, reference)])

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, **named: Any
    ) -> None:
        """Several images: a batch along the first axis, or a list of any sizes.

        A process that got no image adds an empty list, so that the others do not wait.

        Raises:
            UniRefinerError: one is missing, their numbers differ, or a shape or value
                does not fit. Nothing of the batch is added then.
        """
        self._refuse_inputs(named)
        for what, given in (("predictions", predictions), ("references", references)):
            if given is None:
                raise UniRefinerError(f"{self.name} needs {what}; they are missing.")
        if len(predictions) != len(references):
            raise UniRefinerError(
                f"{len(predictions)} predictions do not go with {len(references)} "
                "references: one of each an image."
            )
        pairs = zip(predictions, references, strict=True)
        self.add_measured([self.measure(*pair) for pair in pairs])

    def add_measured(self, images: Sequence[Any]) -> None:
        """Add what `measure` returned, of each image."""
        cells = [self._cells(image) for image in images]
        super().add_batch(
            predictions=[prediction for prediction, _ in cells],
            references=[reference for _, reference in cells],
        )

    def score(self, images: Sequence[Any]) -> dict[str, Any]:
        """Scores of what `measure` returned of each image, on one process.

        Raises:
            UniRefinerError: there is no image, or they have no score.
        """
        self.add_measured(images)
        scores = self.compute()
        assert scores is not None
        return scores

    def compute(
        self, *, predictions: Any = None, references: Any = None, **named: Any
    ) -> dict[str, Any] | None:
        """Scores of everything added, and of the images given here; then it starts anew.

        Returns:
            Name -> value; None on a process other than the first of several.

        Raises:
            UniRefinerError: nothing was added, see `add_batch`, or there is no score.
        """
        if predictions is None and references is None and self.writer is None:
            raise UniRefinerError(
                f"{self.name} has no image to score: call add or add_batch before "
                "compute, or give it predictions and references."
            )
        scores = super().compute(
            predictions=predictions, references=references, **named
        )
        if scores is not None and _REFUSAL in scores:
            raise scores[_REFUSAL]
        return scores

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, Any]:
        """Scores, or a refusal that `compute` raises once the cache is deleted."""
        try:
            if not len(predictions):
                raise UniRefinerError(f"{self.name} has no image to score.")
            return self._scores(list(predictions), list(references))
        except UniRefinerError as refusal:
            return {_REFUSAL: refusal}

    def _build_data_dir(self) -> str:
        """In memory there is nothing to store, so that a read-only home will do."""
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _refuse_inputs(self, named: dict[str, Any]) -> None:
        if named:
            raise UniRefinerError(
                f"{self.name} takes predictions and references, no {', '.join(named)}."
            )


def require_option(name: str, value: Any, ok: bool, rule: str) -> None:
    """Raise a UniRefinerError that names an option, its value and the rule it breaks."""
    if not ok:
        raise UniRefinerError(f"{name} is {value!r}; it must be {rule}.")


def as_tensor(value: Any, what: str, axes: Sequence[str]) -> Tensor:
    """A tensor, array, list or picture as a tensor with the axes named.

    Raises:
        UniRefinerError: it is missing, ragged or no numbers, or has other axes.
    """
    if value is None:
        raise UniRefinerError(f"The {what} is missing (None).")
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        try:
            array = np.asarray(value)
            if array.dtype.kind == "u" and array.itemsize > 1:
                array = array.astype(np.int64)
            tensor = torch.tensor(array)
        except (TypeError, ValueError) as problem:
            raise UniRefinerError(
                f"The {what} is no array of numbers ({problem})."
            ) from None
    if tensor.ndim != len(axes):
        raise UniRefinerError(
            f"The {what} has the shape {tuple(tensor.shape)}; that of one image is "
            f"({', '.join(axes)}). Several images go into add_batch or compute."
        )
    return tensor
