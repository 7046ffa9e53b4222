"""Lazy channels: a few high-scale, low-variance channels that dominate every cosine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LazyChannels:
    """What the search found.

    Attributes:
        channels: channels to leave out of cosines, in the order they were found.
        unrelated_cosine: mean cosine of unrelated tokens before the search and
            after each channel was left out.
        stopped_by: ``"threshold"``, ``"gain"`` or ``"count"``.
    """

    channels: list[int]
    unrelated_cosine: list[float]
    stopped_by: str

    def mask(self, size: int) -> Tensor:
        """``(size,)`` float32: 0 for a lazy channel, 1 elsewhere."""
        mask = torch.ones(size)
        mask[self.channels] = 0.0
        return mask


def unrelated_cosine(bank: Tensor) -> Tensor:
    """Mean cosine between the bank's tokens and the same list reversed.

    Args:
        bank: ``(images, tokens, channels)``; with an even number of images every
            pair comes from two images.
    """
    tokens = functional.normalize(bank.flatten(0, 1), dim=-1)
    return (tokens * tokens.flip(0)).sum(dim=-1).mean()


def find_lazy_channels(
    bank: Tensor,
    *,
    max_channels: int = 5,
    candidates: int = 16,
    target_cosine: float = 0.2,
    min_gain: float = 0.005,
) -> LazyChannels:
    """Look for the channels that make unrelated tokens look alike.

    Greedy: each round tries the `candidates` channels with the highest score
    (cross-image mean product times mean^2/variance) and leaves out the one that
    lowers the mean cosine of unrelated tokens most, until that is at most
    `target_cosine`, falls by less than `min_gain`, or `max_channels` are out.

    Args:
        bank: ``(images, tokens, channels)`` teacher tokens, at least two images.

    Raises:
        ValueError: the bank is not 3-D or holds fewer than two images.
    """
    if bank.ndim != 3 or bank.shape[0] < 2:
        raise ValueError(
            "The lazy-channel search needs tokens of at least two images, "
            f"(images, tokens, channels); got {tuple(bank.shape)}."
        )
    bank = bank.float().clone()
    cosines = [unrelated_cosine(bank).item()]
    channels: list[int] = []
    while len(channels) < max_channels:
        if cosines[-1] <= target_cosine:
            return LazyChannels(channels, cosines, "threshold")
        tokens = functional.normalize(bank.flatten(0, 1), dim=-1)
        product = (tokens * tokens.flip(0)).mean(dim=0)
        raw = bank.flatten(0, 1)
        score = product * raw.mean(dim=0).square() / raw.var(dim=0).clamp_min(1e-12)
        trials = score.topk(min(candidates, score.numel())).indices.tolist()
        after = {channel: _without(bank, channel) for channel in trials}
        best = min(after, key=lambda channel: after[channel])
        if cosines[-1] - after[best] < min_gain:
            return LazyChannels(channels, cosines, "gain")
        bank[..., best] = 0.0
        channels.append(best)
        cosines.append(after[best])
    stopped_by = "threshold" if cosines[-1] <= target_cosine else "count"
    return LazyChannels(channels, cosines, stopped_by)


def _without(bank: Tensor, channel: int) -> float:
    kept = bank[..., channel].clone()
    bank[..., channel] = 0.0
    cosine = unrelated_cosine(bank).item()
    bank[..., channel] = kept
    return cosine
