"""Hyper-parameters of PH-Reg."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TYPE_CHECKING

from ...errors import require
from ..settings import ADAPTER, BORDER, REDUCED, MethodSettings

if TYPE_CHECKING:
    from .objective import PHReg

OWN_WEIGHTS = "it trains weights of the backbone itself, in float32"


@dataclass
class PHRegSettings(MethodSettings):
    """Hyper-parameters of one PH-Reg step (arXiv 2505.21501).

    Defaults are the published ones.

    Raises:
        UniRefinerError: a value is outside its range.
    """

    name = "ph_reg"
    title = "PH-Reg"
    ending = "ph-reg"
    unread = {
        **dict.fromkeys(BORDER, "it trains without a border of registers"),
        **dict.fromkeys(ADAPTER, OWN_WEIGHTS),
        **dict.fromkeys(REDUCED, OWN_WEIGHTS),
    }
    summary = (
        "{base}, distilled by PH-Reg so that its patch tokens describe their own place. The "
        "teacher is the base itself, its tokens averaged over {teacher_views} moved and "
        "mirrored views of each unlabelled image, which artifacts do not follow; the student "
        "has {register_tokens} learned register tokens in its sequence, dropped at the end. "
        "They were trained together with its position and patch embeddings and its last "
        "layer; all of it is in these weights."
    )
    registers = (
        "{register_tokens} learned register tokens, added and removed by the model"
    )
    usage = "The register tokens are inside: there is nothing to set."
    citation = """@misc{phreg,
  title = {PH-Reg},
  eprint = {2505.21501},
  archivePrefix = {arXiv}
}"""

    register_tokens: Annotated[int, "[0, inf)"] = field(
        default=16,
        metadata={
            "help": "Learned tokens that join the sequence. 0: the same distillation "
            "without registers, its control."
        },
    )
    teacher_views: Annotated[int, "[1, inf)"] = field(
        default=10,
        metadata={
            "help": "Views the teacher is averaged over, the image itself the first. "
            "1: no denoising."
        },
    )
    teacher_shift: Annotated[float, "[0, 0.5)"] = field(
        default=0.15,
        metadata={"help": "How far a view is moved at most, as a share of the grid."},
    )
    teacher_offsets: Annotated[int, "[1, inf)"] = field(
        default=100,
        metadata={
            "help": "Offsets drawn, of which the views keep those far from each other."
        },
    )
    teacher_flip: Annotated[float, "[0, 1]"] = field(
        default=0.5,
        metadata={"help": "Probability that a view is mirrored."},
    )
    mse_weight: Annotated[float, "[0, inf)"] = field(
        default=1.0,
        metadata={"help": "Weight of the squared error beside the cosine's loss."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            "teacher_offsets",
            self.teacher_offsets >= self.teacher_views,
            f"teacher_views ({self.teacher_views}) or more",
        )

    @classmethod
    def objective(cls) -> type[PHReg]:
        """See `MethodSettings.objective`."""
        from .objective import PHReg

        return PHReg

    @property
    def num_register_tokens(self) -> int:
        """Learned tokens that join the sequence."""
        return self.register_tokens
