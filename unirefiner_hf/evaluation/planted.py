"""Planted truth: how well each filter finds tokens that are known to be spurious.

A LoRA adapter plants the dirt in a clean tower by a rule that needs the pixels only. Patches
are ranked within their image by the standard deviation of their normalised pixels, from 0,
the flattest, to 1, the busiest:

- rank at least 0.70: **global proxies**, the scene's mean token in place of their own;
- rank below 0.12: **fixed patterns**, one of four tokens that all images share;
- the rest stays near the clean tower.

What this cannot show: attention hijackees are not planted, and of a frame that was not
trained the register tokens are no detectors yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from ..images import default_reference, preprocess
from ..spurious import attention_flow, composites, detectors, similarity
from ..spurious.diagnose import middle_layers
from ..spurious.settings import FilterSettings
from .checkpoints import Checkpoint
from .cleanliness import detection_auc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROXY_RANK = 0.70
PATTERN_RANK = 0.12
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DETECTOR_COSINE, DETECTOR_SHARE = 0.55, 1 / 3
SIGMAS = tuple(step / 4 for step in range(-8, 13))
"""Limits of the filters by statistics: standard deviations from the mean."""
COSINES = tuple(step / 20 for step in range(0, 21))
"""Limits of the detectors."""
FILTERS = ("fpgp_reference", "fpgp_strip", "detectors", "ah", "union")
BATCH = 4
"""Images the tower takes at once."""


class TruthError(ValueError):
    """A folder does not hold an adapter that plants dirt in this tower."""


@dataclass(frozen=True)
class PlantedTruth:
    """Which tokens are spurious; maps are ``(batch, patches)`` bool in raster order."""

    proxies: Tensor
    patterns: Tensor

    @property
    def spurious(self) -> Tensor:
        """Either kind."""
        return self.proxies | self.patterns


@dataclass(frozen=True)
class Agreement:
    """A filter at one limit against the truth.

    Attributes:
        limit: of the filter: standard deviations, or a cosine for the detectors.
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
        auc: area under the ROC curve of its score; None for the union, which has none.
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
        filters: name -> report, in the order of `FILTERS`.
        planted: share of the tokens that are planted: the precision of blind rejection.
        proxies: share of global proxies.
        patterns: share of fixed patterns.
        cosine_to_clean: kind -> mean cosine of the dirty tower's tokens to the clean
            tower's; low for the planted kinds if the adapter does what the rule says.
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


def planted_truth(pixel_values: Tensor, patch_size: int) -> PlantedTruth:
    """The rule: which patches are planted, by their pixels alone.

    Ranks are those of a stable sort divided by ``patches - 1``, so that an image of one
    flat colour is planted by raster order.

    Args:
        pixel_values: ``(batch, 3, height, width)``, normalised.
        patch_size: side of a patch in pixels.

    Raises:
        ValueError: sizes off the patch grid, or fewer than 2 patches.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"The images are {height} x {width} pixels; both must be multiples of the "
            f"patch size {patch_size}."
        )
    patches = functional.unfold(pixel_values.float(), patch_size, stride=patch_size)
    count = patches.shape[-1]
    if count < 2:
        raise ValueError("One patch has no rank: take larger images.")
    order = patches.std(dim=1).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1) / (count - 1)
    return PlantedTruth(proxies=rank >= PROXY_RANK, patterns=rank < PATTERN_RANK)


def dirty_checkpoint(clean: Checkpoint, folder: str | Path) -> Checkpoint:
    """Merge the adapter of a folder into a tower, in memory and in place.

    Args:
        clean: the tower the adapter was trained on; its model is changed.
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        TruthError: a file is missing or damaged, or its weights are not those of an
            adapter of this tower.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (folder / name).is_file():
            raise TruthError(f"{folder} holds no {name}: name an adapter's folder.")
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as problem:
        raise TruthError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: {problem}."
        ) from problem
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise TruthError(f"{folder / ADAPTER_CONFIG} is not of a LoRA adapter.")
    model, tower = clean.model, clean.model.tower
    try:
        wrapped = get_peft_model(tower, config)
        wanted = {
            name.replace(".default", ""): list(parameter.shape)
            for name, parameter in wrapped.named_parameters()
            if "lora_" in name
        }
    except ValueError as problem:
        raise TruthError(f"The adapter of {folder} does not fit: {problem}") from None
    wrong = sorted(
        name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name)
    )
    if wrong:
        raise TruthError(
            f"The adapter of {folder} is not one of {clean.name}: {len(wrong)} of its "
            f"{len(shapes)} weights are missing, unknown or of another shape, such as "
            f"{wrong[0]}."
        )
    set_peft_model_state_dict(wrapped, load_file(folder / ADAPTER_WEIGHTS))
    model.tower = wrapped.merge_and_unload()
    model.eval()
    return replace(clean, name=f"{clean.name} + {folder.name}", folder=None)


@dataclass(frozen=True)
class FilterScores:
    """What the filters see of a batch; all ``(batch, patches)``, higher is dirtier.

    Attributes:
        reference: highest cosine to the reference image, in standard deviations from the
            image's mean.
        strip: the same for the composite's strip.
        detectors: highest cosine to a third of the frame's tokens.
        inflow: attention received by the tokens, below the mean of those the FP-GP filters
            keep in standard deviations.
    """

    reference: Tensor
    strip: Tensor
    detectors: Tensor
    inflow: Tensor


@torch.no_grad()
def filter_scores(
    checkpoint: Checkpoint,
    pixel_values: Tensor,
    reference: Tensor,
    settings: FilterSettings | None = None,
    side: str = "right",
) -> FilterScores:
    """Scores of the four filters of a training step, on whole images.

    As in training, the first two and the attention flow read the composite through the
    bare tower; the detectors are a third of the tokens of the image's frame (of 1 patch
    where the checkpoint has none), drawn from seed 0. The statistics of the inflow are the
    batch's, over the tokens that the FP-GP filters keep at the limits of `settings`.

    Args:
        pixel_values: ``(batch, 3, height, width)``, normalised.
        reference: ``(1, 3, height, width)``, normalised.
        settings: of the filters; where `ah_layers` is unset, `middle_layers`.
    """
    settings = settings or FilterSettings()
    model, patch = checkpoint.model, checkpoint.patch_size
    config = model.config.vision_config
    layers = settings.flow_layers
    if not layers:
        first, last = middle_layers(config.num_hidden_layers)
        layers = tuple(range(first, last + 1))
    grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
    ratio, unit = settings.strip_ratio, similarity.unit_tokens
    glued = composites.add_strip(pixel_values, reference, side, patch, ratio)
    encoded = model.encode(glued, 0, query_key_layers=layers)
    crop, strip = composites.split_strip(unit(encoded.image), grid, side, ratio)
    unrelated = unit(model.encode(reference, 0).image)
    to_reference = similarity.highest_cosine(crop, unrelated)
    to_strip = similarity.highest_cosine(crop, strip)

    framed = model.encode(pixel_values, max(1, checkpoint.register_width))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = detectors.draw_detectors(unit(framed.registers), DETECTOR_SHARE)
    plain = unit(model.encode(pixel_values, 0).image)
    to_detectors = similarity.highest_cosine(plain, drawn)

    reference_score, strip_score = _standard(to_reference), _standard(to_strip)
    rejected = reference_score >= settings.fpgp_sigma
    rejected = rejected | (strip_score >= settings.fpgp_sigma)
    flow = [
        tuple(composites.split_strip(part, grid, side, ratio)[0] for part in pair)
        for pair in encoded.queries_keys.values()
    ]
    inflow = attention_flow.attention_inflow(
        [(queries, keys) for queries, keys in flow],
        rejected,
        settings.ah_form,
        config.num_attention_heads,
    )
    kept = inflow[~rejected]
    if kept.numel() < 2:
        flow_score = torch.zeros_like(inflow)
    else:
        flow_score = (kept.mean() - inflow) / kept.std().clamp_min(1e-12)
    return FilterScores(
        reference_score.cpu(), strip_score.cpu(), to_detectors.cpu(), flow_score.cpu()
    )


def _standard(scores: Tensor) -> Tensor:
    """Scores in standard deviations from their image's mean (unbiased)."""
    mean, std = scores.mean(dim=1, keepdim=True), scores.std(dim=1, keepdim=True)
    return (scores - mean) / std.clamp_min(1e-12)


def agreement(marked: Tensor, truth: PlantedTruth, limit: float) -> Agreement:
    """Precision, recall and F1 of a mask.

    Args:
        marked: ``(batch, patches)`` bool, True = rejected.
        limit: what gave the mask.

    Raises:
        ValueError: nothing is planted.
    """
    planted = truth.spurious
    if not planted.any():
        raise ValueError("No token is planted: there is nothing to find.")
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
    scores: FilterScores,
    truth: PlantedTruth,
    settings: FilterSettings | None = None,
) -> dict[str, FilterReport]:
    """Each filter at its limit and over a sweep of limits.

    In the sweep of the union the limits in standard deviations move together and the
    detectors stay at theirs.
    """
    settings = settings or FilterSettings()
    maps = {
        "fpgp_reference": (scores.reference, settings.fpgp_sigma, SIGMAS),
        "fpgp_strip": (scores.strip, settings.fpgp_sigma, SIGMAS),
        "detectors": (scores.detectors, DETECTOR_COSINE, COSINES),
        "ah": (scores.inflow, settings.ah_sigma, SIGMAS),
    }
    reports: dict[str, FilterReport] = {}
    for name, (score, default, limits) in maps.items():
        reports[name] = FilterReport(
            agreement(score >= default, truth, default),
            tuple(agreement(score >= limit, truth, limit) for limit in limits),
            detection_auc(score, truth.spurious),
        )

    def union(fpgp: float, flow: float) -> Tensor:
        found = (scores.reference >= fpgp) | (scores.strip >= fpgp)
        return found | (scores.detectors >= DETECTOR_COSINE) | (scores.inflow >= flow)

    reports["union"] = FilterReport(
        agreement(
            union(settings.fpgp_sigma, settings.ah_sigma), truth, settings.fpgp_sigma
        ),
        tuple(agreement(union(limit, limit), truth, limit) for limit in SIGMAS),
        None,
    )
    return reports


@torch.no_grad()
def measure_truth(
    clean: Checkpoint,
    folder: str | Path,
    images: Sequence[Image.Image],
    size: int,
    settings: FilterSettings | None = None,
) -> TruthReport:
    """Plant the adapter's dirt in a tower and ask each filter to find it.

    Args:
        clean: the tower the adapter was trained on; its model is changed.
        folder: of the adapter, see `dirty_checkpoint`.
        images: RGB; resized to ``size x size``, rounded up to patches.

    Raises:
        TruthError: the adapter is not one of this tower.
        ValueError: no images.
    """
    if not images:
        raise ValueError("There are no images to measure on.")
    side, device = clean.side(size), clean.model.device
    pixels = [preprocess(i, (side, side), clean.mean, clean.std) for i in images]
    batches = torch.stack(pixels).split(BATCH)
    reference = preprocess(default_reference(), (side, side), clean.mean, clean.std)
    reference = reference[None].to(device)

    def tokens(checkpoint: Checkpoint) -> Tensor:
        found = [checkpoint.model.encode(b.to(device), 0).image for b in batches]
        return similarity.unit_tokens(torch.cat(found)).cpu()

    before = tokens(clean)
    dirty = dirty_checkpoint(clean, folder)
    cosine = (before * tokens(dirty)).sum(dim=-1)
    parts = [planted_truth(batch, clean.patch_size) for batch in batches]
    truth = PlantedTruth(
        torch.cat([part.proxies for part in parts]),
        torch.cat([part.patterns for part in parts]),
    )
    found = [filter_scores(dirty, b.to(device), reference, settings) for b in batches]
    scores = FilterScores(
        *(
            torch.cat([getattr(score, name) for score in found])
            for name in ("reference", "strip", "detectors", "inflow")
        )
    )
    kinds = {
        "proxies": truth.proxies,
        "patterns": truth.patterns,
        "rest": ~truth.spurious,
    }
    return TruthReport(
        filters=compare_filters(scores, truth, settings),
        planted=truth.spurious.float().mean().item(),
        proxies=truth.proxies.float().mean().item(),
        patterns=truth.patterns.float().mean().item(),
        cosine_to_clean={
            name: cosine[kind].mean().item() for name, kind in kinds.items()
        },
        images=len(images),
        size=side,
    )


def truth_table(report: TruthReport) -> str:
    """Markdown: a filter a row, at its limit, with the best limit of the sweep."""
    lines = [
        "| filter | rejects | precision | recall | of proxies | of patterns | F1 | AUC | "
        "best F1 | at limit |",
        "|---" * 10 + "|",
    ]
    for name, found in report.filters.items():
        at, best = found.default, found.best
        auc = "" if found.auc is None else f"{found.auc:.3f}"
        precision = "" if at.precision is None else f"{at.precision:.3f}"
        lines.append(
            f"| {name} | {at.marked:.3f} | {precision} | {at.recall:.3f} | "
            f"{at.proxy_recall:.3f} | {at.pattern_recall:.3f} | {at.f1:.3f} | {auc} | "
            f"{best.f1:.3f} | {best.limit:g} |"
        )
    share = report.planted
    lines.append(
        f"| every token | 1.000 | {share:.3f} | 1.000 | 1.000 | 1.000 | "
        f"{2 * share / (1 + share):.3f} | 0.500 | | |"
    )
    return "\n".join(lines)


def plot_truth(reports: Mapping[str, FilterReport], planted: float) -> Figure:
    """Precision over recall of each filter; a dot marks the limit of training.

    Args:
        planted: share of planted tokens, drawn as the precision of blind rejection.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'The plot needs matplotlib: pip install "unirefiner_hf[demo]".'
        ) from error
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, report in reports.items():
        points = [at for at in report.sweep if at.precision is not None]
        (line,) = axes.plot(
            [at.recall for at in points], [at.precision for at in points], label=name
        )
        if report.default.precision is not None:
            axes.plot(
                report.default.recall,
                report.default.precision,
                "o",
                color=line.get_color(),
            )
    axes.axhline(planted, color="grey", linestyle=":", label="blind")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend()
    return figure
