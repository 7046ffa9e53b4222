"""Fixed patterns and global proxies: tokens too similar to unrelated ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def unit_tokens(tokens: Tensor, channel_mask: Tensor | None = None) -> Tensor:
    """L2-normalise tokens in float32, leaving lazy channels out.

    Args:
        tokens: ``(..., channels)``.
        channel_mask: ``(channels,)``, 0 for the channels left out (see
            `unirefiner_hf.spurious.lazy_channels`).
    """
    tokens = tokens.float()
    if channel_mask is not None:
        tokens = tokens * channel_mask.to(tokens)
    return functional.normalize(tokens, dim=-1)


def highest_cosine(tokens: Tensor, comparison: Tensor) -> Tensor:
    """Highest cosine of each token to any token of `comparison`.

    Both are L2-normalised.

    Args:
        tokens: ``(batch, patches, channels)``.
        comparison: ``(batch or 1, others, channels)``.

    Returns:
        ``(batch, patches)``.
    """
    return (tokens @ comparison.transpose(1, 2)).amax(dim=-1)


def dissimilar(
    scores: Tensor, sigma: float = 0.5, cosine: float | None = None
) -> Tensor:
    """Tokens that are neither fixed patterns nor global proxies (FP-GP filter).

    A token is clean when its score is below ``mean + sigma * std`` over its image
    (unbiased std), or below the fixed `cosine` when one is given. Source: paper,
    FP and GP filters; release form.

    Args:
        scores: ``(batch, patches)`` from `highest_cosine`.

    Returns:
        ``(batch, patches)`` bool, True = clean.
    """
    if cosine is not None:
        return scores < cosine
    return scores < similarity_threshold(scores, sigma)


def similarity_threshold(scores: Tensor, sigma: float) -> Tensor:
    """The score from which a token is spurious, ``(batch, 1)``."""
    mean = scores.mean(dim=1, keepdim=True)
    return mean + sigma * scores.std(dim=1, keepdim=True)


def draw_most_similar(
    tokens: Tensor, scores: Tensor, share: float, count: int
) -> Tensor:
    """Draw absorption candidates: tokens the FP-GP filter finds most similar.

    Drawn uniformly with replacement from the `share` of tokens with the highest
    score, from the global random state.

    Args:
        tokens: ``(batch, patches, channels)``.
        scores: ``(batch, patches)``.

    Returns:
        ``(batch, count, channels)``.
    """
    pool_size = max(1, int(share * scores.shape[1]))
    pool = scores.topk(pool_size, dim=1).indices
    draw = torch.randint(pool_size, (scores.shape[0], count)).to(pool.device)
    return gather_tokens(tokens, pool.gather(1, draw))


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens at `index` ``(batch, count)`` of ``(batch, patches, channels)``."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def nearest_tokens(tokens: Tensor, bank: Tensor) -> Tensor:
    """Replace each token by the most similar token of its sample's `bank`.

    Args:
        tokens: ``(batch, patches, channels)``, L2-normalised.
        bank: ``(batch, others, channels)``, L2-normalised.
    """
    return gather_tokens(bank, (tokens @ bank.transpose(1, 2)).argmax(dim=-1))
