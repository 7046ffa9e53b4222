"""Plain self-distillation: the control that has neither registers nor filters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import losses, views
from .unirefiner import UniRefinerObjective


class PlainDistillation(UniRefinerObjective):
    """UniRefiner's step without what makes it UniRefiner, to compare it with.

    The same images, crops, adapter, targets, temperature and number of steps. Left out: the
    frame and with it L_uni and L_spu; the composites and every filter, so that each teacher
    token is a target. What stays is L_regu over all tokens, and L_scd with a target that
    has no frame either (``scd_weight=0`` leaves it out). Published ablations of a sister
    method (arXiv 2505.21501, table of section 4) found most of the gain in such a control,
    so a refined model is worth what it adds to this one.

    Takes and returns what `UniRefinerObjective` does; ``clean_ratio`` is 1.
    """

    def register_width(self, height: int, width: int) -> int:
        """0: there is no frame."""
        return 0

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch; see `UniRefinerObjective.forward`.

        Returns:
            ``loss`` with gradient, and without: ``loss_regu``, ``loss_scd`` once it has set
            in, ``theta`` and ``clean_ratio``.
        """
        settings = self.settings
        boxes, crops = self.draw_crops(pixel_values)
        with self._without_gradient(), self._adapter_off():
            full = self._unit(self._encode(pixel_values, 0))
            teacher = self._unit(self._encode(crops, 0))
        student = self.model.encode(pixel_values, register_width=0)
        relation = None
        if progress >= settings.scd_start and settings.scd_weight > 0:
            with self._without_gradient():
                relation = self._unit(self._encode(crops, 0))
        with torch.autocast(pixel_values.device.type, enabled=False):
            image = self._unit(student.image)
            return self._plain_losses(
                image, student.grid, boxes, full, teacher, relation
            )

    def _plain_losses(
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
        negatives = full if settings.negatives_of_image else teacher
        target = self.targets(teacher, full)
        clean = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        theta = losses.unrelated_similarity(target, clean)
        loss = losses.refinement_loss(
            crop,
            target,
            negatives,
            clean,
            theta,
            temperature=settings.temperature,
            uniformity=settings.uniformity,
        )
        terms = {"loss_regu": loss.detach()}
        if relation is not None:
            term = losses.correlation_loss(
                crop, relation, temperature=settings.temperature
            )
            terms["loss_scd"] = term.detach()
            loss = loss + settings.scd_weight * term
        return {
            "loss": loss,
            **terms,
            "theta": theta,
            "clean_ratio": clean.float().mean(),
        }
