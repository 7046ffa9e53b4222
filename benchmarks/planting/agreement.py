"""How well each filter of training finds planted tokens.

The filters are those of a training step, judged by the same code on whole images (one crop
that is the image), with the limits of the settings and over a sweep of limits. What this
cannot show:

- The truth is where the rule plants in the image, not how far the tower's tokens really went;
  `TruthReport.cosine_to_clean` tells that. In a composite the strip takes ranks of its own.
- The detectors judge the image's tokens at their own place. In training they judge the crop's
  targets, which are other tokens where `match_to_full_image` is true.
- Attention hijackees are not planted, and of a frame that was not trained the register tokens
  are no detectors yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unirefiner_hf.data.images import default_reference
from unirefiner_hf.evaluation.checkpoints import Checkpoint
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.errors import UniRefinerError
from unirefiner_hf.spurious import detectors, filters, similarity
from unirefiner_hf.spurious.diagnose import middle_layers

from .planted import PlantedTruth, dirty_checkpoint, load_rule, planted_truth

SIGMAS = tuple(step / 4 for step in range(-8, 13))
"""Limits of the filters by statistics: standard deviations from the mean."""
COSINES = tuple(step / 20 for step in range(0, 21))
"""Limits of the filters by cosine."""
UNION = "union"
BATCH = 4
"""Images a step, over which the attention flow takes its statistics."""
SIDE = "right"


@dataclass(frozen=True)
class Agreement:
    """A filter at one limit against the truth.

    Attributes:
        limit: of the filter: standard deviations; a cosine for the detectors, and for
            FP-GP and the union where `fpgp_cosine` is set.
        marked: share of all tokens that the filter rejects.
        precision: share of them that are planted; None if none is rejected.
        recall: share of the planted tokens that the filter rejects.
        f1: harmonic mean of both.
        proxy_recall: recall among the global proxies.
        pattern_recall: recall among the fixed patterns.
    """

    limit: float
    marked: float
    precision: float | None
    recall: float
    f1: float
    proxy_recall: float
    pattern_recall: float


@dataclass(frozen=True)
class FilterReport:
    """One filter against the truth.

    Attributes:
        default: at the limit that training uses.
        sweep: over the limits, ascending.
        auc: area under the ROC curve of what it judges by, mean over images; None for the
            union, which has no score.
    """

    default: Agreement
    sweep: tuple[Agreement, ...]
    auc: float | None

    @property
    def best(self) -> Agreement:
        """The limit of the sweep with the highest F1."""
        return max(self.sweep, key=lambda agreement: agreement.f1)


@dataclass(frozen=True)
class TruthReport:
    """Every filter against the planted truth.

    Attributes:
        filters: name -> report, the union last.
        planted: share of the tokens that are planted: the precision of blind rejection.
        proxies: share of global proxies.
        patterns: share of fixed patterns.
        cosine_to_clean: kind -> mean cosine of the dirty tower's tokens to the clean
            tower's: how far each kind was moved. Proxies of tokens that were near the
            scene's mean already need not move far.
        images: their number.
        size: their side in pixels.
    """

    filters: dict[str, FilterReport]
    planted: float
    proxies: float
    patterns: float
    cosine_to_clean: dict[str, float]
    images: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {
            name: getattr(self, name) for name in ("planted", "proxies", "patterns")
        }
        filters = {
            name: {
                "auc": report.auc,
                "default": vars(report.default),
                "best": vars(report.best),
                "sweep": [vars(agreement) for agreement in report.sweep],
            }
            for name, report in self.filters.items()
        }
        return {
            "images": self.images,
            "size": self.size,
            "shares": shares,
            "cosine_to_clean": self.cosine_to_clean,
            "filters": filters,
        }


@dataclass(frozen=True)
class Step:
    """What the filters of one training step are given, and the truth of its tokens.

    Attributes:
        scores, target, found, flow: see `unirefiner_hf.spurious.filters.judge`.
    """

    scores: dict[str, Tensor]
    target: Tensor
    found: Tensor
    flow: list[tuple[Tensor, Tensor]]
    num_heads: int
    truth: PlantedTruth

    def judge(self, settings: UniRefinerSettings) -> filters.Findings:
        """The filters of training, at these settings."""
        return filters.judge(
            self.scores, self.target, self.found, self.flow, settings, self.num_heads
        )


@torch.no_grad()
def filter_step(
    objective: UniRefiner,
    pixel_values: Tensor,
    register_width: int,
    truth: PlantedTruth,
) -> Step:
    """The passes of a training step up to its filters, on whole images.

    The detectors are drawn from seed 0 and judge the image's tokens at their place; the
    strip lies on the right.

    Args:
        objective: round the dirty tower; its adapter stays off but for the frame.
        pixel_values: ``(batch, 3, height, width)``, normalised.
        register_width: frame in patches that gives the detectors.
    """
    teacher = objective.teacher_views(pixel_values, pixel_values, SIDE)
    reference = objective.reference_views(*pixel_values.shape[-2:])[1]
    framed = objective.model.encode(pixel_values, register_width)
    registers = similarity.unit_tokens(framed.registers, objective.channel_mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = detectors.draw_detectors(registers, objective.settings.detector_share)
    return Step(
        scores=filters.fpgp_scores(teacher.crop, reference, teacher.strip),
        target=teacher.image,
        found=found,
        flow=teacher.flow,
        num_heads=objective.num_heads,
        truth=truth,
    )


def agreement(marked: Tensor, truth: PlantedTruth, limit: float) -> Agreement:
    """Precision, recall and F1 of a mask.

    Args:
        marked: ``(batch, patches)`` bool, True = rejected.
        limit: what gave the mask.

    Raises:
        UniRefinerError: nothing is planted.
    """
    planted = truth.spurious
    if not planted.any():
        raise UniRefinerError("No token is planted: there is nothing to find.")
    count, hits = int(marked.sum()), int((marked & planted).sum())

    def recall(kind: Tensor) -> float:
        return int((marked & kind).sum()) / max(1, int(kind.sum()))

    return Agreement(
        limit=limit,
        marked=count / marked.numel(),
        precision=hits / count if count else None,
        recall=recall(planted),
        f1=2 * hits / (count + int(planted.sum())),
        proxy_recall=recall(truth.proxies),
        pattern_recall=recall(truth.patterns),
    )


def compare_filters(
    steps: Sequence[Step], settings: UniRefinerSettings
) -> dict[str, FilterReport]:
    """Each filter at its limit and over a sweep of limits, by what training rejects.

    Each filter is swept with the others at their settings. In the sweep of the union the
    limits in standard deviations move together and the detectors stay at theirs; where
    `fpgp_cosine` is set, FP-GP's moves alone.

    Raises:
        UniRefinerError: in no image are there both planted and other tokens.
    """
    by_cosine = settings.fpgp_cosine is not None
    fpgp = ("fpgp_cosine", COSINES) if by_cosine else ("fpgp_sigma", SIGMAS)
    sweeps: dict[str, tuple[str, tuple[float, ...]]] = {
        **dict.fromkeys(filters.FPGP, fpgp),
        "detectors": ("detector_cosine", COSINES),
        "ah": ("ah_sigma", SIGMAS),
    }
    truth = PlantedTruth(
        torch.cat([step.truth.proxies for step in steps]),
        torch.cat([step.truth.patterns for step in steps]),
    )

    def marked(name: str, changed: UniRefinerSettings) -> Tensor:
        findings = [step.judge(changed) for step in steps]
        masks = [f.spurious if name == UNION else f.rejected[name] for f in findings]
        return torch.cat(masks).cpu()

    def at(name: str, limit: float, **limits: Any) -> Agreement:
        return agreement(marked(name, replace(settings, **limits)), truth, limit)

    reports: dict[str, FilterReport] = {}
    at_settings = [step.judge(settings) for step in steps]
    for name in at_settings[0].rejected:
        field, limits = sweeps[name]
        evidence = torch.cat([found.evidence[name] for found in at_settings]).cpu()
        reports[name] = FilterReport(
            at(name, getattr(settings, field)),
            tuple(at(name, limit, **{field: limit}) for limit in limits),
            _mean_auc(evidence, truth.spurious),
        )
    field, limits = fpgp
    moved = (field,) if by_cosine else (field, "ah_sigma")
    reports[UNION] = FilterReport(
        at(UNION, getattr(settings, field)),
        tuple(at(UNION, limit, **dict.fromkeys(moved, limit)) for limit in limits),
        None,
    )
    return reports


def _mean_auc(evidence: Tensor, planted: Tensor) -> float:
    """Within images, whose levels differ; mean over those that have both kinds."""
    pairs = [(e, p) for e, p in zip(evidence, planted) if p.any() and not p.all()]
    if not pairs:
        raise UniRefinerError(
            "No image has planted and other tokens: take larger images."
        )
    return sum(detection_auc(e, p) for e, p in pairs) / len(pairs)


def detection_auc(scores: Tensor, truth: Tensor) -> float:
    """How well a score ranks dirty tokens above clean ones: area under the ROC curve.

    Args:
        scores: of any shape, higher is dirtier; NaN entries are left out.
        truth: bool, the same shape, True = dirty.

    Raises:
        ValueError: shapes differ, or the truth has one kind only.
    """
    if scores.shape != truth.shape:
        raise ValueError(
            f"Scores are {tuple(scores.shape)}, the truth {tuple(truth.shape)}."
        )
    kept = ~scores.isnan()
    values, dirty = scores[kept].double(), truth[kept]
    positive, negative = int(dirty.sum()), int((~dirty).sum())
    if not positive or not negative:
        raise ValueError("The truth needs both dirty and clean tokens.")
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    total = ranks[dirty].sum().item() - positive * (positive + 1) / 2
    return total / (positive * negative)


def measure_truth(
    clean: Checkpoint,
    folder: str | Path,
    images: Sequence[Image.Image],
    size: int,
    settings: UniRefinerSettings | None = None,
) -> TruthReport:
    """Plant the adapter's dirt in a tower and ask each filter to find it.

    The frame is that of the checkpoint, of 1 patch where it has none. Lazy channels are not
    searched for.

    Args:
        clean: the tower the adapter was trained on; its model is changed.
        folder: of the adapter, see `dirty_checkpoint`.
        images: RGB; resized to ``size x size``, rounded up to patches.
        settings: of the filters; None: as published, with attention flow in the
            `middle_layers`.

    Raises:
        TruthError: the adapter is not one of this tower, or its rule is damaged.
        UniRefinerError: no images, or too small ones.
    """
    if not images:
        raise UniRefinerError("There are no images to measure on.")
    if settings is None:
        layers = middle_layers(clean.model.config.num_hidden_layers)
        settings = UniRefinerSettings(ah_layers=layers)
    side, device = clean.side(size), clean.model.device
    pixels = [clean.reading(i, (side, side)) for i in images]
    batches = torch.stack(pixels).split(BATCH)
    reference = clean.reading(default_reference(), (side, side))

    @torch.no_grad()
    def tokens(checkpoint: Checkpoint) -> Tensor:
        found = [checkpoint.model.encode(b.to(device), 0).image for b in batches]
        return similarity.unit_tokens(torch.cat(found)).cpu()

    rule = load_rule(folder)
    before = tokens(clean)
    dirty = dirty_checkpoint(clean, folder)
    cosine = (before * tokens(dirty)).sum(dim=-1)
    # A fresh adapter changes nothing; the objective asks for one to switch off.
    dirty.model.tower = add_adapter(dirty.model.tower, name=clean.name)
    objective = UniRefiner(dirty.model, settings, reference[None]).to(device)
    objective.eval()
    width = max(1, clean.register_width)
    truths = [planted_truth(batch, clean.patch_size, rule) for batch in batches]
    steps = [
        filter_step(objective, batch.to(device), width, truth)
        for batch, truth in zip(batches, truths, strict=True)
    ]
    kinds = {
        "proxies": torch.cat([step.truth.proxies for step in steps]),
        "patterns": torch.cat([step.truth.patterns for step in steps]),
    }
    kinds["rest"] = ~(kinds["proxies"] | kinds["patterns"])
    shares = {name: kind.float().mean().item() for name, kind in kinds.items()}
    return TruthReport(
        filters=compare_filters(steps, settings),
        planted=1 - shares["rest"],
        proxies=shares["proxies"],
        patterns=shares["patterns"],
        cosine_to_clean={
            name: cosine[kind].mean().item() for name, kind in kinds.items()
        },
        images=len(images),
        size=side,
    )
