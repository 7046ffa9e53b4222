"""What `unirefiner evaluate` can be told, beside the protocol of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..data.layouts import LAYOUTS
from ..values import check_values

TASKS = ("segmentation", "depth", "zero_shot")


@dataclass
class EvaluationArguments:
    """Data, seeds and outputs of an evaluation.

    Raises:
        ValueError: a value is outside its range.
    """

    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data set, a set saved by datasets, or a Hub id. Needed."
        },
    )
    task: str = field(
        default="segmentation",
        metadata={"help": "What to measure.", "choices": list(TASKS)},
    )
    dataset: str = field(
        default="folder",
        metadata={
            "help": "Layout of the data: 'folder' has <split>/images and <split>/labels.",
            "choices": ["folder", *LAYOUTS],
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name in tables. Unset: that of the data."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split that trains the probe."}
    )
    val_split: str = field(default="val", metadata={"help": "Split that is measured."})
    train_images: str | None = field(
        default=None, metadata={"help": "Folder, in place of the layout's."}
    )
    train_labels: str | None = field(
        default=None, metadata={"help": "Folder, in place of the layout's."}
    )
    val_images: str | None = field(
        default=None, metadata={"help": "Folder, in place of the layout's."}
    )
    val_labels: str | None = field(
        default=None, metadata={"help": "Folder, in place of the layout's."}
    )
    image_column: str = field(
        default="image", metadata={"help": "Column of a datasets set."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Column of a datasets set."}
    )
    num_classes: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={
            "help": "Number of classes. Unset: the layout's, or dataset.json's in the "
            "folder."
        },
    )
    reduce_zero_label: bool | None = field(
        default=None,
        metadata={
            "help": "Ignore label 0 and count the others from 0. Unset: the layout's."
        },
    )
    ignore_label: Annotated[int, "(-inf, inf)"] = field(
        default=255,
        metadata={"help": "Label of pixels that do not count."},
    )
    max_train: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={"help": "Train on this many images. Unset: all."},
    )
    max_val: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={"help": "Measure on this many images. Unset: all."},
    )
    seeds: Annotated[int, "[1, inf)"] = field(
        default=3,
        metadata={"help": "Probes to train, with seeds 0, 1, ..."},
    )
    framed_base: bool = field(
        default=True,
        metadata={
            "help": "Measure the base with each border of register patches that the others "
            "have, too."
        },
    )
    evaluation_output: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the table, the report and one JSON of all. Unset: only "
            "evaluation.json beside each checkpoint."
        },
    )
    pictures: Annotated[int, "[0, inf)"] = field(
        default=4,
        metadata={"help": "Images of the report; 0: no report."},
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda or cpu. Unset: a GPU if any."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run a model repository's own code. Off unless asked for."},
    )

    def __post_init__(self) -> None:
        check_values(self)
