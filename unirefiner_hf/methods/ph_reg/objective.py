"""PH-Reg: distil a teacher averaged over shifted views into a student with registers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import record_function

from ...loading.arguments import BackboneArguments
from ...loading.unlocked import UnlockedTower, unlocked_names
from ...modeling.errors import UniRefinerError
from ...modeling.modeling_unirefiner import UniRefinerModel
from ..objective import LOSSES, STUDENT, VIEWS, Objective, Surroundings
from ..settings import MethodSettings
from .settings import PHRegSettings
from .shifted_views import draw_views, make_view, mean_over_views


class PHReg(Objective):
    """One PH-Reg step (arXiv 2505.21501): images in, loss and its parts out.

    The student has register tokens in its sequence and trains them, the position and the
    patch embedding and the last layer. The target is the mean of the old tower's tokens over
    views moved by whole patches and mirrored (`shifted_views`), drawn for each image. The
    loss is ``1 - mean cosine`` plus the mean squared error of the patch tokens. There is no
    border, no crop and no filter, and no channel is left out.

    Args:
        model: the register model, its tower an `UnlockedTower`.
        settings: hyper-parameters of the method.
        white: ``(3,)``, what white is in the images' space; None: 1.
    """

    LOSS_TERMS = ("loss_cosine", "loss_mse")
    METRICS = LOSS_TERMS
    needs_whole_weights = True
    white: Tensor

    def __init__(
        self,
        model: UniRefinerModel,
        settings: PHRegSettings,
        white: Tensor | None = None,
    ) -> None:
        super().__init__(model, settings)
        white = torch.ones(3) if white is None else white
        self.register_buffer("white", white, persistent=False)

    @classmethod
    def build(
        cls, model: UniRefinerModel, settings: MethodSettings, given: Surroundings
    ) -> Objective:
        """See `Objective.build`."""
        assert isinstance(settings, PHRegSettings)
        return cls(model, settings, given.white)

    @classmethod
    def attach(
        cls,
        model: UniRefinerModel,
        settings: MethodSettings,
        args: BackboneArguments,
        name: str,
    ) -> None:
        """Unlock some of the tower's own weights, in place.

        Raises:
            UniRefinerError: the tower has no position embedding to train.
        """
        model.tower = UnlockedTower(model.tower, unlocked_names(model.tower))

    @classmethod
    def base_dtype(cls, args: BackboneArguments, bf16: bool) -> torch.dtype:
        """float32: weights of the tower itself are trained."""
        return torch.float32

    @classmethod
    def check_tower(cls, model: UniRefinerModel) -> None:
        """See `Objective.check_tower`."""
        if not isinstance(model.tower, UnlockedTower):
            raise UniRefinerError(
                "PHReg needs a tower that can be its old self: wrap model.tower with "
                "UnlockedTower."
            )

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """The loss of one batch; see `Objective.forward`.

        Returns:
            ``loss`` with gradient, and without: ``loss_cosine`` and ``loss_mse``.
        """
        target = self.denoised(pixel_values)
        with record_function(STUDENT):
            student = self.model.encode(pixel_values, register_width=0).image
        with (
            torch.autocast(pixel_values.device.type, enabled=False),
            record_function(LOSSES),
        ):
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
        with self.teaching(), record_function(VIEWS):
            tokens = self.encode(views, 0).float()
        tokens = tokens.unflatten(0, (len(pixel_values), -1))
        means = [mean_over_views(t, v, grid) for t, v in zip(tokens, drawn)]
        return torch.stack(means)

    def _distilled(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        cosine = 1 - functional.cosine_similarity(student, target, dim=-1).mean()
        error = functional.mse_loss(student, target)
        return {
            "loss": cosine + self.settings.mse_weight * error,
            "loss_cosine": cosine.detach(),
            "loss_mse": error.detach(),
        }
