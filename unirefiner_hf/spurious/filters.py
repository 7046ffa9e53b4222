"""The filters of a training step: one place that decides which targets are clean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention_flow, detectors, similarity
from .settings import FilterSettings

FPGP = ("fpgp_reference", "fpgp_strip")
NAMES = (*FPGP, "detectors", "ah")


@dataclass(frozen=True)
class Findings:
    """What the filters of one step found; maps are ``(batch, patches)``.

    Attributes:
        rejected: filter -> bool, True where it rejects; without a filter that is off.
            Attention flow rejects only what the others kept.
        evidence: filter -> what it judges by, higher is dirtier: cosines, and for the
            attention flow the inflow with its sign turned.
    """

    rejected: dict[str, Tensor]
    evidence: dict[str, Tensor]

    @property
    def spurious(self) -> Tensor:
        """Rejected by any filter."""
        kept = next(iter(self.evidence.values()))
        found = torch.zeros(kept.shape, dtype=torch.bool, device=kept.device)
        for mask in self.rejected.values():
            found = found | mask
        return found


def fpgp_scores(crop: Tensor, reference: Tensor, strip: Tensor) -> dict[str, Tensor]:
    """Highest cosine of each crop token to the reference alone and in the composite.

    Args:
        crop: ``(batch, patches, channels)``, L2-normalised, as are the others.
        reference: ``(1, others, channels)``.
        strip: ``(batch, others, channels)``.
    """
    return {
        name: similarity.highest_cosine(crop, comparison)
        for name, comparison in zip(FPGP, (reference, strip), strict=True)
    }


def judge(
    scores: dict[str, Tensor],
    target: Tensor,
    found: Tensor,
    flow: list[tuple[Tensor, Tensor]],
    settings: FilterSettings,
    num_heads: int,
) -> Findings:
    """Put the filters to the tokens in the order of training (method, section 3, step 6).

    Args:
        scores: of `fpgp_scores`.
        target: ``(batch, patches, channels)``, L2-normalised.
        found: ``(batch, detectors, channels)``, of `detectors.draw_detectors`.
        flow: queries and keys of the crop part for each layer; empty: no such filter.
        num_heads: of the tower.
    """
    rejected: dict[str, Tensor] = {}
    evidence = dict(scores)
    kept = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
    if settings.fpgp_filter:
        for name, score in scores.items():
            clean = similarity.dissimilar(
                score, settings.fpgp_sigma, settings.fpgp_cosine
            )
            rejected[name] = ~clean
            kept = kept & clean
    evidence["detectors"] = similarity.highest_cosine(target, found)
    if settings.detector_filter:
        clean = detectors.undetected(target, found, settings.detector_cosine)
        rejected["detectors"] = ~clean
        kept = kept & clean
    if flow:
        inflow = attention_flow.attention_inflow(
            flow, ~kept, settings.ah_form, num_heads
        )
        evidence["ah"] = -inflow
        hijacked = ~attention_flow.read_by_others(inflow, ~kept, settings.ah_sigma)
        rejected["ah"] = hijacked & kept
    return Findings(rejected, evidence)
