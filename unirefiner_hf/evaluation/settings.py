"""Settings of the protocols `evaluate` measures by, one class a task; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import require
from .zero_shot_sets import IMAGENET, TEMPLATES


@dataclass
class SegmentationSettings:
    """Protocol of the probe; defaults are DINOv2's linear segmentation.

    Raises:
        ValueError: a value is outside its range.
    """

    crop: int = field(
        default=512,
        metadata={
            "help": "Side of training crops and test windows in pixels; rounded up to "
            "whole patches."
        },
    )
    stride: int = field(
        default=341, metadata={"help": "Step of the test window in pixels."}
    )
    scale_min: float = field(default=0.5, metadata={"help": "Smallest training scale."})
    scale_max: float = field(default=2.0, metadata={"help": "Largest training scale."})
    max_class_share: float = field(
        default=0.75,
        metadata={"help": "A crop that one class fills by more is drawn again."},
    )
    flip: float = field(
        default=0.5, metadata={"help": "Probability of mirroring a training crop."}
    )
    distortion: bool = field(
        default=True, metadata={"help": "Photometric distortion of training crops."}
    )
    iterations: int = field(default=40_000, metadata={"help": "Steps of a probe."})
    batch: int = field(default=16, metadata={"help": "Images a step, all processes."})
    probe_lr: float = field(default=1e-3, metadata={"help": "Learning rate, AdamW."})
    probe_weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay, AdamW."}
    )
    warmup: int = field(
        default=1500,
        metadata={"help": "Steps of linear warm-up, at most a tenth of all."},
    )
    power: float = field(
        default=1.0, metadata={"help": "Exponent of the polynomial decay."}
    )
    head_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the 1x1 convolution."}
    )
    fast: bool = field(
        default=False,
        metadata={
            "help": "Encode every image once, whole and resized to crop x crop, and train "
            "on the cached tokens: minutes in place of hours, no augmentation but "
            "mirroring. Not comparable with published numbers."
        },
    )
    fast_iterations: int = field(
        default=1000, metadata={"help": "Steps of a probe in the fast mode."}
    )
    workers: int = field(
        default=0, metadata={"help": "Processes that prepare training crops."}
    )
    encode_batch: int = field(
        default=8, metadata={"help": "Images or windows the tower takes at once."}
    )

    def __post_init__(self) -> None:
        require(self, "crop", self.crop >= 1, "at least 1 pixel")
        require(self, "stride", self.stride >= 1, "at least 1 pixel")
        require(self, "scale_min", self.scale_min > 0, "positive")
        require(
            self,
            "scale_max",
            self.scale_max >= self.scale_min,
            f"scale_min ({self.scale_min}) or more",
        )
        require(self, "iterations", self.iterations >= 1, "at least 1")
        require(self, "fast_iterations", self.fast_iterations >= 1, "at least 1")
        require(self, "batch", self.batch >= 1, "at least 1")
        require(self, "encode_batch", self.encode_batch >= 1, "at least 1")
        require(self, "probe_lr", self.probe_lr > 0, "positive")
        require(self, "head_dropout", 0 <= self.head_dropout < 1, "in [0, 1)")

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

    depth_low: float = field(
        default=1e-3, metadata={"help": "Smallest depth in metres."}
    )
    depth_high: float = field(
        default=10.0, metadata={"help": "Largest depth in metres."}
    )
    depth_bins: int = field(default=256, metadata={"help": "Uniform bins of depth."})
    depth_scale: float = field(
        default=1000.0,
        metadata={
            "help": "Values of integer depth maps are divided by this to metres."
        },
    )
    depth_crop_height: int = field(
        default=416,
        metadata={"help": "Rows of a training crop, rounded up to patches."},
    )
    depth_crop_width: int = field(
        default=544,
        metadata={"help": "Columns of a training crop, rounded up to patches."},
    )
    depth_rotation: float = field(
        default=2.5,
        metadata={"help": "Training images turn by up to this, in degrees."},
    )
    depth_flip: float = field(
        default=0.5, metadata={"help": "Probability of mirroring a training crop."}
    )
    depth_distortion: bool = field(
        default=True, metadata={"help": "Photometric distortion of training crops."}
    )
    depth_iterations: int = field(
        default=38_400, metadata={"help": "Steps of a probe."}
    )
    depth_batch: int = field(default=16, metadata={"help": "Images a step."})
    depth_lr: float = field(
        default=5e-3, metadata={"help": "Highest learning rate, AdamW."}
    )
    depth_weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay, AdamW."}
    )
    depth_warmup: float = field(
        default=1 / 3, metadata={"help": "Share of the steps that warm up."}
    )
    depth_clip: float = field(default=35.0, metadata={"help": "Largest gradient norm."})
    depth_loss_warmup: int = field(
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
        require(self, "depth_low", self.depth_low > 0, "positive")
        require(self, "depth_high", self.depth_high > self.depth_low, "above depth_low")
        require(self, "depth_bins", self.depth_bins >= 2, "at least 2")
        require(self, "depth_scale", self.depth_scale > 0, "positive")
        for name in ("depth_crop_height", "depth_crop_width"):
            require(self, name, getattr(self, name) >= 1, "at least 1 pixel")
        for name in ("depth_iterations", "depth_batch"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "depth_lr", self.depth_lr > 0, "positive")
        require(self, "depth_warmup", 0 <= self.depth_warmup < 1, "in [0, 1)")

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
    window: int | None = field(
        default=None,
        metadata={
            "help": "Side of the test window in pixels; rounded up to whole patches. "
            "Unset: the size the tower was trained at."
        },
    )
    window_stride: int | None = field(
        default=None,
        metadata={"help": "Step of the window in pixels. Unset: half a window."},
    )
    short_side: int | None = field(
        default=None,
        metadata={
            "help": "Shorter side of the image in pixels, a window or more. Unset: 1.5 "
            "windows (336 of 224), COCO-Stuff 2, Cityscapes 2.5."
        },
    )
    text_scale: float | None = field(
        default=None,
        metadata={
            "help": "Cosines are multiplied by this before the softmax. Unset: 40, with "
            "background 50, VOC21 65."
        },
    )
    background_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Pixels whose best class is less probable are background. Unset: 0.1 "
            "for VOC21, Context60 and COCO-Object, else none."
        },
    )
    sigma: float = field(
        default=5.0, metadata={"help": "Width of naclip's Gaussian in patches."}
    )
    window_batch: int = field(
        default=8, metadata={"help": "Windows the tower takes at once."}
    )

    def __post_init__(self) -> None:
        choices = " or ".join(TEMPLATES)
        require(self, "templates", self.templates in TEMPLATES, choices)
        require(self, "sigma", self.sigma > 0, "positive")
        require(self, "window_batch", self.window_batch >= 1, "at least 1")
        for name in ("window", "window_stride", "short_side"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "at least 1, or unset")
        scale, threshold = self.text_scale, self.background_threshold
        require(self, "text_scale", scale is None or scale > 0, "positive, or unset")
        require(
            self,
            "background_threshold",
            threshold is None or 0 <= threshold < 1,
            "in [0, 1), or unset",
        )
