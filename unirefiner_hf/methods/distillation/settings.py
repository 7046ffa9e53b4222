"""Hyper-parameters of the self-distillation baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TYPE_CHECKING

from ...errors import require
from ..settings import BORDER, MethodSettings

if TYPE_CHECKING:
    from .objective import Distillation

NEGATIVES = ("image", "crop")


@dataclass
class DistillationSettings(MethodSettings):
    """Hyper-parameters of one step of crop self-distillation; UniRefiner has them too.

    Defaults are those of UniRefiner's release (arXiv 2605.19622).

    Raises:
        UniRefinerError: a value is outside its range.
    """

    name = "distillation"
    title = "self-distillation baseline"
    ending = "distilled"
    is_control = True
    unread = dict.fromkeys(BORDER, "it trains without a border of registers")
    summary = (
        "{base} after self-distillation alone: the views and steps of UniRefiner without its "
        "register patches and without its filters. It is the control a refined model is "
        "compared with, not a refined model."
    )
    usage = "It was trained without a border of registers and needs none."
    citation = """@misc{unirefiner,
  title = {UniRefiner},
  eprint = {2605.19622},
  archivePrefix = {arXiv}
}"""

    num_crops: Annotated[int, "[1, inf)"] = field(
        default=3,
        metadata={"help": "Crops per image and step (P in the paper)."},
    )
    crop_area_min: Annotated[float, "(0, 1]"] = field(
        default=0.25,
        metadata={"help": "Smallest crop area, as a share of the image."},
    )
    crop_area_max: Annotated[float, "(0, 1]"] = field(
        default=0.5,
        metadata={"help": "Largest crop area, as a share of the image."},
    )
    crop_aspect_max: Annotated[float, "[1, inf)"] = field(
        default=1.5,
        metadata={
            "help": "Largest aspect ratio of a crop; drawn log-uniformly between "
            "its inverse and itself."
        },
    )
    temperature: Annotated[float, "(0, inf)"] = field(
        default=0.2,
        metadata={"help": "Temperature of every softmax over cosines."},
    )
    uniformity: Annotated[float, "[0, inf)"] = field(
        default=0.3,
        metadata={
            "help": "Weight of the log-sum-exp over the teacher's tokens (u). The "
            "published recipes use 0.3, and 1.0 for the largest towers."
        },
    )
    match_to_full_image: bool = field(
        default=True,
        metadata={
            "help": "Targets are the nearest tokens of the full image. False: the "
            "crop's own teacher tokens (published for EVA-CLIP-8B)."
        },
    )
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "What L_regu pushes crop tokens away from: the teacher's tokens of the "
            "'image' or of the 'crop'. Unset: as published, the image's where targets are "
            "matched to it, else the crop's.",
            "choices": list(NEGATIVES),
        },
    )
    scd_weight: Annotated[float, "[0, inf)"] = field(
        default=0.4,
        metadata={"help": "Weight of L_scd, spatial correlation distillation."},
    )
    scd_start: Annotated[float, "[0, 1]"] = field(
        default=0.1,
        metadata={"help": "Share of the run before L_scd sets in."},
    )
    lazy_channels: bool = field(
        default=True,
        metadata={
            "help": "Leave the channels that dominate every cosine out of all "
            "similarities; they are looked for once, before training."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            "crop_area_max",
            self.crop_area_min <= self.crop_area_max,
            f"crop_area_min ({self.crop_area_min}) or more",
        )

    @classmethod
    def objective(cls) -> type[Distillation]:
        """See `MethodSettings.objective`."""
        from .objective import Distillation

        return Distillation

    @property
    def full_loss_from(self) -> float:
        """Where L_scd sets in."""
        return self.scd_start

    @property
    def negatives_of_image(self) -> bool:
        """Whether negatives are the image's tokens; else they are the crop's."""
        if self.negatives is None:
            return self.match_to_full_image
        return self.negatives == "image"
