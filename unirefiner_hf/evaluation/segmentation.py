"""Linear-probe segmentation: BatchNorm and a 1x1 convolution on frozen tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.labelled import IGNORE, ClassLabels, LabelError, LabelledImages
from ..modeling.files import check_finite
from .augment import CropSettings, normalised, resize_labels, training_crop
from .checkpoints import Checkpoint
from .metric_modules.mean_iou import MeanIou
from .metrics import SegmentationScores
from .settings import SegmentationSettings

BLIND = 100
"""Batches without a label that a probe is trained on before it is refused."""
FAST_SCALE = 4
"""The fast mode trains on labels this many times finer than the token grid."""


@dataclass(frozen=True)
class SegmentationResult:
    """One checkpoint under every probe seed.

    Attributes:
        scores: of each seed.
        areas: ``(seeds, images, classes, 3)`` int64, see `class_areas`.
        predictions: of the first seed, ``(height, width)`` uint8 or int64 of the first
            images, for pictures.
    """

    scores: list[SegmentationScores]
    areas: np.ndarray
    predictions: list[np.ndarray]

    @classmethod
    def of(
        cls, finished: list[tuple[SegmentationScores, np.ndarray, list[np.ndarray]]]
    ) -> SegmentationResult:
        """What `Validation.finish` gave for each seed."""
        scores, areas, shown = zip(*finished, strict=True)
        return cls(list(scores), np.stack(areas), shown[0])


def evaluate_segmentation(
    checkpoint: Checkpoint,
    train: LabelledImages,
    val: LabelledImages,
    classes: ClassLabels,
    settings: SegmentationSettings,
    *,
    seeds: int = 3,
    pictures: int = 4,
) -> SegmentationResult:
    """Train a probe for each seed on `train` and measure it on `val`.

    On several processes (torch.distributed) each takes its share of every batch and of
    the validation images; every process returns the whole result.

    Raises:
        LabelError: see `ClassLabels.read`.
        UniRefinerError: every label of `val` is ignored.
    """
    run = _fast_run if settings.fast else _full_run
    return run(checkpoint, train, val, classes, settings, seeds, pictures)


class LinearHead(nn.Module):
    """BatchNorm, dropout if any, and a 1x1 convolution: tokens to class scores.

    Args:
        channels: of a token.
        classes: number of classes.
    """

    def __init__(self, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        if self.classify.bias is not None:
            nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, channels, rows, columns)`` to ``(batch, classes, rows, columns)``."""
        return self.classify(self.dropout(self.norm(features)))


def learning_rate_share(step: int, steps: int, warmup: int, power: float) -> float:
    """Linear warm-up, then polynomial decay to 0; `step` counts from 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 - step / steps) ** power


def train_head(
    head: LinearHead,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    settings: SegmentationSettings,
    title: str = "",
) -> None:
    """Fit a head in place.

    Args:
        batches: features ``(batch, channels, rows, columns)`` and labels ``(batch,
            height, width)``, 255 ignored; class scores are resized to the labels.

    Raises:
        LabelError: no pixel of the first `BLIND` batches counts.
        UniRefinerError: the head diverged.
    """
    head.train()
    optimiser = torch.optim.AdamW(
        head.parameters(),
        lr=settings.probe_lr,
        weight_decay=settings.probe_weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: learning_rate_share(step, steps, settings.warmup, settings.power),
    )
    labelled = torch.zeros((), dtype=torch.long)
    shown = tqdm(range(steps), desc=title, leave=False, disable=processes()[0] > 0)
    for step in shown:
        features, labels = next(batches)
        scores = resized(head(features), labels.shape[-2:])
        loss = functional.cross_entropy(
            scores, labels, ignore_index=IGNORE, reduction="sum"
        )
        counted = (labels != IGNORE).sum()
        labelled = labelled.to(counted) + counted
        if step in (min(steps, BLIND) - 1, steps - 1):
            _check_labelled(labelled, step + 1)
        loss = loss / counted.clamp_min(1)
        optimiser.zero_grad()
        loss.backward()
        _average_gradients(head)
        optimiser.step()
        schedule.step()
    _share_statistics(head)
    check_finite(
        head.state_dict().items(),
        f"The weights of the {title or 'probe'}",
        "It diverged: lower probe_lr.",
    )
    head.eval()


def _check_labelled(labelled: Tensor, steps: int) -> None:
    """Refuse to go on with a probe that saw no label; to be called by every process."""
    if processes()[1] > 1:
        labelled = labelled.clone()
        dist.all_reduce(labelled)
    if not int(labelled):
        raise LabelError(
            f"No pixel of the first {steps} batches has a label that counts: the probe "
            "learns nothing. Look at the labels of the training split, and at ignore_label."
        )


def resized(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores ``(batch, classes, rows, columns)`` bilinearly to ``(height, width)``."""
    return functional.interpolate(
        scores, tuple(size), mode="bilinear", align_corners=False
    )


def processes() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _average_gradients(head: nn.Module) -> None:
    world = processes()[1]
    if world > 1:
        for parameter in head.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world)


def _share_statistics(head: nn.Module) -> None:
    """One head everywhere: plain BatchNorm kept statistics of its own process."""
    if processes()[1] > 1:
        for value in (*head.parameters(), *head.buffers()):
            dist.broadcast(value.data, src=0)


def _new_head(
    checkpoint: Checkpoint, classes: int, settings: SegmentationSettings, seed: int
) -> LinearHead:
    """A head drawn from the seed alone, so that every checkpoint starts alike."""
    device = checkpoint.model.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LinearHead(checkpoint.hidden_size, classes, settings.head_dropout)
    if processes()[1] > 1 and device.type == "cuda":
        head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    return head.to(device)


def _gathered(
    areas: dict[int, np.ndarray], predictions: dict[int, np.ndarray], pictures: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Per-image results of all processes, in order."""
    if processes()[1] > 1:
        parts: list = [None] * processes()[1]
        dist.all_gather_object(parts, (areas, predictions))
        areas = {k: v for part in parts for k, v in part[0].items()}
        predictions = {k: v for part in parts for k, v in part[1].items()}
    shown = [predictions[number] for number in sorted(predictions)[:pictures]]
    return np.stack([areas[number] for number in sorted(areas)]), shown


class Validation:
    """Measures the predictions of one seed with the metric ``mean_iou``."""

    def __init__(self, classes: int, pictures: int) -> None:
        self.metric = MeanIou(
            num_classes=classes, per_category=True, keep_in_memory=True
        )
        self.pictures = pictures
        self.areas: dict[int, np.ndarray] = {}
        self.predictions: dict[int, np.ndarray] = {}

    def add(self, number: int, scores: Tensor, label: np.ndarray) -> None:
        """One image's class scores ``(1, classes, rows, columns)`` against its label."""
        prediction = resized(scores, label.shape).argmax(dim=1)[0].cpu()
        self.count(number, prediction, label)

    def count(self, number: int, prediction: Tensor, label: np.ndarray) -> None:
        """One image's predicted classes ``(height, width)``, on the CPU."""
        self.areas[number] = self.metric.measure(prediction, label)
        if number < self.pictures:
            self.predictions[number] = prediction.numpy()

    def finish(self) -> tuple[SegmentationScores, np.ndarray, list[np.ndarray]]:
        """Scores over all processes, areas of each image, first predictions.

        Raises:
            UniRefinerError: every label is ignored.
        """
        areas, shown = _gathered(self.areas, self.predictions, self.pictures)
        found = self.metric.score(list(areas))
        scores = SegmentationScores(
            iou=np.array(found.pop("per_category_iou")),
            accuracy=np.array(found.pop("per_category_accuracy")),
            **found,
        )
        return scores, areas, shown


# Fast mode: every image through the tower once


@dataclass(frozen=True)
class CachedTokens:
    """Tokens of whole images at one size, in half precision where they fit it.

    Attributes:
        features: ``(images, channels, rows, columns)`` float16; float32 where some are
            beyond its 65504.
        labels: ``(images, height, width)`` int64 at `FAST_SCALE` times the grid.
    """

    features: Tensor
    labels: Tensor


def cache_tokens(
    checkpoint: Checkpoint,
    images: LabelledImages,
    classes: ClassLabels,
    size: int,
    batch: int = 8,
    *,
    mirrored: bool = False,
    numbers: range | None = None,
) -> tuple[CachedTokens, list[np.ndarray]]:
    """Encode images resized to ``size x size``.

    Args:
        mirrored: encode each image mirrored, too; these come last.
        numbers: the images to take; None takes all.

    Returns:
        The tokens, and the labels at full size.
    """
    numbers = numbers if numbers is not None else range(len(images))
    grid = size // checkpoint.patch_size
    fine = (FAST_SCALE * grid, FAST_SCALE * grid)
    pixels: list[Tensor] = []
    whole: list[np.ndarray] = []
    device, features = checkpoint.model.device, []
    flipped_features = []

    def encode() -> None:
        if pixels:
            stack = torch.stack(pixels).to(device)
            features.append(_compact(checkpoint.feature_map(stack)))
            if mirrored:
                flipped_features.append(
                    _compact(checkpoint.feature_map(stack.flip(-1)))
                )
            pixels.clear()

    title = f"tokens of {checkpoint.name}"
    for number in tqdm(numbers, desc=title, leave=False, disable=processes()[0] > 0):
        image, values = images.pair(number)
        whole.append(classes.read(values, images.names[number]))
        size2 = (size, size)
        pixels.append(checkpoint.reading(image, size2))
        if len(pixels) == batch:
            encode()
    encode()
    labels = torch.stack([torch.from_numpy(resize_labels(x, fine)) for x in whole])
    if mirrored:
        labels = torch.cat((labels, labels.flip(-1)))
    return CachedTokens(torch.cat(features + flipped_features), labels), whole


def _compact(features: Tensor) -> Tensor:
    """On the CPU, in float16 where all of them stay finite."""
    half = features.half()
    return (half if torch.isfinite(half).all() else features.float()).cpu()


def _fast_run(
    checkpoint: Checkpoint,
    train: LabelledImages,
    val: LabelledImages,
    classes: ClassLabels,
    settings: SegmentationSettings,
    seeds: int,
    pictures: int,
) -> SegmentationResult:
    size = checkpoint.side(settings.crop)
    rank, world = processes()
    mirrored, batch = settings.flip > 0, settings.encode_batch
    cached, _ = cache_tokens(checkpoint, train, classes, size, batch, mirrored=mirrored)
    numbers = range(rank, len(val), world)
    tested, whole = cache_tokens(checkpoint, val, classes, size, batch, numbers=numbers)
    device = checkpoint.model.device
    finished = []
    for seed in range(seeds):
        head = _new_head(checkpoint, len(classes), settings, seed)
        batches = _cached_batches(cached, settings, seed, device)
        train_head(
            head, batches, settings.fast_iterations, settings, f"probe, seed {seed}"
        )
        validation = Validation(len(classes), pictures)
        with torch.no_grad():
            for index, number in enumerate(numbers):
                feature = tested.features[index : index + 1].to(device).float()
                validation.add(number, head(feature), whole[index])
        finished.append(validation.finish())
    return SegmentationResult.of(finished)


def _cached_batches(
    cached: CachedTokens,
    settings: SegmentationSettings,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, each image once a pass in an order drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    total, (rank, world) = len(cached.features), processes()
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < settings.batch:
            order = torch.cat((order, torch.randperm(total, generator=generator)))
        picked, order = order[: settings.batch], order[settings.batch :]
        mine = picked[rank::world]
        features = cached.features[mine].to(device).float()
        yield features, cached.labels[mine].to(device)


# Full protocol: augmented crops, sliding window


class _Crops(Dataset):
    """Training crops by number; the same number gives the same crop."""

    def __init__(
        self,
        images: LabelledImages,
        classes: ClassLabels,
        crops: CropSettings,
        checkpoint: Checkpoint,
        seed: int,
        count: int,
    ) -> None:
        self.images, self.classes, self.crops = images, classes, crops
        self.reading = checkpoint.reading
        self.seed = seed
        rank, world = processes()
        self.numbers = range(rank, count, world)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number = self.numbers[index]
        turn, place = divmod(number, len(self.images))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.images))
        picked = int(order[place])
        random = np.random.default_rng([self.seed, 1 + turn, 1 + place])
        image, values = self.images.pair(picked)
        label = self.classes.read(values, self.images.names[picked])
        pixels, crop = training_crop(image, label, self.crops, random)
        return normalised(pixels, self.reading), torch.from_numpy(crop)


def _full_run(
    checkpoint: Checkpoint,
    train: LabelledImages,
    val: LabelledImages,
    classes: ClassLabels,
    settings: SegmentationSettings,
    seeds: int,
    pictures: int,
) -> SegmentationResult:
    size = checkpoint.side(settings.crop)
    crops = CropSettings(
        size,
        (settings.scale_min, settings.scale_max),
        settings.max_class_share,
        settings.flip,
        settings.distortion,
    )
    device, (rank, world) = checkpoint.model.device, processes()
    heads = []
    for seed in range(seeds):
        count = settings.iterations * settings.batch
        dataset = _Crops(train, classes, crops, checkpoint, seed, count)
        loader = DataLoader(
            dataset,
            batch_size=max(1, settings.batch // world),
            num_workers=settings.workers,
        )

        def encoded(loader: DataLoader = loader) -> Iterator[tuple[Tensor, Tensor]]:
            for pixels, labels in loader:
                yield checkpoint.feature_map(pixels.to(device)), labels.to(device)

        head = _new_head(checkpoint, len(classes), settings, seed)
        train_head(
            head, encoded(), settings.iterations, settings, f"probe, seed {seed}"
        )
        heads.append(head)
    validations = [Validation(len(classes), pictures) for _ in heads]
    numbers = range(rank, len(val), world)
    for number in tqdm(numbers, desc="validation", leave=False, disable=rank > 0):
        image, values = val.pair(number)
        label = classes.read(values, val.names[number])
        for validation, scores in zip(
            validations,
            sliding_scores(checkpoint, heads, image, size, settings),
            strict=True,
        ):
            validation.add(number, scores, label)
    return SegmentationResult.of([validation.finish() for validation in validations])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows that cover a side; the last one ends with it."""
    if length <= window:
        return [0]
    steps = -(-(length - window) // stride) + 1
    return [min(step * stride, length - window) for step in range(steps)]


@torch.no_grad()
def sliding_scores(
    checkpoint: Checkpoint,
    heads: list[LinearHead],
    image: Image.Image,
    size: int,
    settings: SegmentationSettings,
) -> list[Tensor]:
    """Class scores of one image, averaged where windows overlap.

    The shorter side is resized to the window's.

    Returns:
        For each head ``(1, classes, height, width)`` at the resized image's size.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    pixels = checkpoint.reading(image, (height, width))

    def score(windows: Tensor) -> list[Tensor]:
        features = checkpoint.feature_map(windows)
        return [head(features) for head in heads]

    device = checkpoint.model.device
    batch = settings.encode_batch
    return slide(pixels, size, settings.stride, batch, score, device)


@torch.no_grad()
def slide(
    pixels: Tensor,
    size: int,
    stride: int,
    batch: int,
    score: Callable[[Tensor], list[Tensor]],
    device: torch.device,
) -> list[Tensor]:
    """Scores of every pixel of one image, averaged where windows overlap.

    Args:
        pixels: ``(3, height, width)``, both at least `size`.
        size: side of a window in pixels.
        batch: windows `score` takes at once, on `device`.
        score: ``(windows, 3, size, size)`` to one or several ``(windows, classes, rows,
            columns)``.

    Returns:
        For each of them ``(1, classes, height, width)`` on the CPU.
    """
    height, width = pixels.shape[-2:]
    places = [
        (top, left)
        for top in window_starts(height, size, stride)
        for left in window_starts(width, size, stride)
    ]
    totals: list[Tensor] = []
    counts = torch.zeros(1, 1, height, width)
    for start in range(0, len(places), batch):
        chunk = places[start : start + batch]
        windows = [pixels[:, t : t + size, x : x + size] for t, x in chunk]
        for index, scores in enumerate(score(torch.stack(windows).to(device))):
            scores = resized(scores, (size, size)).cpu()
            if len(totals) == index:
                totals.append(torch.zeros(1, scores.shape[1], height, width))
            for (top, left), part in zip(chunk, scores, strict=True):
                totals[index][0, :, top : top + size, left : left + size] += part
        for top, left in chunk:
            counts[..., top : top + size, left : left + size] += 1
    return [total / counts for total in totals]
