"""What every method's training objective shares: student and frozen teacher in one tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..loading.adapter import disable_adapter
from ..loading.arguments import BackboneArguments
from ..loading.lora import add_adapter
from ..modeling.errors import UniRefinerError
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..spurious import similarity
from .settings import MethodSettings

COMPOSITES = "teacher, composites"
CROPS = "teacher, crops"
VIEWS = "teacher, shifted views"
FULL_IMAGE = "teacher, full image"
STUDENT = "student forward"
RELATION = "relation crops"
LOSSES = "losses and filters"
PASSES = (COMPOSITES, CROPS, VIEWS, FULL_IMAGE, STUDENT, RELATION)
"""Parts of a step as `torch.profiler.record_function` names them; passes of the tower."""


@dataclass(frozen=True)
class Surroundings:
    """What a run gives an objective beside the model; each takes what it reads.

    Attributes:
        reference: ``(1, 3, height, width)``, the unrelated reference image, normalised as
            the training images are.
        register_factor: the border is ``max(1, floor(side / register_factor))`` patches
            wide, side being the shorter side of the image in patches.
        white: ``(3,)``, white in the space of the images.
    """

    reference: Tensor
    register_factor: int
    white: Tensor


class Objective(nn.Module):
    """One training step of a method: images in, loss and its parts out.

    Student and teacher are one tower: the student with its adapter on, the teacher
    with its adapter off, so the base is in memory once. Passes without gradient run with
    dropout off and in chunks of `settings.no_grad_batch` images. Parts of the step are
    scopes of `torch.profiler.record_function`, named as in this module.

    A subclass gives `forward`, and `build` where it reads the surroundings.

    Args:
        model: the register model, its tower made trainable by `attach`.
        settings: hyper-parameters of the method.

    Attributes:
        LOSS_TERMS: names of the loss's terms in what `forward` returns.
        METRICS: names of everything in it that is logged.
        needs_whole_weights: each process has to hold every weight of the tower.

    Raises:
        UniRefinerError: the tower is not trainable as the method needs it.
    """

    LOSS_TERMS: ClassVar[tuple[str, ...]] = ()
    METRICS: ClassVar[tuple[str, ...]] = ()
    needs_whole_weights: ClassVar[bool] = False
    channel_mask: Tensor

    def __init__(self, model: UniRefinerModel, settings: MethodSettings) -> None:
        super().__init__()
        self.check_tower(model)
        self.model = model
        self.settings: Any = settings
        mask = torch.ones(model.config.vision_config.hidden_size)
        self.register_buffer("channel_mask", mask, persistent=False)

    @classmethod
    def build(
        cls, model: UniRefinerModel, settings: MethodSettings, given: Surroundings
    ) -> Objective:
        """The objective of a run."""
        return cls(model, settings)

    @classmethod
    def attach(
        cls,
        model: UniRefinerModel,
        settings: MethodSettings,
        args: BackboneArguments,
        name: str,
    ) -> None:
        """Make the tower trainable, in place: here a fresh LoRA adapter.

        Args:
            name: what the adapter's config calls its base.
        """
        hidden = model.config.vision_config.hidden_size
        if args.lora_rank > hidden:
            raise UniRefinerError(
                f"lora_rank is {args.lora_rank}; the tokens of this backbone have {hidden} "
                "channels, beyond which a rank adds nothing."
            )
        model.tower = add_adapter(
            model.tower,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            name=name,
        )

    @classmethod
    def base_dtype(cls, args: BackboneArguments, bf16: bool) -> torch.dtype:
        """Type of the frozen weights."""
        if args.base_dtype == "auto":
            return torch.bfloat16 if bf16 else torch.float32
        return getattr(torch, args.base_dtype)

    @classmethod
    def check_tower(cls, model: UniRefinerModel) -> None:
        """Refuse a tower that `attach` did not make trainable."""
        if not isinstance(model.tower, PeftModel):
            raise UniRefinerError(
                f"{cls.__name__} needs a tower with an adapter: the teacher is the tower "
                "with its adapter off. Wrap model.tower with peft.get_peft_model."
            )

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            pixel_values: ``(batch, 3, height, width)``, normalised.
            progress: share of the run that is done, in [0, 1].

        Returns:
            ``loss`` with gradient, and without: scalars named in `METRICS`.
        """
        raise NotImplementedError

    def register_width(self, height: int, width: int) -> int:
        """Border in patches for an image of this many pixels; here none."""
        return 0

    def prepare(self, height: int, width: int) -> None:
        """Compute once what every step of images of this size will read; here nothing."""

    def teacher_tokens(self, pixel_values: Tensor) -> Tensor:
        """The teacher's ``(batch, patches, hidden)`` tokens as they are, no gradient."""
        with self.teaching():
            return self.model.encode(pixel_values.to(self.channel_mask), 0).image

    @property
    def looks_for_lazy_channels(self) -> bool:
        """Whether the channels that dominate every cosine are looked for before training."""
        return False

    def set_channel_mask(self, channel_mask: Tensor) -> None:
        """Leave the channels that are 0 in ``(hidden,)`` out of every cosine."""
        self.channel_mask.copy_(channel_mask)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the student's activations in the backward pass (transformers < 5.23).

        Both names take the options of the tower's method of that name.
        """
        self.model.tower.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the student's activations in the backward pass."""
        self.model.tower.activation_checkpointing_enable(**options)

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """The teacher: the tower as it was, no graph, dropout off."""
        with self.without_gradient(), disable_adapter(self.model):
            yield

    @contextmanager
    def without_gradient(self) -> Iterator[None]:
        """No graph, dropout off, gradient checkpointing idle."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def unit(self, tokens: Tensor) -> Tensor:
        """L2-normalised tokens without lazy channels."""
        return similarity.unit_tokens(tokens, self.channel_mask)

    def encode(self, images: Tensor, register_width: int) -> Tensor:
        """Image tokens ``(images, patches, hidden)``, chunk by chunk."""
        chunks = images.split(self.chunk(images))
        return torch.cat([self.model.encode(c, register_width).image for c in chunks])

    def chunk(self, images: Tensor) -> int:
        """Images a pass without gradient takes at once."""
        if self.settings.no_grad_batch is not None:
            return self.settings.no_grad_batch
        return 2 if images.device.type == "cpu" else len(images)
