"""Settings of the filters that find spurious tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..errors import require
from ..values import check_values


@dataclass
class FilterSettings:
    """Settings of the filters that find spurious tokens (arXiv 2605.19622).

    Raises:
        UniRefinerError: a value is outside its range.
    """

    strip_ratio: Annotated[float, "(0, 1]"] = field(
        default=0.35,
        metadata={
            "help": "Width of the reference strip glued to a crop, as a share of "
            "the grid's width; rounded down to patches, then up to an even number."
        },
    )
    fpgp_sigma: Annotated[float, "(-inf, inf)"] = field(
        default=0.5,
        metadata={
            "help": "A token is a fixed pattern or global proxy when its highest "
            "cosine to the reference exceeds the image's mean by this many "
            "standard deviations. Lower rejects more."
        },
    )
    fpgp_cosine: Annotated[float | None, "[-1, 1]"] = field(
        default=None,
        metadata={
            "help": "A fixed cosine threshold in place of fpgp_sigma. Unset: fpgp_sigma."
        },
    )
    fpgp_filter: bool = field(
        default=True,
        metadata={
            "help": "Reject fixed patterns and global proxies. False leaves both FP-GP "
            "filters out of training; L_spu still draws its candidates by their scores."
        },
    )
    detector_filter: bool = field(
        default=True,
        metadata={
            "help": "Register tokens as detectors reject targets that resemble them. "
            "False leaves that filter out of training."
        },
    )
    detector_cosine: Annotated[float, "[-1, 1]"] = field(
        default=0.55,
        metadata={
            "help": "A target this similar to a register token is rejected; "
            "image-to-register cosines below it pass no gradient in L_uni."
        },
    )
    detector_share: Annotated[float, "(0, 1]"] = field(
        default=1 / 3,
        metadata={"help": "Share of the register tokens used as detectors."},
    )
    ah_layers: Annotated[list[int] | None, "[0, inf)"] = field(
        default=None,
        metadata={
            "help": "First and last layer (inclusive, from 0) whose attention flow "
            "finds attention hijackees. Unset: the filter is off."
        },
    )
    ah_sigma: Annotated[float, "(-inf, inf)"] = field(
        default=0.5,
        metadata={
            "help": "A token is an attention hijackee when its inflow is this many "
            "standard deviations below the mean."
        },
    )
    ah_form: str = field(
        default="release",
        metadata={
            "help": "'release': q and k normalised over all heads at once, no "
            "temperature, rejected keys set to 0. 'paper': softmax(q k^T / sqrt(d)) "
            "per head.",
            "choices": ["release", "paper"],
        },
    )

    def __post_init__(self) -> None:
        check_values(self, FilterSettings)
        layers = self.ah_layers
        require(
            self,
            "ah_layers",
            layers is None or (len(layers) == 2 and layers[0] <= layers[1]),
            "two layer numbers, the first not above the last, or unset",
        )

    @property
    def flow_layers(self) -> tuple[int, ...]:
        """Layers whose queries and keys the attention-flow filter reads."""
        if self.ah_layers is None:
            return ()
        return tuple(range(self.ah_layers[0], self.ah_layers[1] + 1))
