"""What a recipe says of the backbone and what is added to it; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Annotated, Any

from ..errors import require
from ..modeling.fills import FILLS
from ..values import check_values

QUANTIZATIONS = ("nf4", "int8")
BASE_DTYPES = ("auto", "float32", "bfloat16")


def both_sides(size: Any) -> tuple[int, int]:
    """Height and width in pixels: of a side, or of two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def fewest_sides(size: Any) -> int | list[int]:
    """One side of a square, else height and width; as records and recipes write it."""
    height, width = both_sides(size)
    return height if height == width else [height, width]


@dataclass
class BackboneArguments:
    """The backbone, its border of registers and its adapter (published: rank 8, alpha 16).

    Raises:
        UniRefinerError: a value is outside its range.
    """

    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model."}
    )
    model_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the model, for the card. Unset: read from the model's own "
            "card; where that says nothing, the card says unknown."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the model repository's own code. Off unless asked for."},
    )
    keep_text: bool | None = field(
        default=None,
        metadata={
            "help": "Put the base's text encoder, projections and tokenizer, unchanged, into "
            "text/ of the merged model, so that it stays a dual encoder. Unset: where the "
            "base has them."
        },
    )
    base_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the frozen backbone; the adapter is trained in float32. "
            "'auto': bfloat16 where bf16 is on, else float32.",
            "choices": list(BASE_DTYPES),
        },
    )
    base_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Keep the frozen layers in fewer bits: 'nf4' (about a quarter of "
            "bfloat16) or 'int8' (half), through bitsandbytes; for small cards. The "
            "merge is into the unquantised base. Unset: no.",
            "choices": list(QUANTIZATIONS),
        },
    )
    teacher_float8: bool = field(
        default=False,
        metadata={
            "help": "Frozen weights multiply in float8 in the passes without gradient "
            "(teacher, relation): faster on GPUs from compute capability 8.9 on, one byte "
            "a weight more. The student stays as it is."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How attention is computed: sdpa, flash_attention_2 (its package has "
            "to be there), eager, ... Unset: transformers chooses, sdpa for every family."
        },
    )
    image_size: Annotated[list[int] | None, "[1, inf)"] = field(
        default=None,
        metadata={
            "help": "Side, or height and width, in pixels; multiples of the patch size. "
            "Unset: as in pretraining."
        },
    )
    final_norm: bool | None = field(
        default=None,
        metadata={
            "help": "Apply the backbone's last layer norm to the patch tokens of a family "
            "whose output lacks it. Unset: on for CLIP, as published, and MetaCLIP 2."
        },
    )
    register_factor: Annotated[int, "[1, inf)"] = field(
        default=32,
        metadata={"help": "The border is a side in patches // this wide, 1 at least."},
    )
    register_fill: str = field(
        default="zero",
        metadata={
            "help": "Pixels of the border.",
            "choices": list(FILLS),
        },
    )
    inference_register_width: Annotated[int | None, "[0, 256]"] = field(
        default=None,
        metadata={
            "help": "Border of the published model, in patches; wider than in training "
            "often gives a cleaner map. Unset: as in training."
        },
    )
    lora_rank: Annotated[int, "[1, inf)"] = field(
        default=8, metadata={"help": "Rank of the adapter."}
    )
    lora_alpha: Annotated[int, "[1, inf)"] = field(
        default=16, metadata={"help": "Scale of the adapter."}
    )
    lora_dropout: Annotated[float, "[0, 1)"] = field(
        default=0.1, metadata={"help": "Dropout of the adapter."}
    )

    def __post_init__(self) -> None:
        self.check_backbone()

    def check_backbone(self) -> None:
        """Refuse values outside their range."""
        given: Any = self.image_size
        sides = list(given) if isinstance(given, (list, tuple)) else [given]
        require(
            self,
            "image_size",
            given is None or (len(sides) in (1, 2) and all(map(_is_side, sides))),
            "a side of at least 1 pixel, height and width, or unset",
        )
        if given is not None:
            self.image_size = sides = [int(side) for side in sides]
        check_values(self, BackboneArguments)
        if given is not None:  # what one side is, is kept as one number
            self.image_size = fewest_sides([*sides, sides[0]])  # type: ignore[assignment]
        require(
            self,
            "teacher_float8",
            not (self.teacher_float8 and self.base_quantization),
            "false where base_quantization is set",
        )


def _is_side(side: Any) -> bool:
    return isinstance(side, Integral) and not isinstance(side, bool) and int(side) >= 1
