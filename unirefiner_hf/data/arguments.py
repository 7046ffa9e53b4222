"""What a recipe says of the unlabelled images; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..values import check_values


@dataclass
class DataArguments:
    """The unlabelled images.

    Raises:
        UniRefinerError: a value is outside its range.
    """

    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set."}
    )
    data_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: str = field(
        default="image", metadata={"help": "Column that holds the images."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set while training."}
    )
    max_images: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={"help": "Train on this many images, picked by the seed. Unset: all."},
    )
    reference_image: str | None = field(
        default=None,
        metadata={
            "help": "An image unrelated to all others, whose tokens unmask fixed patterns. "
            "Unset: the one that ships with the package."
        },
    )
    report_images: Annotated[int, "[0, inf)"] = field(
        default=8,
        metadata={"help": "Images of the before/after picture and shares; 0: none."},
    )

    def __post_init__(self) -> None:
        self.check_data()

    def check_data(self) -> None:
        """Refuse values outside their range."""
        check_values(self, DataArguments)
