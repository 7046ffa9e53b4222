"""What a recipe says of the unlabelled images; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import require


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
    max_images: int | None = field(
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
    report_images: int = field(
        default=8,
        metadata={"help": "Images of the before/after picture and shares; 0: none."},
    )

    def __post_init__(self) -> None:
        self.check_data()

    def check_data(self) -> None:
        """Refuse values outside their range."""
        most = self.max_images
        require(self, "max_images", most is None or most >= 1, "at least 1, or unset")
        require(self, "report_images", self.report_images >= 0, "0 or more")
