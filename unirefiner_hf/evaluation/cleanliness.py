"""How clean a model's tokens are, without labels: several measures, none to trust alone.

========================  ======================================================  ===========
measure                   what it is                                              clean is
========================  ======================================================  ===========
fpgp, ah, spurious        shares the training's own filters find                  low
norm_outliers             tokens with a norm above the image's mean + 3 std       low
norm_max_to_median        largest norm over the median norm of the image          near 1
shift_residual            1 - cosine of a place's tokens in two shifted views     low
positional_variance       share of the variance that the place alone explains     low
neighbour_cosine          cosine of adjacent tokens                               (see below)
neighbour_contrast        its fall from flat neighbours to those across an edge   high
knn_accuracy, knn_iou     labels found by the nearest tokens of other images      high
========================  ======================================================  ===========

What fools each of them:

- A model's own thresholds follow each image's mean, so they reject a similar share of any
  model's tokens. By a base's reference thresholds (`base`) the shares say that tokens moved,
  not that they got better; and a refined model was trained on them. They look for the base's
  own artifacts: a model with fixed patterns that its base does not have passes for clean
  (injected ones ranked below clean tokens: area under the ROC curve 0.28, by its own
  thresholds 0.72).
- Norms miss fixed patterns and proxies of normal or low norm; a model that ends in a layer
  norm is measured before it, one trained with registers may have none and be full of
  artifacts.
- The shift residual is fooled by tokens that are constant, whether clean or not: a collapsed
  map has none, and injected fixed patterns and proxies were found no better than by chance.
  Read it beside neighbour_contrast.
- Positional variance counts a real habit of photographs (sky above) as an artifact, and needs
  many unlike images: with n images its noise is about 1/n, which is subtracted.
- Neighbour cosine rises with any blur. Blurring lowers neighbour_contrast at the same time,
  which is the guard: a cleaner map raises the first and keeps the second.
- k-NN scores follow what the labels name; a proxy token that carries the scene finds the
  scene's commonest class. Injected proxies and patterns left them as they were where a linear
  probe lost 10 points of mIoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from ..data.images import default_reference
from ..data.labelled import ClassLabels, LabelledImages
from ..modeling.errors import UniRefinerError
from ..spurious.diagnose import Diagnosis, Yardstick, diagnose
from ..spurious.settings import FilterSettings
from .augment import resize_labels
from .checkpoints import Checkpoint
from .metric_modules.dense_knn import DenseKnn
from .metrics import check_measures

SHIFTS = ((0, 1), (1, 0), (1, 2), (2, 1))
"""Shifts in patches, rows and columns, of the views of the shift residual."""
OUTLIER_SIGMA = 3.0
BATCH = 8
"""Images the model takes at once."""
LOWER_IS_CLEANER = {
    "fpgp": True,
    "ah": True,
    "spurious": True,
    "norm_outliers": True,
    "norm_max_to_median": True,
    "shift_residual": True,
    "positional_variance": True,
    "neighbour_cosine": None,
    "neighbour_contrast": False,
    "knn_accuracy": False,
    "knn_iou": False,
}


@dataclass
class Cleanliness:
    """Measures of one checkpoint; see the module.

    Attributes:
        name: of the checkpoint.
        values: measure -> value, means over images.
        images: their number.
        fpgp, ah: ``(images, patches)`` bool, what each filter found.
        thresholds: of each batch of `BATCH` images, for models measured by this one's.
        grid: rows and columns of patches.
    """

    name: str
    values: dict[str, float]
    images: int
    fpgp: Tensor
    ah: Tensor
    thresholds: list[Yardstick]
    grid: tuple[int, int]


@dataclass
class _Collected:
    """What the images give one after another."""

    diagnoses: list[Diagnosis] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    colours: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def measure_cleanliness(
    checkpoint: Checkpoint,
    images: Sequence[Image.Image],
    size: int,
    *,
    base: Cleanliness | None = None,
    settings: FilterSettings | None = None,
) -> Cleanliness:
    """Every measure that needs no labels.

    Args:
        images: RGB; resized to ``size x size``, rounded up to patches.
        base: measure the filters' shares by the reference thresholds of this model,
            measured before on the same images; None: by the checkpoint's own.
        settings: of the filters.

    Raises:
        UniRefinerError: fewer than 2 images, or other images than the base's.
    """
    if len(images) < 2:
        raise UniRefinerError(
            f"{len(images)} image is too few: how much the place explains shows on several."
        )
    if base is not None and base.images != len(images):
        raise UniRefinerError(
            f"{base.name} was measured on {base.images} images, these are {len(images)}."
        )
    checkpoint.check_grid(size)
    side, device = checkpoint.side(size), checkpoint.model.device

    def pixels(image: Image.Image) -> Tensor:
        return checkpoint.reading(image, (side, side))

    reference = pixels(default_reference())[None].to(device)
    found = _Collected()
    title = f"cleanliness of {checkpoint.name}"
    for start in tqdm(range(0, len(images), BATCH), desc=title, leave=False):
        chunk = images[start : start + BATCH]
        batch = torch.stack([pixels(image) for image in chunk])
        batch = batch.to(device)
        found.diagnoses.append(
            diagnose(
                checkpoint.model,
                batch,
                reference,
                settings,
                register_width=checkpoint.register_width,
                yardstick=base.thresholds[start // BATCH] if base else None,
            )
        )
        norms, tokens = _norms_and_tokens(checkpoint, batch)
        found.norms.append(norms)
        found.tokens.append(tokens)
        found.shifts += [shift_residual(checkpoint, image, size) for image in chunk]
        found.colours.append(_patch_colours(batch, checkpoint.patch_size))
    return _summary(checkpoint, found)


def _summary(checkpoint: Checkpoint, found: _Collected) -> Cleanliness:
    grid = found.diagnoses[0].grid
    fpgp = torch.cat([diagnosis.fpgp for diagnosis in found.diagnoses]).cpu()
    ah = torch.cat([diagnosis.ah for diagnosis in found.diagnoses]).cpu()
    shares = {"fpgp": fpgp, "ah": ah, "spurious": fpgp | ah}
    values = {name: marked.float().mean().item() for name, marked in shares.items()}
    norms, tokens = torch.cat(found.norms), torch.cat(found.tokens)
    values.update(norm_outliers(norms))
    values["shift_residual"] = torch.stack(found.shifts).nanmean().item()
    values["positional_variance"] = positional_variance(tokens)
    values.update(neighbour_similarity(tokens, torch.cat(found.colours), grid))
    thresholds = [diagnosis.yardstick for diagnosis in found.diagnoses]
    name = checkpoint.name
    check_measures(name, values)
    return Cleanliness(name, values, len(tokens), fpgp, ah, thresholds, grid)


def _norms_and_tokens(checkpoint: Checkpoint, batch: Tensor) -> tuple[Tensor, Tensor]:
    """``(batch, patches)`` norms before the last layer norm, and the tokens."""
    outputs = checkpoint.model(
        batch,
        register_width=checkpoint.register_width,
        output_hidden_states=[-1],
    )
    before = outputs.hidden_states[-1].float().norm(dim=-1)
    return before.cpu(), outputs.last_hidden_state.float().cpu()


def norm_outliers(norms: Tensor) -> dict[str, float]:
    """``norm_outliers`` and ``norm_max_to_median``, means over images.

    Args:
        norms: ``(images, patches)``.
    """
    limit = norms.mean(1, keepdim=True) + OUTLIER_SIGMA * norms.std(1, keepdim=True)
    ratio = norms.amax(dim=1) / norms.median(dim=1).values.clamp_min(1e-12)
    return {
        "norm_outliers": (norms > limit).float().mean().item(),
        "norm_max_to_median": ratio.mean().item(),
    }


@torch.no_grad()
def shift_residual(checkpoint: Checkpoint, image: Image.Image, size: int) -> Tensor:
    """1 - cosine of the tokens of one place in shifted views, ``(patches,)``.

    The image is resized 2 patches larger than the views, which are shifted by whole
    patches, so the same pixels fall into the same patches. NaN where no view overlaps.
    """
    patch, side = checkpoint.patch_size, checkpoint.side(size)
    large = side + 2 * patch
    pixels = checkpoint.reading(image, (large, large))
    places = [(0, 0), *SHIFTS]
    views = [
        pixels[:, r * patch : r * patch + side, c * patch : c * patch + side]
        for r, c in places
    ]
    maps = checkpoint.feature_map(torch.stack(views).to(checkpoint.model.device))
    maps = functional.normalize(maps, dim=1).cpu()
    rows, columns = maps.shape[2:]
    total, count = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for (down, right), view in zip(SHIFTS, maps[1:], strict=True):
        still = maps[0][:, down:, right:]
        moved = view[:, : rows - down, : columns - right]
        total[down:, right:] += 1 - (still * moved).sum(dim=0)
        count[down:, right:] += 1
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan).flatten()


def positional_variance(tokens: Tensor) -> float:
    """Share of the tokens' variance that their place explains, over unlike images.

    The variance of the places' means, less the part that chance gives with this many
    images, over the whole (one-way analysis of variance, all channels together).

    Args:
        tokens: ``(images, patches, channels)``.
    """
    images, patches, _ = tokens.shape
    tokens = tokens.double()
    means = tokens.mean(dim=0)
    within = ((tokens - means) ** 2).sum() / (patches * (images - 1))
    between = ((means - means.mean(dim=0)) ** 2).sum() / (patches - 1)
    between = between - within / images
    return max(0.0, (between / (between + within)).item())


def neighbour_similarity(
    tokens: Tensor, colours: Tensor, grid: tuple[int, int]
) -> dict[str, float]:
    """``neighbour_cosine`` and, as a guard against blur, ``neighbour_contrast``.

    The contrast is the mean cosine of the third of all adjacent pairs whose pixels differ
    least, less that of the third that differ most.

    Args:
        tokens: ``(images, patches, channels)``.
        colours: ``(images, patches, 3)``, mean pixel of each patch.
    """
    unit = functional.normalize(tokens, dim=-1).unflatten(1, grid)
    shades = colours.unflatten(1, grid)
    cosines, gaps = [], []
    for axis in (1, 2):
        length = unit.shape[axis]
        first, second = (unit.narrow(axis, start, length - 1) for start in (0, 1))
        cosines.append((first * second).sum(dim=-1).flatten(1))
        first, second = (shades.narrow(axis, start, length - 1) for start in (0, 1))
        gaps.append((first - second).norm(dim=-1).flatten(1))
    cosine, gap = torch.cat(cosines, dim=1), torch.cat(gaps, dim=1)
    third = max(1, gap.shape[1] // 3)
    order = gap.argsort(dim=1)
    flat = cosine.gather(1, order[:, :third]).mean()
    edge = cosine.gather(1, order[:, -third:]).mean()
    return {
        "neighbour_cosine": cosine.mean().item(),
        "neighbour_contrast": (flat - edge).item(),
    }


def _patch_colours(batch: Tensor, patch: int) -> Tensor:
    return functional.avg_pool2d(batch, patch).flatten(2).transpose(1, 2).cpu()


def knn_retrieval(
    checkpoint: Checkpoint,
    images: LabelledImages,
    classes: ClassLabels,
    size: int,
    *,
    neighbours: int = 30,
    temperature: float = 0.02,
) -> dict[str, float]:
    """Labels of each image's tokens, found by the nearest tokens of the other images.

    A token's label is that of the pixel at its centre; see `DenseKnn` for the vote.

    Returns:
        ``knn_accuracy``, mean over classes, and ``knn_iou``, mean over classes.

    Raises:
        UniRefinerError: fewer than 2 images, see `DenseKnn`.
        LabelError: see `ClassLabels.read`.
    """
    side, device = checkpoint.side(size), checkpoint.model.device
    metric = DenseKnn(
        num_classes=len(classes),
        neighbours=neighbours,
        temperature=temperature,
        device=device,
        keep_in_memory=True,
    )
    measured = []
    for number in range(len(images)):
        image, values = images.pair(number)
        values = classes.read(values, images.names[number])
        pixels = checkpoint.reading(image, (side, side))
        found = checkpoint.feature_map(pixels[None].to(device))[0]
        labels = resize_labels(values, (found.shape[1], found.shape[2]))
        measured.append(metric.measure(found.flatten(1).T, labels.flatten()))
    return metric.score(measured)
