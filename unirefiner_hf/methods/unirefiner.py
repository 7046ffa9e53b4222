"""UniRefiner's training objective: every pass of one step in one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from ..modeling.modeling_unirefiner import UniRefinerModel
from ..spurious import composites, detectors, filters, similarity
from . import losses, views
from .settings import UniRefinerSettings

LOSS_TERMS = ("loss_regu", "loss_uni", "loss_spu", "loss_scd")
FILTERS = tuple(f"rejected_{name}" for name in filters.NAMES)


@dataclass
class TeacherViews:
    """What the frozen tower says of one batch; crops of an image side by side.

    Attributes:
        image: ``(batch, patches, channels)``, tokens of the full images (Y).
        crop: ``(batch * crops, patches, channels)``, crop part of the composites (F).
        strip: ``(batch * crops, strip patches, channels)``, their reference part (K).
        source: ``(batch * crops, patches, channels)``, what targets are made of: `crop`, or
            the tokens of the crops without a strip (`settings.target_view`).
        flow: queries and keys of the crop part for each attention-flow layer.
    """

    image: Tensor
    crop: Tensor
    strip: Tensor
    source: Tensor
    flow: list[tuple[Tensor, Tensor]]


class UniRefinerObjective(nn.Module):
    """One UniRefiner step (arXiv 2605.19622): images in, loss and its parts out.

    Student and teacher are one tower: the student with its adapter on, the teacher
    with its adapter off, so the base is in memory once. Passes of the teacher and of
    the relation target build no graph, run with dropout off and in chunks of
    `settings.no_grad_batch` images; the reference image is encoded once a run and
    size; queries and keys are read in the composite pass only, for
    `settings.ah_layers` only.

    Args:
        model: the register model, its tower wrapped by a PEFT adapter.
        settings: hyper-parameters of the method.
        reference: ``(1, 3, height, width)``, the unrelated reference image, normalised
            as the training images are.
        register_factor: the frame is ``max(1, floor(side / register_factor))`` patches
            wide, side being the shorter side of the image in patches.
        channel_mask: ``(hidden,)``, 0 for lazy channels; None keeps every channel.
        white: ``(3,)``, white in the space of the images, for methods that fill with it;
            None: 1.

    Raises:
        TypeError: the tower has no PEFT adapter.
        ValueError: an attention-flow layer the tower does not have.
    """

    reference: Tensor
    channel_mask: Tensor
    white: Tensor

    def __init__(
        self,
        model: UniRefinerModel,
        settings: UniRefinerSettings,
        reference: Tensor,
        register_factor: int = 32,
        channel_mask: Tensor | None = None,
        white: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._check_tower(model)
        layers = model.config.vision_config.num_hidden_layers
        if settings.flow_layers and settings.flow_layers[-1] >= layers:
            raise ValueError(
                f"ah_layers is {settings.ah_layers}, but the tower has {layers} layers "
                f"(0 to {layers - 1})."
            )
        self.model = model
        self.settings = settings
        self.register_factor = register_factor
        if channel_mask is None:
            channel_mask = torch.ones(model.config.vision_config.hidden_size)
        self.register_buffer("channel_mask", channel_mask, persistent=False)
        white = torch.ones(3) if white is None else white
        self.register_buffer("white", white, persistent=False)
        self.register_buffer("reference", reference.float(), persistent=False)
        self._reference_cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _check_tower(self, model: UniRefinerModel) -> None:
        if not isinstance(model.tower, PeftModel):
            raise TypeError(
                "UniRefinerObjective needs a tower with an adapter: the teacher is the "
                "tower with its adapter off. Wrap model.tower with peft.get_peft_model."
            )

    def register_width(self, height: int, width: int) -> int:
        """Frame in patches for an image of this many pixels (method, section 2)."""
        side = min(height, width) // self.model.patch_size
        return max(1, side // self.register_factor)

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            pixel_values: ``(batch, 3, height, width)``, normalised.
            progress: share of the run that is done, in [0, 1]; L_scd sets in at
                `settings.scd_start`.

        Returns:
            ``loss`` with gradient, and without: the four terms, ``theta``,
            ``clean_ratio`` and the share of crop tokens each filter rejects.
        """
        settings = self.settings
        height, width = pixel_values.shape[-2:]
        registers = self.register_width(height, width)
        boxes, crops = self.draw_crops(pixel_values)
        side = composites.draw_side()
        teacher = self.teacher_views(pixel_values, crops, side)

        # The pass with gradient comes before the relation pass: autocast would else
        # reuse the adapter weights it cast without one.
        student = self.model.encode(pixel_values, register_width=registers)
        relation = None
        if progress >= settings.scd_start and settings.scd_weight > 0:
            frame = max(registers, settings.scd_register_width)
            with self._without_gradient():
                relation = self._encode(crops, frame)

        with torch.autocast(pixel_values.device.type, enabled=False):
            return self._losses(
                self._unit(student.image),
                self._unit(student.registers),
                teacher,
                self._unit(relation) if relation is not None else None,
                boxes,
                student.grid,
            )

    def draw_crops(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and pixels of the step's crops, at the size of the images.

        Returns:
            Boxes as of `views.propose_crops`, and ``(batch * crops, 3, height, width)``.
        """
        settings = self.settings
        boxes = views.propose_crops(
            len(pixel_values),
            settings.num_crops,
            (settings.crop_area_min, settings.crop_area_max),
            settings.crop_aspect_max,
        ).to(pixel_values.device)
        height, width = pixel_values.shape[-2:]
        return boxes, views.crop_maps(pixel_values, boxes, (height, width))

    def teacher_views(
        self, pixel_values: Tensor, crops: Tensor, side: str
    ) -> TeacherViews:
        """Every teacher pass of the step, L2-normalised, without lazy channels."""
        ratio = self.settings.strip_ratio
        height, width = pixel_values.shape[-2:]
        grid = (height // self.model.patch_size, width // self.model.patch_size)
        layers = self.settings.flow_layers
        with self._without_gradient(), self._adapter_off():
            reference, _ = self.reference_views(height, width)
            images = composites.add_strip(
                crops, reference, side, self.model.patch_size, ratio
            )
            tokens, flow = self._encode_with_flow(images, layers)
            crop, strip = composites.split_strip(tokens, grid, side, ratio)
            image = self._encode(pixel_values, 0)
            alone = None
            if self.settings.target_view == "crop":
                alone = self._unit(self._encode(crops, 0))

        def foreground(projection: Tensor) -> Tensor:
            return composites.split_strip(projection, grid, side, ratio)[0]

        crop = self._unit(crop)
        return TeacherViews(
            image=self._unit(image),
            crop=crop,
            strip=self._unit(strip),
            source=crop if alone is None else alone,
            flow=[(foreground(q), foreground(k)) for q, k in flow],
        )

    def reference_views(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The reference at this size and its teacher tokens, encoded once.

        Returns:
            Pixels ``(1, 3, height, width)`` and L2-normalised tokens
            ``(1, patches, channels)``.
        """
        size = (height, width)
        if size not in self._reference_cache:
            pixels = self.reference
            if pixels.shape[-2:] != size:
                pixels = functional.interpolate(
                    pixels, size, mode="bicubic", antialias=True
                )
            with self._without_gradient(), self._adapter_off():
                tokens = self.model.encode(pixels, register_width=0).image
            self._reference_cache[size] = pixels, self._unit(tokens)
        return self._reference_cache[size]

    def teacher_tokens(self, pixel_values: Tensor) -> Tensor:
        """The teacher's ``(batch, patches, hidden)`` tokens as they are, no gradient."""
        with self._without_gradient(), self._adapter_off():
            return self.model.encode(pixel_values.to(self.reference), 0).image

    @property
    def looks_for_lazy_channels(self) -> bool:
        """Whether the channels that dominate every cosine are looked for before training."""
        return self.settings.lazy_channels

    def set_channel_mask(self, channel_mask: Tensor) -> None:
        """Leave the channels that are 0 in ``(hidden,)`` out of every cosine."""
        self.channel_mask.copy_(channel_mask)
        self._reference_cache.clear()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the student's activations in the backward pass (transformers < 5.23).

        Both names take the options of the tower's method of that name.
        """
        self.model.tower.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the student's activations in the backward pass."""
        self.model.tower.activation_checkpointing_enable(**options)

    def _losses(
        self,
        image: Tensor,
        registers: Tensor,
        teacher: TeacherViews,
        relation: Tensor | None,
        boxes: Tensor,
        grid: tuple[int, int],
    ) -> dict[str, Tensor]:
        settings = self.settings
        crops = boxes.shape[1]
        temperature = settings.temperature
        crop = functional.normalize(views.crop_tokens(image, grid, boxes), dim=-1)
        full = teacher.image.repeat_interleave(crops, dim=0)
        crop_registers = registers.repeat_interleave(crops, dim=0)

        target = self.targets(teacher.source, full)
        negatives = full if settings.negatives_of_image else teacher.source
        size = (grid[0] * self.model.patch_size, grid[1] * self.model.patch_size)
        with torch.no_grad():
            clean, candidates, rejected = self._filter(
                teacher, target, crop_registers, self.reference_views(*size)[1]
            )
            theta = losses.unrelated_similarity(target, clean)

        terms = {
            "loss_regu": losses.refinement_loss(
                crop,
                target,
                negatives,
                clean,
                theta,
                temperature=temperature,
                uniformity=settings.uniformity,
            ),
            "loss_uni": losses.register_uniformity_loss(
                image,
                registers,
                threshold=settings.detector_cosine,
                temperature=temperature,
            ),
            "loss_spu": losses.absorption_loss(
                crop_registers, candidates, crop, full, theta, temperature=temperature
            ),
        }
        loss = terms["loss_regu"] + settings.uni_weight * terms["loss_uni"]
        loss = loss + settings.spurious_weight * terms["loss_spu"]
        if relation is not None:
            terms["loss_scd"] = losses.correlation_loss(
                crop, relation, temperature=temperature
            )
            loss = loss + settings.scd_weight * terms["loss_scd"]
        detached = {name: term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "theta": theta, **rejected}

    def targets(self, source: Tensor, full: Tensor) -> Tensor:
        """What crop tokens are pulled to: the nearest tokens of the full image, or `source`.

        Args:
            source: ``(batch * crops, patches, channels)``, L2-normalised, see `TeacherViews`.
            full: ``(batch * crops, patches, channels)``, of the images.
        """
        if self.settings.match_to_full_image:
            return similarity.nearest_tokens(source, full)
        return source

    def _filter(
        self,
        teacher: TeacherViews,
        target: Tensor,
        registers: Tensor,
        reference: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clean mask, absorption candidates, and the share each filter rejects."""
        settings = self.settings
        scores = filters.fpgp_scores(teacher.crop, reference, teacher.strip)
        candidates = [
            similarity.draw_most_similar(
                teacher.crop, score, settings.absorption_top, registers.shape[1]
            )
            for score in scores.values()
        ]
        drawn = detectors.draw_detectors(registers, settings.detector_share)
        found = filters.judge(
            scores, target, drawn, teacher.flow, settings, self.num_heads
        )
        kept = ~found.spurious
        shares = {
            f"rejected_{name}": mask.float().mean()
            for name, mask in found.rejected.items()
        }
        shares["clean_ratio"] = kept.float().mean()
        if not kept.any():
            kept = torch.ones_like(kept)
        return kept, torch.cat(candidates, dim=1), shares

    @property
    def num_heads(self) -> int:
        """Attention heads of the tower."""
        return int(self.model.config.vision_config.num_attention_heads)

    def _unit(self, tokens: Tensor) -> Tensor:
        return similarity.unit_tokens(tokens, self.channel_mask)

    def _encode(self, images: Tensor, register_width: int) -> Tensor:
        chunks = images.split(self._chunk(images))
        return torch.cat([self.model.encode(c, register_width).image for c in chunks])

    def _encode_with_flow(
        self, images: Tensor, layers: tuple[int, ...]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        parts = [
            self.model.encode(chunk, 0, query_key_layers=layers)
            for chunk in images.split(self._chunk(images))
        ]
        flow = [
            (
                torch.cat([part.queries_keys[layer][0] for part in parts]),
                torch.cat([part.queries_keys[layer][1] for part in parts]),
            )
            for layer in layers
        ]
        return torch.cat([part.image for part in parts]), flow

    def _chunk(self, images: Tensor) -> int:
        if self.settings.no_grad_batch is not None:
            return self.settings.no_grad_batch
        return 2 if images.device.type == "cpu" else len(images)

    @contextmanager
    def _without_gradient(self) -> Iterator[None]:
        """No graph, dropout off, gradient checkpointing idle."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """The teacher: the tower as it was before the adapter."""
        with self.model.tower.disable_adapter():
            yield
