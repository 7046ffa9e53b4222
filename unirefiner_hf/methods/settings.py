"""Hyper-parameters of the methods."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..spurious.settings import FilterSettings, require
from .ph_reg_settings import PHRegSettings

TARGET_VIEWS = ("composite", "crop")
NEGATIVES = ("image", "crop")
METHODS = ("unirefiner", "ph_reg", "plain")
PLAIN_FIELDS = (
    "num_crops",
    "crop_area_min",
    "crop_area_max",
    "crop_aspect_max",
    "temperature",
    "uniformity",
    "match_to_full_image",
    "negatives",
    "scd_weight",
    "scd_start",
    "lazy_channels",
    "no_grad_batch",
)
"""What plain distillation reads of the settings."""


@dataclass
class UniRefinerSettings(FilterSettings, PHRegSettings):
    """Hyper-parameters of one UniRefiner step (arXiv 2605.19622), and PH-Reg's.

    Defaults are those of the authors' release. Similarities are cosines,
    widths and layers are counted in patches and from 0.

    Raises:
        ValueError: a value is outside its range.
    """

    method: str = field(
        default="unirefiner",
        metadata={
            "help": "'unirefiner'; 'ph_reg', the second method, with learned register tokens; "
            "or 'plain': UniRefiner's distillation without registers and filters, the "
            "control of every comparison.",
            "choices": list(METHODS),
        },
    )
    num_crops: int = field(
        default=3, metadata={"help": "Crops per image and step (P in the paper)."}
    )
    crop_area_min: float = field(
        default=0.25, metadata={"help": "Smallest crop area, as a share of the image."}
    )
    crop_area_max: float = field(
        default=0.5, metadata={"help": "Largest crop area, as a share of the image."}
    )
    crop_aspect_max: float = field(
        default=1.5,
        metadata={
            "help": "Largest aspect ratio of a crop; drawn log-uniformly between "
            "its inverse and itself."
        },
    )
    temperature: float = field(
        default=0.2, metadata={"help": "Temperature of every softmax over cosines."}
    )
    uniformity: float = field(
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
    target_view: str = field(
        default="composite",
        metadata={
            "help": "'composite': targets come of the teacher's tokens of crop and strip, in "
            "which the strip has a say, as published. 'crop': of the crop alone, one more "
            "pass of the teacher; the composite is left to the filters.",
            "choices": list(TARGET_VIEWS),
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
    absorption_top: float = field(
        default=0.4,
        metadata={
            "help": "Absorption candidates are drawn from this share of the tokens "
            "most similar to the reference."
        },
    )
    uni_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of L_uni, which pushes image tokens away from register "
            "tokens. 0 leaves it out (published ablation: 45.8 in place of 49.8 mIoU)."
        },
    )
    spurious_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of L_spu, the absorption loss. 0 leaves it out (published "
            "ablation: 45.0 in place of 49.8 mIoU)."
        },
    )
    scd_weight: float = field(
        default=0.4,
        metadata={"help": "Weight of L_scd, spatial correlation distillation."},
    )
    scd_start: float = field(
        default=0.1,
        metadata={"help": "Share of the run before L_scd sets in."},
    )
    scd_register_width: int = field(
        default=4,
        metadata={
            "help": "Smallest frame, in patches, of the crops that give L_scd its target."
        },
    )
    lazy_channels: bool = field(
        default=True,
        metadata={
            "help": "Leave the channels that dominate every cosine out of all "
            "similarities; they are looked for once, before training."
        },
    )
    no_grad_batch: int | None = field(
        default=None,
        metadata={
            "help": "Images a tower pass without gradient takes at once. Smaller "
            "needs less memory; the result is the same. Unset: chosen from the "
            "device (2 on a CPU, all on a GPU)."
        },
    )

    def __post_init__(self) -> None:
        FilterSettings.__post_init__(self)
        PHRegSettings.__post_init__(self)
        methods = " or ".join(map(repr, METHODS))
        require(self, "method", self.method in METHODS, methods)
        views = " or ".join(map(repr, TARGET_VIEWS))
        require(self, "target_view", self.target_view in TARGET_VIEWS, views)
        require(
            self,
            "negatives",
            self.negatives in (None, *NEGATIVES),
            " or ".join(map(repr, NEGATIVES)) + ", or unset",
        )
        require(self, "num_crops", self.num_crops >= 1, "at least 1")
        require(self, "crop_area_min", 0 < self.crop_area_min <= 1, "in (0, 1]")
        require(
            self,
            "crop_area_max",
            self.crop_area_min <= self.crop_area_max <= 1,
            f"between crop_area_min ({self.crop_area_min}) and 1",
        )
        require(self, "crop_aspect_max", self.crop_aspect_max >= 1, "at least 1")
        require(self, "temperature", self.temperature > 0, "positive")
        require(self, "absorption_top", 0 < self.absorption_top <= 1, "in (0, 1]")
        require(self, "scd_start", 0 <= self.scd_start <= 1, "in [0, 1]")
        require(self, "scd_register_width", self.scd_register_width >= 0, "0 or more")
        require(
            self,
            "no_grad_batch",
            self.no_grad_batch is None or self.no_grad_batch >= 1,
            "at least 1, or unset",
        )

    @property
    def negatives_of_image(self) -> bool:
        """Whether negatives are the image's tokens; else they are the crop's."""
        if self.negatives is None:
            return self.match_to_full_image
        return self.negatives == "image"
