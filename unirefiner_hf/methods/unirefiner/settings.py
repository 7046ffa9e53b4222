"""Hyper-parameters of UniRefiner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TYPE_CHECKING

from ...spurious.settings import FilterSettings
from ..distillation.settings import DistillationSettings

if TYPE_CHECKING:
    from .objective import UniRefiner

TARGET_VIEWS = ("composite", "crop")


@dataclass
class UniRefinerSettings(FilterSettings, DistillationSettings):
    """Hyper-parameters of one UniRefiner step (arXiv 2605.19622).

    Defaults are those of the authors' release. Similarities are cosines,
    widths and layers are counted in patches and from 0.

    Raises:
        UniRefinerError: a value is outside its range.
    """

    name = "unirefiner"
    title = "refined"
    ending = "unirefined"
    is_control = False
    has_border = True
    unread = {}
    summary = (
        "{base}, refined by UniRefiner so that its patch tokens describe their own place. "
        "Large vision transformers hide good spatial features under spurious tokens: patch "
        "tokens that carry a fixed pattern, the whole scene, or a neighbour. A low-rank "
        "adapter was trained, by self-distillation on unlabelled images, to move them into a "
        "border of register patches whose tokens are dropped; it is merged into these weights."
    )
    usage = (
        "`register_width=` in the call widens the border of registers; a wider one than in "
        "training often gives a cleaner map. `register_width=0` leaves it out."
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
    absorption_top: Annotated[float, "(0, 1]"] = field(
        default=0.4,
        metadata={
            "help": "Absorption candidates are drawn from this share of the tokens "
            "most similar to the reference."
        },
    )
    uni_weight: Annotated[float, "[0, inf)"] = field(
        default=1.0,
        metadata={
            "help": "Weight of L_uni, which pushes image tokens away from register "
            "tokens. 0 leaves it out (published ablation: 45.8 in place of 49.8 mIoU)."
        },
    )
    spurious_weight: Annotated[float, "[0, inf)"] = field(
        default=0.1,
        metadata={
            "help": "Weight of L_spu, the absorption loss. 0 leaves it out (published "
            "ablation: 45.0 in place of 49.8 mIoU)."
        },
    )
    scd_register_width: Annotated[int, "[0, 256]"] = field(
        default=4,
        metadata={
            "help": "Smallest frame, in patches, of the crops that give L_scd its target."
        },
    )

    def __post_init__(self) -> None:
        FilterSettings.__post_init__(self)
        DistillationSettings.__post_init__(self)

    @classmethod
    def objective(cls) -> type[UniRefiner]:
        """See `MethodSettings.objective`."""
        from .objective import UniRefiner

        return UniRefiner
