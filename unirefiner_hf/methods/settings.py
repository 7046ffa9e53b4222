"""What a method tells of itself, without torch: the contract of every settings class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TYPE_CHECKING, Any, ClassVar

from ..errors import UniRefinerError
from ..values import check_values

if TYPE_CHECKING:
    from .objective import Objective

BORDER = ("register_factor", "register_fill", "inference_register_width")
"""Fields of `BackboneArguments` that only a method with a border of registers reads."""
ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout")
"""Fields that only a method which trains an adapter reads."""
REDUCED = ("base_dtype", "base_quantization", "teacher_float8")
"""Fields that only a method which leaves the backbone's own weights frozen reads."""


@dataclass
class MethodSettings:
    """Hyper-parameters of a method; the class says what the method is.

    Attributes:
        name: of the method in recipes, records and the checkpoint's config.
        title: in tables.
        ending: what the name of its model ends with, ``dinov2-base-<ending>``.
        is_control: others are compared with it; it needs no control itself.
        has_border: it trains a border of register patches, which the model keeps.
        unread: fields of `BackboneArguments` it does not read, and why not.
        summary, registers, usage: sentences of the model card; fields in braces are the
            recipe's settings, ``{base}`` the backbone.
        citation: BibTeX of what describes the method; empty for none.

    Raises:
        UniRefinerError: a value is outside its range.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    ending: ClassVar[str]
    is_control: ClassVar[bool] = False
    has_border: ClassVar[bool] = False
    unread: ClassVar[Mapping[str, str]] = {}
    summary: ClassVar[str]
    registers: ClassVar[str] = ""
    usage: ClassVar[str]
    citation: ClassVar[str] = ""

    no_grad_batch: Annotated[int | None, "[1, inf)"] = field(
        default=None,
        metadata={
            "help": "Images a pass without gradient takes at once. Smaller needs less "
            "memory; the result is the same. Unset: 2 on a CPU, all on a GPU."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)

    @classmethod
    def objective(cls) -> type[Objective]:
        """The training objective of the method; imports torch."""
        raise NotImplementedError(f"{cls.__name__} names no objective.")

    @property
    def num_register_tokens(self) -> int:
        """Learned register tokens that join the sequence."""
        return 0

    @property
    def full_loss_from(self) -> float:
        """Share of the run before the last term of the loss sets in."""
        return 0.0

    def check(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Refuse what the method does not read.

        Args:
            given: field of `BackboneArguments` -> value.
            defaults: the same of arguments nobody changed.

        Raises:
            UniRefinerError: names the field, its value and the method.
        """
        for field_name, why in self.unread.items():
            if given[field_name] != defaults[field_name]:
                raise UniRefinerError(
                    f"{field_name} is {given[field_name]!r}, which does not go with method "
                    f"{self.name}: {why}. Leave it out."
                )
