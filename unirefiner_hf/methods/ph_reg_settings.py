"""Hyper-parameters of PH-Reg."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..spurious.settings import require


@dataclass
class PHRegSettings:
    """Hyper-parameters of one PH-Reg step (arXiv 2505.21501), read by ``method: ph_reg``.

    Defaults are the published ones.

    Raises:
        ValueError: a value is outside its range.
    """

    register_tokens: int = field(
        default=16,
        metadata={
            "help": "PH-Reg: learned tokens that join the sequence. 0: the same distillation "
            "without registers, its control."
        },
    )
    teacher_views: int = field(
        default=10,
        metadata={
            "help": "PH-Reg: views the teacher is averaged over, the image itself the first. "
            "1: no denoising."
        },
    )
    teacher_shift: float = field(
        default=0.15,
        metadata={
            "help": "PH-Reg: how far a view is moved at most, as a share of the grid."
        },
    )
    teacher_offsets: int = field(
        default=100,
        metadata={
            "help": "PH-Reg: offsets drawn, of which the views keep those far from each other."
        },
    )
    teacher_flip: float = field(
        default=0.5,
        metadata={"help": "PH-Reg: probability that a view is mirrored."},
    )
    mse_weight: float = field(
        default=1.0,
        metadata={
            "help": "PH-Reg: weight of the squared error beside the cosine's loss."
        },
    )

    def __post_init__(self) -> None:
        require(self, "register_tokens", self.register_tokens >= 0, "0 or more")
        require(self, "teacher_views", self.teacher_views >= 1, "at least 1")
        require(self, "teacher_shift", 0 <= self.teacher_shift < 0.5, "in [0, 0.5)")
        require(
            self,
            "teacher_offsets",
            self.teacher_offsets >= self.teacher_views,
            f"teacher_views ({self.teacher_views}) or more",
        )
        require(self, "teacher_flip", 0 <= self.teacher_flip <= 1, "in [0, 1]")
        require(self, "mse_weight", self.mse_weight >= 0, "0 or more")
