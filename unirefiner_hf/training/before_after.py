"""What a refinement changed: spurious shares before and after, and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..loading.adapter import disable_adapter
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..modeling.registers import register_mask
from ..spurious.diagnose import Diagnosis, diagnose
from ..spurious.settings import FilterSettings
from ..visualize import FigureRow, before_after_figure


@dataclass
class Comparison:
    """The base and the refined tower on the same images, one entry an image.

    Attributes:
        base: the bare tower, measured by its own yardstick.
        refined: the refined tower with its frame, measured by the base's yardstick.
        refined_own: the refined tower, measured by its own.
        base_tokens: ``(patches, hidden)`` of the bare tower.
        refined_tokens: ``((h+2R)*(w+2R), hidden)``, the frame's tokens among them.
    """

    grid: tuple[int, int]
    register_width: int
    base: list[Diagnosis] = field(default_factory=list)
    refined: list[Diagnosis] = field(default_factory=list)
    refined_own: list[Diagnosis] = field(default_factory=list)
    base_tokens: list[Tensor] = field(default_factory=list)
    refined_tokens: list[Tensor] = field(default_factory=list)

    def shares(self) -> dict[str, dict[str, float]]:
        """Mean share of spurious tokens by filter.

        ``before`` is the bare tower; ``after`` the refined tower, measured against the
        base's unrelated tokens and limits; ``after_own_yardstick`` against its own, which
        reject a similar share of any tower's tokens.
        """
        return {
            "before": _mean_shares(self.base),
            "after": _mean_shares(self.refined),
            "after_own_yardstick": _mean_shares(self.refined_own),
        }


def _mean_shares(diagnoses: Sequence[Diagnosis]) -> dict[str, float]:
    shares = [diagnosis.shares() for diagnosis in diagnoses]
    return {name: float(np.mean([s[name] for s in shares])) for name in shares[0]}


def compare(
    model: UniRefinerModel,
    images: Sequence[Tensor],
    reference: Tensor,
    filters: FilterSettings,
    register_width: int,
    channel_mask: Tensor | None = None,
) -> Comparison:
    """Diagnose the tower with its adapter off and bare, then on and framed.

    Args:
        model: the register model, its tower wrapped by the trained adapter.
        images: ``(3, height, width)`` each, normalised, all of one size.
        reference: ``(1, 3, height, width)``, normalised.
        register_width: frame of the refined tower in patches.
        channel_mask: ``(hidden,)``, 0 for the lazy channels of the training.
    """
    height, width = images[0].shape[-2:]
    grid = (height // model.patch_size, width // model.patch_size)
    comparison = Comparison(grid, register_width)
    with _evaluating(model):
        for image in images:
            batch = image.unsqueeze(0).to(reference)
            with disable_adapter(model):
                base = diagnose(
                    model,
                    batch,
                    reference,
                    filters,
                    register_width=0,
                    channel_mask=channel_mask,
                )
                base_tokens = model.encode(batch, 0).image[0]
            refined = diagnose(
                model,
                batch,
                reference,
                filters,
                register_width=register_width,
                yardstick=base.yardstick,
                channel_mask=channel_mask,
            )
            own = diagnose(
                model,
                batch,
                reference,
                filters,
                register_width=register_width,
                channel_mask=channel_mask,
            )
            tokens = model.encode(batch, register_width)
            comparison.base.append(base)
            comparison.refined.append(refined)
            comparison.refined_own.append(own)
            comparison.base_tokens.append(base_tokens.float().cpu())
            framed = join_frame(
                tokens.image[0], tokens.registers[0], grid, register_width
            )
            comparison.refined_tokens.append(framed.float().cpu())
    return comparison


def join_frame(
    image: Tensor, registers: Tensor, grid: tuple[int, int], register_width: int
) -> Tensor:
    """Put image ``(patches, hidden)`` and register tokens back on the framed grid."""
    mask = register_mask(grid, register_width).to(image.device)
    framed = image.new_empty(mask.numel(), image.shape[-1])
    framed[mask] = registers
    framed[~mask] = image
    return framed


def figure(comparison: Comparison, pictures: Sequence[np.ndarray]) -> Image.Image:
    """Rows of image, PCA before, PCA after with the frame, spurious-token maps.

    Args:
        pictures: ``(height, width, 3)`` uint8, the compared images in order.
    """
    rows = [
        FigureRow(
            image=picture,
            before=comparison.base_tokens[index],
            after=comparison.refined_tokens[index],
            grid=comparison.grid,
            register_width=comparison.register_width,
            fpgp_before=comparison.base[index].fpgp[0].cpu(),
            ah_before=comparison.base[index].ah[0].cpu(),
            fpgp_after=comparison.refined[index].fpgp[0].cpu(),
            ah_after=comparison.refined[index].ah[0].cpu(),
        )
        for index, picture in enumerate(pictures)
    ]
    return before_after_figure(rows)


@contextmanager
def _evaluating(model: UniRefinerModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
