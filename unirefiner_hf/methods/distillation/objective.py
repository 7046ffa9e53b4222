"""The baseline's training objective: pull crops of the student to the frozen teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import record_function

from ...spurious import similarity
from .. import losses, views
from ..objective import CROPS, FULL_IMAGE, LOSSES, RELATION, STUDENT, Objective


class Distillation(Objective):
    """UniRefiner's step without what makes it UniRefiner, to compare it with.

    The same images, crops, adapter, targets, temperature and number of steps. Left out: the
    border of registers and with it L_uni and L_spu; the composites and every filter, so that
    each teacher token is a target. What stays is L_regu over all tokens, and L_scd with a
    target that has no border either (``scd_weight=0`` leaves it out). Published ablations of
    a sister method (arXiv 2505.21501, table of section 4) found most of the gain in such a
    control, so a refined model is worth what it adds to this one.
    """

    LOSS_TERMS: ClassVar[tuple[str, ...]] = ("loss_regu", "loss_scd")
    METRICS: ClassVar[tuple[str, ...]] = (*LOSS_TERMS, "theta", "clean_ratio")

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch; see `Objective.forward`.

        Returns:
            ``loss`` with gradient, and without: ``loss_regu``, ``loss_scd`` once it has set
            in, ``theta`` and ``clean_ratio``, which is 1.
        """
        boxes, crops = self.draw_crops(pixel_values)
        with self.teaching():
            with record_function(FULL_IMAGE):
                full = self.unit(self.encode(pixel_values, 0))
            with record_function(CROPS):
                teacher = self.unit(self.encode(crops, 0))
        with record_function(STUDENT):
            student = self.model.encode(pixel_values, register_width=0)
        relation = self.relation_target(crops, 0, progress)
        with (
            torch.autocast(pixel_values.device.type, enabled=False),
            record_function(LOSSES),
        ):
            image = self.unit(student.image)
            return self._losses(image, student.grid, boxes, full, teacher, relation)

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

    def relation_target(
        self, crops: Tensor, register_width: int, progress: float
    ) -> Tensor | None:
        """What L_scd follows: the student's own tokens of the crops; None before it sets in.

        To be called after the pass with gradient: autocast would else reuse the adapter
        weights it cast without one.

        Returns:
            ``(batch * crops, patches, channels)``, L2-normalised.
        """
        settings = self.settings
        if progress < settings.scd_start or settings.scd_weight <= 0:
            return None
        with self.without_gradient(), record_function(RELATION):
            tokens = self.encode(crops, register_width)
        with torch.autocast(crops.device.type, enabled=False):
            return self.unit(tokens)

    def targets(self, source: Tensor, full: Tensor) -> Tensor:
        """What crop tokens are pulled to: the nearest tokens of the full image, or `source`.

        Args:
            source: ``(batch * crops, patches, channels)``, L2-normalised.
            full: ``(batch * crops, patches, channels)``, of the images.
        """
        if self.settings.match_to_full_image:
            return similarity.nearest_tokens(source, full)
        return source

    @property
    def looks_for_lazy_channels(self) -> bool:
        """As the settings say."""
        return self.settings.lazy_channels

    def _losses(
        self,
        image: Tensor,
        grid: tuple[int, int],
        boxes: Tensor,
        full: Tensor,
        teacher: Tensor,
        relation: Tensor | None,
    ) -> dict[str, Tensor]:
        settings = self.settings
        crop = functional.normalize(views.crop_tokens(image, grid, boxes), dim=-1)
        full = full.repeat_interleave(boxes.shape[1], dim=0)
        target = self.targets(teacher, full)
        clean = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        theta = losses.unrelated_similarity(target, clean)
        loss = self.refinement_term(crop, target, teacher, full, clean, theta)
        terms: dict[str, Any] = {"loss_regu": loss.detach()}
        if relation is not None:
            term = self.relation_term(crop, relation)
            terms["loss_scd"] = term.detach()
            loss = loss + settings.scd_weight * term
        clean_ratio = clean.float().mean()
        return {"loss": loss, **terms, "theta": theta, "clean_ratio": clean_ratio}

    def refinement_term(
        self,
        crop: Tensor,
        target: Tensor,
        source: Tensor,
        full: Tensor,
        clean: Tensor,
        theta: Tensor,
    ) -> Tensor:
        """L_regu with the settings' negatives; tensors as of `losses.refinement_loss`."""
        settings = self.settings
        return losses.refinement_loss(
            crop,
            target,
            full if settings.negatives_of_image else source,
            clean,
            theta,
            temperature=settings.temperature,
            uniformity=settings.uniformity,
        )

    def relation_term(self, crop: Tensor, relation: Tensor) -> Tensor:
        """L_scd; tensors as of `losses.correlation_loss`."""
        temperature = self.settings.temperature
        return losses.correlation_loss(crop, relation, temperature=temperature)
