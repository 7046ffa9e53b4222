"""PH-Reg: distil a teacher averaged over shifted views into a student with registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..loading.unlocked import UnlockedTower
from ..modeling.modeling_unirefiner import UniRefinerModel
from .shifted_views import draw_views, make_view, mean_over_views
from .unirefiner import UniRefinerObjective

LOSS_TERMS = ("loss_cosine", "loss_mse")


class PHReg(UniRefinerObjective):
    """One PH-Reg step (arXiv 2505.21501): images in, loss and its parts out.

    The student has register tokens in its sequence and trains them, the position and the
    patch embedding and the last layer. The target is the mean of the old tower's tokens over
    views moved by whole patches and mirrored (`shifted_views`), drawn for each image. The
    loss is ``1 - mean cosine`` plus the mean squared error of the patch tokens. There is no
    frame, no crop and no filter, and no channel is left out.

    Takes what `UniRefinerObjective` does; the tower is an `UnlockedTower` in place of one
    with an adapter, and `white` is what white is in the images' space.
    """

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch; see `UniRefinerObjective.forward`.

        Returns:
            ``loss`` with gradient, and without: ``loss_cosine`` and ``loss_mse``.
        """
        target = self.denoised(pixel_values)
        student = self.model.encode(pixel_values, register_width=0).image
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self._distilled(student.float(), target.float())

    def denoised(self, pixel_values: Tensor) -> Tensor:
        """The teacher's tokens, ``(batch, patches, hidden)``, averaged over views."""
        settings, patch = self.settings, self.model.patch_size
        height, width = pixel_values.shape[-2:]
        grid = (height // patch, width // patch)
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        drawn = [
            draw_views(
                settings.teacher_views,
                grid,
                random,
                shift=settings.teacher_shift,
                candidates=settings.teacher_offsets,
                flip=settings.teacher_flip,
            )
            for _ in pixel_values
        ]
        views = torch.stack(
            [
                make_view(pixels, view, patch, self.white)
                for pixels, each in zip(pixel_values, drawn, strict=True)
                for view in each
            ]
        )
        with self._without_gradient(), self._adapter_off():
            tokens = self._encode_views(views).float()
        tokens = tokens.unflatten(0, (len(pixel_values), -1))
        means = [mean_over_views(t, v, grid) for t, v in zip(tokens, drawn)]
        return torch.stack(means)

    def register_width(self, height: int, width: int) -> int:
        """0: there is no frame."""
        return 0

    @property
    def looks_for_lazy_channels(self) -> bool:
        """False: the loss takes the tokens as they are."""
        return False

    def _encode_views(self, views: Tensor) -> Tensor:
        return self._encode(views, 0)

    def _distilled(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        cosine = 1 - functional.cosine_similarity(student, target, dim=-1).mean()
        error = functional.mse_loss(student, target)
        return {
            "loss": cosine + self.settings.mse_weight * error,
            "loss_cosine": cosine.detach(),
            "loss_mse": error.detach(),
        }

    def _check_tower(self, model: UniRefinerModel) -> None:
        if not isinstance(model.tower, UnlockedTower):
            raise TypeError(
                "PHReg needs a tower that can be its old self: wrap model.tower with "
                "UnlockedTower."
            )

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """The teacher: the tower as it was, without register tokens."""
        with super()._adapter_off(), self.model.without_register_tokens():
            yield
