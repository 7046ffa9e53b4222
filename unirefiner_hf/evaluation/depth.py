"""Linear-probe depth: a 1x1 convolution to 256 bins on frozen tokens (NYUd protocol)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..data.labelled import LabelError, LabelledImages
from ..modeling.files import check_finite
from .augment import distort, normalised, resize_labels
from .checkpoints import Checkpoint
from .metric_modules.depth_errors import DepthErrors
from .metrics import ImageDepthErrors
from .settings import DepthSettings

EIGEN_ROWS, EIGEN_COLUMNS = (45, 471), (41, 601)
EIGEN_SIZE = (480, 640)
UPSAMPLING = 4


@dataclass(frozen=True)
class DepthResult:
    """One checkpoint under every probe seed.

    Attributes:
        errors: of each seed, of each image.
        scores: of each seed, what the metric ``depth_errors`` returns.
    """

    errors: list[list[ImageDepthErrors]]
    scores: list[dict[str, float]]

    def per_image(self, name: str) -> np.ndarray:
        """``(seeds, images)`` of ``rmse``, ``absrel`` or ``delta1``."""
        return np.array([[getattr(e, name) for e in seed] for seed in self.errors])

    def pooled_rmse(self) -> list[float]:
        """RMSE over all pixels of all images at once, of each seed."""
        return [seed["rmse_pooled"] for seed in self.scores]


class DepthHead(nn.Module):
    """Depth as the expectation over uniform bins.

    ``relu(scores) + 0.1``, normalised over the bins, times their depths.
    """

    def __init__(self, channels: int, bins: int, low: float, high: float) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, bins, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)
        self.depths: Tensor
        self.register_buffer("depths", torch.linspace(low, high, bins))

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, channels, rows, columns)`` to ``(batch, rows, columns)`` metres."""
        weights = self.score(features).relu() + 0.1
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", weights, self.depths)


def sig_loss(
    prediction: Tensor, depth: Tensor, valid: Tensor, *, mean_only: bool = False
) -> Tensor:
    """``sqrt(var(g) + 0.15 mean(g)^2)`` with g the difference of logs (eps 0.001).

    Args:
        mean_only: ``sqrt(0.15 mean(g)^2)``, for the first steps.
    """
    gap = torch.log(prediction[valid] + 1e-3) - torch.log(depth[valid] + 1e-3)
    total = 0.15 * gap.mean() ** 2
    if not mean_only:
        total = total + gap.var()
    return torch.sqrt(total + 1e-12)


def depth_features(checkpoint: Checkpoint, pixel_values: Tensor) -> Tensor:
    """Patch tokens beside the pooled token where there is one, four times finer."""
    tokens, pooled = checkpoint.tokens_and_summary(pixel_values)
    if pooled is not None:
        spread = pooled[:, :, None, None].expand(-1, -1, *tokens.shape[2:])
        tokens = torch.cat((tokens, spread), dim=1)
    return functional.interpolate(
        tokens, scale_factor=UPSAMPLING, mode="bilinear", align_corners=False
    )


def read_depth(values: np.ndarray, name: str, settings: DepthSettings) -> np.ndarray:
    """A depth map in metres; 0 where there is none.

    Raises:
        LabelError: negative or not finite, or no pixel within the range.
    """
    depth = values.astype(np.float32)
    if values.dtype.kind in "ui":
        depth = depth / settings.depth_scale
    if not np.isfinite(depth).all() or depth.min(initial=0) < 0:
        raise LabelError(f"{name}: the depth map holds negative or infinite values.")
    if not ((depth > settings.depth_low) & (depth <= settings.depth_high)).any():
        raise LabelError(
            f"{name}: no depth lies within {settings.depth_low} to {settings.depth_high} "
            f"m; the largest is {depth.max():g} m. Set depth_scale (now "
            f"{settings.depth_scale:g}) to the map's units a metre."
        )
    return depth


def evaluate_depth(
    checkpoint: Checkpoint,
    train: LabelledImages,
    val: LabelledImages,
    settings: DepthSettings,
    *,
    seeds: int = 3,
) -> DepthResult:
    """Train a probe for each seed on `train` and measure it on `val`, on one process.

    Raises:
        LabelError: see `read_depth`.
        UniRefinerError: no depth of an image lies in range within the Eigen crop.
    """
    heads = [_train(checkpoint, train, settings, seed) for seed in range(seeds)]
    metric = DepthErrors(
        low=settings.depth_low, high=settings.depth_high, keep_in_memory=True
    )
    errors: list[list[ImageDepthErrors]] = [[] for _ in heads]
    for number in tqdm(range(len(val)), desc="validation", leave=False):
        image, values = val.pair(number)
        depth = torch.from_numpy(read_depth(values, val.names[number], settings))
        size = (checkpoint.side(image.height), checkpoint.side(image.width))
        pixels = checkpoint.reading(image, size)
        features = depth_features(checkpoint, pixels[None].to(checkpoint.model.device))
        for head, measured in zip(heads, errors, strict=True):
            with torch.no_grad():
                guess = _resized(head(features), tuple(depth.shape))[0].cpu()
            measured.append(metric.measure(*_cropped(guess, depth, settings)))
    return DepthResult(errors, [metric.score(measured) for measured in errors])


def _cropped(
    guess: Tensor, depth: Tensor, settings: DepthSettings
) -> tuple[Tensor, Tensor]:
    """The part of both maps that is measured."""
    eigen = settings.depth_eigen_crop
    if eigen is None:
        eigen = tuple(depth.shape) == EIGEN_SIZE
    if eigen:
        rows, columns = slice(*EIGEN_ROWS), slice(*EIGEN_COLUMNS)
        guess, depth = guess[rows, columns], depth[rows, columns]
    return guess, depth


def _resized(depth: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.interpolate(
        depth[:, None], size, mode="bilinear", align_corners=False
    )[:, 0]


def _train(
    checkpoint: Checkpoint, train: LabelledImages, settings: DepthSettings, seed: int
) -> DepthHead:
    steps, device = settings.depth_iterations, checkpoint.model.device
    head: DepthHead | None = None
    batches = _batches(checkpoint, train, settings, seed)
    for step in tqdm(range(steps), desc=f"probe, seed {seed}", leave=False):
        pixels, depth = next(batches)
        features = depth_features(checkpoint, pixels.to(device))
        if head is None:
            head = _new_head(features.shape[1], settings, seed).to(device)
            optimiser = torch.optim.AdamW(
                head.parameters(),
                lr=settings.depth_lr,
                weight_decay=settings.depth_weight_decay,
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimiser, lambda s: _rate_share(s, steps, settings.depth_warmup)
            )
        depth = depth.to(device)
        valid = (depth > settings.depth_low) & (depth <= settings.depth_high)
        guess = _resized(head(features), tuple(depth.shape[1:]))
        loss = sig_loss(
            guess, depth, valid, mean_only=step < settings.depth_loss_warmup
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), settings.depth_clip)
        optimiser.step()
        schedule.step()
    assert head is not None
    check_finite(
        head.state_dict().items(),
        f"The weights of the probe of seed {seed}",
        "It diverged: lower depth_lr.",
    )
    return head.eval()


def _new_head(channels: int, settings: DepthSettings, seed: int) -> DepthHead:
    low, high = settings.depth_low, settings.depth_high
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DepthHead(channels, settings.depth_bins, low, high)


def _rate_share(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine."""
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + np.cos(np.pi * (step - rising) / max(1, steps - rising)))


def _batches(
    checkpoint: Checkpoint, images: LabelledImages, settings: DepthSettings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    random = np.random.default_rng(seed)
    size = (
        checkpoint.side(settings.depth_crop_height),
        checkpoint.side(settings.depth_crop_width),
    )
    order: list[int] = []
    while True:
        pixels: list[Tensor] = []
        depths: list[Tensor] = []
        while len(pixels) < settings.depth_batch:
            order = order or random.permutation(len(images)).tolist()
            number = order.pop()
            image, values = images.pair(number)
            depth = read_depth(values, images.names[number], settings)
            crop, cut = _training_crop(image, depth, size, settings, random)
            pixels.append(normalised(crop, checkpoint.reading))
            depths.append(torch.from_numpy(cut))
        stacked = torch.stack(depths)
        if (
            (stacked > settings.depth_low) & (stacked <= settings.depth_high)
        ).sum() > 1:
            yield torch.stack(pixels), stacked


def _training_crop(
    image: Image.Image,
    depth: np.ndarray,
    size: tuple[int, int],
    settings: DepthSettings,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Turned, cropped, perhaps mirrored; smaller images are enlarged to the crop."""
    height, width = size
    scale = max(1.0, height / image.height, width / image.width)
    if scale > 1:
        larger = (
            max(width, round(image.width * scale)),
            max(height, round(image.height * scale)),
        )
        image = image.resize(larger, Image.Resampling.BILINEAR)
        depth = resize_labels(depth, larger[::-1])
    angle = random.uniform(-settings.depth_rotation, settings.depth_rotation)
    turned = image.rotate(angle, Image.Resampling.BILINEAR)
    depth = np.asarray(Image.fromarray(depth, "F").rotate(angle))
    top = int(random.integers(0, image.height - height + 1))
    left = int(random.integers(0, image.width - width + 1))
    part = turned.crop((left, top, left + width, top + height))
    pixels = np.asarray(part, dtype=np.float32)
    cut = depth[top : top + height, left : left + width]
    if random.random() < settings.depth_flip:
        pixels, cut = pixels[:, ::-1], cut[:, ::-1]
    if settings.depth_distortion:
        pixels = distort(pixels, random)
    return pixels, np.ascontiguousarray(cut)
