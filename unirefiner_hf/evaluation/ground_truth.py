"""Labels are looked at before anything is trained: what they hold, and whether it tells.

A mean over classes leaves out those that neither a label nor a prediction has, as the field
does; a set in which one class alone is labelled is refused, since it measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm

from ..data.labelled import IGNORE, ClassLabels, LabelError, LabelledImages
from .segmentation import processes

LOOKED_AT = 16
"""Pairs of the training split that are read before the backbone is loaded."""


def look_through(
    pairs: LabelledImages, read: Callable[[np.ndarray, str], object], title: str
) -> None:
    """Read every pair once.

    Args:
        read: values of a map and its name -> what they mean; refuses what it cannot take.

    Raises:
        ImageError, LabelError: see `LabelledImages.pair` and `read`.
    """
    hidden = processes()[0] > 0
    for number in tqdm(range(len(pairs)), desc=title, leave=False, disable=hidden):
        _, values = pairs.pair(number)
        read(values, pairs.names[number])


def check_labels(pairs: LabelledImages, classes: ClassLabels, split: str) -> list[str]:
    """Read every label of what is measured; see the module.

    Returns:
        Names of the classes that no label has.

    Raises:
        LabelError: a label that cannot be read or is no class; every pixel is ignored; or
            one class alone is labelled.
    """
    counts = np.zeros(len(classes), dtype=np.int64)
    pixels = 0

    def count(values: np.ndarray, name: str) -> None:
        nonlocal pixels
        labels = classes.read(values, name)
        kept = labels[labels != IGNORE]
        counts[:] += np.bincount(kept.ravel().astype(np.int64), minlength=len(counts))
        pixels += labels.size

    look_through(pairs, count, f"labels of {split}")
    labelled, ignored = np.flatnonzero(counts), pixels - int(counts.sum())
    if not len(labelled):
        raise LabelError(
            f"Every pixel of the {len(pairs)} labels of {split} is ignored (label "
            f"{classes.ignore}): there is nothing to measure. Set ignore_label, or "
            "reduce_zero_label, to what the files hold."
        )
    if len(labelled) == 1:
        only = int(labelled[0])
        hint = "Measure on more images (max_val)."
        if ignored:
            hint = (
                f"{ignored / pixels:.0%} of the pixels are ignored (label "
                f"{classes.ignore}): if they are a class, as in a mask of 0 and 255, "
                "save the masks as 0 and 1."
            )
        raise LabelError(
            f"Every pixel of {split} that counts is of class {classes.names[only]!r} "
            f"({only}): whoever says it everywhere scores 100 %, so nothing is measured. "
            f"{hint}"
        )
    return [name for name, seen in zip(classes.names, counts, strict=True) if not seen]


__all__ = ["LOOKED_AT", "check_labels", "look_through"]
