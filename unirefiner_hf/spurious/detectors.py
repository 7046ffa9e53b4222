"""Register tokens as detectors of spurious tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .similarity import gather_tokens, highest_cosine


def draw_detectors(registers: Tensor, share: float) -> Tensor:
    """A random share of each sample's register tokens, without replacement.

    Args:
        registers: ``(batch, registers, channels)``.

    Returns:
        ``(batch, max(1, floor(share * registers)), channels)``.
    """
    batch, total, _ = registers.shape
    count = max(1, int(share * total))
    order = torch.rand(batch, total).argsort(dim=1)[:, :count]
    return gather_tokens(registers, order.to(registers.device))


def undetected(tokens: Tensor, detectors: Tensor, cosine: float = 0.55) -> Tensor:
    """Tokens no detector resembles.

    Args:
        tokens: ``(batch, patches, channels)``, L2-normalised.
        detectors: ``(batch, detectors, channels)``, L2-normalised.

    Returns:
        ``(batch, patches)`` bool, True = clean.
    """
    return highest_cosine(tokens, detectors) < cosine
