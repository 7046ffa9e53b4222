"""Settings of the protocols `evaluate` measures by, one class a task; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..errors import require
from ..values import check_values
from .zero_shot_sets import IMAGENET, TEMPLATES


@dataclass
class SegmentationSettings:
    """Protocol of the probe; defaults are DINOv2's linear segmentation.

    Raises:
        ValueError: a value is outside its range.
    """

    crop: Annotated[int, "[1, inf)"] = field(
        default=512,
        metadata={
            "help": "Side of training crops and test windows in pixels; rounded up to "
            "whole patches."
        },
    )
    stride: Annotated[int, "[1, inf)"] = field(
        default=341,
        metadata={"help": "Step of the test window in pixels."},
    )
    scale_min: Annotated[float, "(0, inf)"] = field(
        default=0.5, metadata={"help": "Smallest training scale."}
    )
    scale_max: Annotated[float, "(0, inf)"] = field(
        default=2.0, metadata={"help": "Largest training scale."}
    )
    max_class_share: Annotated[float, "(0, 1]"] = field(
        default=0.75,
        metadata={"help": "A crop that one class fills by more is drawn again."},
    )
    flip: Annotated[float, "[0, 1]"] = field(
        default=0.5,
        metadata={"help": "Probability of mirroring a training crop."},
    )
    distortion: bool = field(
        default=True, metadata={"help": "Photometric distortion of training crops."}
    )
    iterations: Annotated[int, "[1, inf)"] = field(
        default=40_000, metadata={"help": "Steps of a probe."}
    )
    batch: Annotated[int, "[1, inf)"] = field(
        default=16,
        metadata={"help": "Images a step, all processes."},
    )
    probe_lr: Annotated[float, "(0, inf)"] = field(
        default=1e-3, metadata={"help": "Learning rate, AdamW."}
    )
    probe_weight_decay: Annotated[float, "[0, inf)"] = field(
        default=1e-4, metadata={"help": "Weight decay, AdamW."}
    )
    warmup: Annotated[int, "[0, inf)"] = field(
        default=1500,
        metadata={"help": "Steps of linear warm-up, at most a tenth of all."},
    )
    power: Annotated[float, "[0, inf)"] = field(
        default=1.0,
        metadata={"help": "Exponent of the polynomial decay."},
    )
    head_dropout: Annotated[float, "[0, 1)"] = field(
        default=0.0,
        metadata={"help": "Dropout before the 1x1 convolution."},
    )
    fast: bool = field(
        default=False,
        metadata={
            "help": "Encode every image once, whole and resized to crop x crop, and train "
            "on the cached tokens: minutes in place of hours, no augmentation but "
            "mirroring. Not comparable with published numbers."
        },
    )
    fast_iterations: Annotated[int, "[1, inf)"] = field(
        default=1000,
        metadata={"help": "Steps of a probe in the fast mode."},
    )
    workers: Annotated[int, "[0, inf)"] = field(
        default=0,
        metadata={"help": "Processes that prepare training crops."},
    )
    encode_batch: Annotated[int, "[1, inf)"] = field(
        default=8,
        metadata={"help": "Images or windows the tower takes at once."},
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            "scale_max",
            self.scale_max >= self.scale_min,
            f"scale_min ({self.scale_min}) or more",
        )

    def protocol(self) -> str:
        """In a few words."""
        if self.fast:
            return (
                f"linear probe on cached tokens, whole images at {self.crop} px, "
                f"{self.fast_iterations} steps"
            )
        return (
            f"linear probe, crop {self.crop}, window {self.crop}/{self.stride}, "
            f"{self.iterations} steps"
        )


@dataclass
class DepthSettings:
    """Protocol of the probe; defaults are DINOv2's linear depth on NYUd.

    Raises:
        ValueError: a value is outside its range.
    """

    depth_low: Annotated[float, "(0, inf)"] = field(
        default=1e-3,
        metadata={"help": "Smallest depth in metres."},
    )
    depth_high: Annotated[float, "(0, inf)"] = field(
        default=10.0,
        metadata={"help": "Largest depth in metres."},
    )
    depth_bins: Annotated[int, "[2, inf)"] = field(
        default=256, metadata={"help": "Uniform bins of depth."}
    )
    depth_scale: Annotated[float, "(0, inf)"] = field(
        default=1000.0,
        metadata={
            "help": "Values of integer depth maps are divided by this to metres."
        },
    )
    depth_crop_height: Annotated[int, "[1, inf)"] = field(
        default=416,
        metadata={"help": "Rows of a training crop, rounded up to patches."},
    )
    depth_crop_width: Annotated[int, "[1, inf)"] = field(
        default=544,
        metadata={"help": "Columns of a training crop, rounded up to patches."},
    )
    depth_rotation: Annotated[float, "[0, 180]"] = field(
        default=2.5,
        metadata={"help": "Training images turn by up to this, in degrees."},
    )
    depth_flip: Annotated[float, "[0, 1]"] = field(
        default=0.5,
        metadata={"help": "Probability of mirroring a training crop."},
    )
    depth_distortion: bool = field(
        default=True, metadata={"help": "Photometric distortion of training crops."}
    )
    depth_iterations: Annotated[int, "[1, inf)"] = field(
        default=38_400, metadata={"help": "Steps of a probe."}
    )
    depth_batch: Annotated[int, "[1, inf)"] = field(
        default=16, metadata={"help": "Images a step."}
    )
    depth_lr: Annotated[float, "(0, inf)"] = field(
        default=5e-3,
        metadata={"help": "Highest learning rate, AdamW."},
    )
    depth_weight_decay: Annotated[float, "[0, inf)"] = field(
        default=0.01, metadata={"help": "Weight decay, AdamW."}
    )
    depth_warmup: Annotated[float, "[0, 1)"] = field(
        default=1 / 3,
        metadata={"help": "Share of the steps that warm up."},
    )
    depth_clip: Annotated[float, "(0, inf)"] = field(
        default=35.0, metadata={"help": "Largest gradient norm."}
    )
    depth_loss_warmup: Annotated[int, "[0, inf)"] = field(
        default=100,
        metadata={"help": "First steps, whose loss has its mean term only."},
    )
    depth_eigen_crop: bool | None = field(
        default=None,
        metadata={
            "help": "Measure rows 45 to 471 and columns 41 to 601 only. Unset: for maps "
            "of 640x480."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(self, "depth_high", self.depth_high > self.depth_low, "above depth_low")

    def protocol(self) -> str:
        """In a few words."""
        return (
            f"linear probe, {self.depth_bins} bins, crop {self.depth_crop_height}x"
            f"{self.depth_crop_width}, {self.depth_iterations} steps"
        )


@dataclass
class ZeroShotSettings:
    """Protocol of zero-shot segmentation; unset sizes follow SCLIP and the tower.

    Raises:
        ValueError: a value is outside its range.
    """

    variant: str | None = field(
        default=None,
        metadata={
            "help": "How patches are brought to words: CLIP has plain, maskclip, sclip, "
            "clearclip and naclip, SigLIP has value. Unset: naclip, value."
        },
    )
    classes_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with a line for each class in the order of the labels: its "
            "name, and synonyms behind commas. Unset: the data set's, or dataset.json's."
        },
    )
    templates: str = field(
        default=IMAGENET,
        metadata={
            "help": "Sentences the words are put into: CLIP's 80 for ImageNet, or one.",
            "choices": list(TEMPLATES),
        },
    )
    window: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={
            "help": "Side of the test window in pixels; rounded up to whole patches. "
            "Unset: the size the tower was trained at."
        },
    )
    window_stride: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={"help": "Step of the window in pixels. Unset: half a window."},
    )
    short_side: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={
            "help": "Shorter side of the image in pixels, a window or more. Unset: 1.5 "
            "windows (336 of 224), COCO-Stuff 2, Cityscapes 2.5."
        },
    )
    text_scale: Annotated[float | None, "(0, inf)"] = field(
        default=None,
        metadata={
            "help": "Cosines are multiplied by this before the softmax. Unset: 40, with "
            "background 50, VOC21 65."
        },
    )
    background_threshold: Annotated[float | None, "[0, 1)"] = field(
        default=None,
        metadata={
            "help": "Pixels whose best class is less probable are background. Unset: 0.1 "
            "for VOC21, Context60 and COCO-Object, else none."
        },
    )
    sigma: Annotated[float, "(0, inf)"] = field(
        default=5.0,
        metadata={"help": "Width of naclip's Gaussian in patches."},
    )
    window_batch: Annotated[int, "[1, inf)"] = field(
        default=8,
        metadata={"help": "Windows the tower takes at once."},
    )

    def __post_init__(self) -> None:
        check_values(self)
