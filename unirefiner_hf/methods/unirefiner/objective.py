"""UniRefiner's training objective: every pass of one step in one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import record_function

from ...modeling.errors import UniRefinerError
from ...modeling.modeling_unirefiner import UniRefinerModel
from ...spurious import composites, detectors, filters, similarity
from .. import losses, views
from ..distillation.objective import Distillation
from ..objective import (
    COMPOSITES,
    CROPS,
    FULL_IMAGE,
    LOSSES,
    STUDENT,
    Objective,
    Surroundings,
)
from ..settings import MethodSettings
from .settings import UniRefinerSettings

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


class UniRefiner(Distillation):
    """One UniRefiner step (arXiv 2605.19622): images in, loss and its parts out.

    The reference image is encoded once a run and size; queries and keys are read in the
    composite pass only, for `settings.ah_layers` only.

    Args:
        model: the register model, its tower wrapped by a PEFT adapter.
        settings: hyper-parameters of the method.
        reference: ``(1, 3, height, width)``, see `Surroundings`.
        register_factor: see `Surroundings`.

    Raises:
        UniRefinerError: the tower has no adapter, or lacks an attention-flow layer.
    """

    LOSS_TERMS = ("loss_regu", "loss_uni", "loss_spu", "loss_scd")
    METRICS = (*LOSS_TERMS, "theta", "clean_ratio", *FILTERS)
    reference: Tensor

    def __init__(
        self,
        model: UniRefinerModel,
        settings: UniRefinerSettings,
        reference: Tensor,
        register_factor: int = 32,
    ) -> None:
        super().__init__(model, settings)
        layers = model.config.vision_config.num_hidden_layers
        if settings.flow_layers and settings.flow_layers[-1] >= layers:
            raise UniRefinerError(
                f"ah_layers is {settings.ah_layers}, but the tower has {layers} layers "
                f"(0 to {layers - 1})."
            )
        self.register_factor = register_factor
        self.register_buffer("reference", reference.float(), persistent=False)
        self._reference_cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def build(
        cls, model: UniRefinerModel, settings: MethodSettings, given: Surroundings
    ) -> Objective:
        """See `Objective.build`."""
        assert isinstance(settings, UniRefinerSettings)
        return cls(model, settings, given.reference, given.register_factor)

    def register_width(self, height: int, width: int) -> int:
        """Border in patches for an image of this many pixels (method, section 2)."""
        side = min(height, width) // self.model.patch_size
        return max(1, side // self.register_factor)

    def prepare(self, height: int, width: int) -> None:
        """Encode the reference image."""
        self.reference_views(height, width)

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch; see `Objective.forward`.

        Returns:
            ``loss`` with gradient, and without: the four terms (L_scd once it has set in),
            ``theta``, ``clean_ratio`` and the share of crop tokens each filter rejects.
        """
        height, width = pixel_values.shape[-2:]
        registers = self.register_width(height, width)
        boxes, crops = self.draw_crops(pixel_values)
        side = composites.draw_side()
        teacher = self.teacher_views(pixel_values, crops, side)

        with record_function(STUDENT):
            student = self.model.encode(pixel_values, register_width=registers)
        frame = max(registers, self.settings.scd_register_width)
        relation = self.relation_target(crops, frame, progress)
        with (
            torch.autocast(pixel_values.device.type, enabled=False),
            record_function(LOSSES),
        ):
            return self._all_losses(
                self.unit(student.image),
                self.unit(student.registers),
                teacher,
                relation,
                boxes,
                student.grid,
            )

    def teacher_views(
        self, pixel_values: Tensor, crops: Tensor, side: str
    ) -> TeacherViews:
        """Every teacher pass of the step, L2-normalised, without lazy channels."""
        ratio = self.settings.strip_ratio
        height, width = pixel_values.shape[-2:]
        grid = (height // self.model.patch_size, width // self.model.patch_size)
        layers = self.settings.flow_layers
        alone = None
        with self.teaching():
            reference, _ = self.reference_views(height, width)
            images = composites.add_strip(
                crops, reference, side, self.model.patch_size, ratio
            )
            with record_function(COMPOSITES):
                tokens, flow = self._encode_with_flow(images, layers)
            crop, strip = composites.split_strip(tokens, grid, side, ratio)
            with record_function(FULL_IMAGE):
                image = self.encode(pixel_values, 0)
            if self.settings.target_view == "crop":
                with record_function(CROPS):
                    alone = self.unit(self.encode(crops, 0))

        def foreground(projection: Tensor) -> Tensor:
            return composites.split_strip(projection, grid, side, ratio)[0]

        crop = self.unit(crop)
        return TeacherViews(
            image=self.unit(image),
            crop=crop,
            strip=self.unit(strip),
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
            with self.teaching():
                tokens = self.model.encode(pixels, register_width=0).image
            self._reference_cache[size] = pixels, self.unit(tokens)
        return self._reference_cache[size]

    def set_channel_mask(self, channel_mask: Tensor) -> None:
        """See `Objective.set_channel_mask`."""
        super().set_channel_mask(channel_mask)
        self._reference_cache.clear()

    def _all_losses(
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
        size = (grid[0] * self.model.patch_size, grid[1] * self.model.patch_size)
        with torch.no_grad():
            clean, candidates, rejected = self._filter(
                teacher, target, crop_registers, self.reference_views(*size)[1]
            )
            theta = losses.unrelated_similarity(target, clean)

        source = teacher.source
        terms = {
            "loss_regu": self.refinement_term(crop, target, source, full, clean, theta),
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
            terms["loss_scd"] = self.relation_term(crop, relation)
            loss = loss + settings.scd_weight * terms["loss_scd"]
        detached = {name: term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "theta": theta, **rejected}

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

    def _encode_with_flow(
        self, images: Tensor, layers: tuple[int, ...]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        parts = [
            self.model.encode(chunk, 0, query_key_layers=layers)
            for chunk in images.split(self.chunk(images))
        ]
        flow = [
            (
                torch.cat([part.queries_keys[layer][0] for part in parts]),
                torch.cat([part.queries_keys[layer][1] for part in parts]),
            )
            for layer in layers
        ]
        return torch.cat([part.image for part in parts]), flow
