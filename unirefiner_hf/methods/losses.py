"""The loss terms of UniRefiner.

All tokens are L2-normalised, ``(batch, tokens, channels)``, and masks are
``(batch, tokens)``, True = clean. Notation of the paper: student crop tokens z,
student image tokens Z, student register tokens G, targets y, teacher tokens Y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spurious.similarity import highest_cosine, nearest_tokens


def pass_no_gradient_below(affinity: Tensor, threshold: Tensor | float) -> Tensor:
    """The same values, without gradient where they are below the threshold."""
    return torch.where(affinity < threshold, affinity.detach(), affinity)


def unrelated_similarity(targets: Tensor, clean: Tensor) -> Tensor:
    """theta: how similar unrelated teacher tokens are.

    Mean dot product of the list of clean targets with its own reverse.
    """
    kept = targets[clean]
    return (kept * kept.flip(0)).sum(dim=-1).mean()


def refinement_loss(
    crop: Tensor,
    target: Tensor,
    negatives: Tensor,
    clean: Tensor,
    theta: Tensor,
    *,
    temperature: float = 0.2,
    uniformity: float = 0.3,
) -> Tensor:
    """L_regu: pull clean crop tokens to their targets, away from the teacher's others.

    ``mean over clean i of -(z_i.y_i/t - u * LSE_j(z_i.Y_j/t))``. Negatives below
    theta count but pass no gradient.
    """
    positive = (crop * target).sum(dim=-1)
    affinity = pass_no_gradient_below(crop @ negatives.transpose(1, 2), theta)
    spread = torch.logsumexp(affinity / temperature, dim=-1)
    return -(positive / temperature - uniformity * spread)[clean].mean()


def register_uniformity_loss(
    image: Tensor,
    registers: Tensor,
    *,
    threshold: float = 0.55,
    temperature: float = 0.2,
) -> Tensor:
    """L_uni: push image tokens away from register tokens.

    ``mean_i LSE_j(Z_i.G_j/t)``; cosines below the threshold pass no gradient.
    """
    affinity = image @ registers.transpose(1, 2)
    affinity = pass_no_gradient_below(affinity, threshold)
    return torch.logsumexp(affinity / temperature, dim=-1).mean()


def absorption_loss(
    registers: Tensor,
    candidates: Tensor,
    crop: Tensor,
    teacher: Tensor,
    theta: Tensor,
    *,
    temperature: float = 0.2,
) -> Tensor:
    """L_spu: pull each register token to a spurious token, and apart from the others.

    Candidates are replaced by their nearest token of `teacher`; each register takes
    its best one. A second pull, with weight 0.2, goes to those of the strongest 10 %
    register-to-crop cosines that exceed theta (no gradient to the crop tokens).

    Args:
        registers: ``(batch, registers, channels)``.
        candidates: ``(batch, candidates, channels)``.
        crop: ``(batch, patches, channels)`` student crop tokens.
        teacher: ``(batch, patches, channels)`` teacher tokens of the full image.
    """
    candidates = nearest_tokens(candidates, teacher)
    chosen = nearest_tokens(registers.detach(), candidates)
    affinity = registers @ chosen.transpose(1, 2)
    pull = affinity.diagonal(dim1=1, dim2=2).mean()

    to_crop = highest_cosine(registers, crop.detach())
    strongest = to_crop.topk(math.ceil(0.1 * to_crop.shape[1]), dim=1).values
    above = strongest > theta
    second_pull = (strongest * above).sum() / above.sum().clamp_min(1)

    apart = torch.where(affinity >= theta, affinity, theta + 0.1)
    apart = torch.logsumexp(apart / temperature, dim=-1).mean()
    return -pull / temperature - 0.2 * second_pull / temperature + apart


def correlation_loss(
    crop: Tensor, target: Tensor, *, temperature: float = 0.2
) -> Tensor:
    """L_scd: the crop's token-to-token similarities follow those of the target.

    Row-wise min-max, softmax at t, cross-entropy (after arXiv 2504.02328).

    Args:
        crop: ``(batch, patches, channels)`` student crop tokens.
        target: ``(batch, patches, channels)`` cleaner tokens of the same crops.
    """
    student = _rescale_rows(crop @ crop.detach().transpose(1, 2))
    with torch.no_grad():
        teacher = _rescale_rows(target @ target.transpose(1, 2))
        teacher = (teacher / temperature).softmax(dim=-1)
    return -(teacher * (student / temperature).log_softmax(dim=-1)).sum(dim=-1).mean()


def _rescale_rows(similarity: Tensor) -> Tensor:
    low, high = similarity.aminmax(dim=-1, keepdim=True)
    return (similarity - low) / (high - low).clamp_min(1e-6)
