"""Zero-shot segmentation: each patch takes the class whose words are nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..data.labelled import ClassLabels, LabelError, LabelledImages
from ..modeling.dense_text import check_variant, default_variant, dense_text_features
from ..modeling.errors import UniRefinerError
from ..modeling.families import image_size_of
from ..modeling.text_side import TextSide, TextSideError, load_text_side
from .checkpoints import Checkpoint
from .segmentation import SegmentationResult, Validation, processes, resized, slide
from .settings import ZeroShotSettings
from .zero_shot_sets import SETS, TEMPLATES, Names, WordSet

PUBLISHED_WINDOW = 224
PROMPTS = 256
"""Prompts the text tower takes at once."""


@dataclass(frozen=True)
class Protocol:
    """Settings with every number in its place.

    Attributes:
        side: of the image's shorter side, in pixels.
    """

    variant: str
    templates: str
    window: int
    stride: int
    side: int
    scale: float
    threshold: float
    sigma: float
    batch: int

    def words(self) -> str:
        """In a few words."""
        count = len(TEMPLATES[self.templates])
        return (
            f"zero-shot, {self.variant}, window {self.window}/{self.stride}, short side "
            f"{self.side}, {count} template{'s' if count > 1 else ''}"
        )


def protocol_of(
    checkpoint: Checkpoint, words: WordSet, settings: ZeroShotSettings
) -> Protocol:
    """The numbers a tower is measured with; the same for every tower of one base.

    Raises:
        UniRefinerError: a variant the tower does not have, a short side below the window, or
            a threshold where no class is background.
    """
    config = checkpoint.model.config.vision_config
    variant = settings.variant or default_variant(config)
    check_variant(config, variant)
    window = checkpoint.side(settings.window or image_size_of(config))
    side = settings.short_side
    if side is None:
        side = math.ceil(window * words.short_side / PUBLISHED_WINDOW)
    if side < window:
        raise UniRefinerError(
            f"short_side is {side} and the window {window} pixels: make the side as long, "
            "or the window smaller."
        )
    threshold = settings.background_threshold
    threshold = words.threshold if threshold is None else threshold
    if threshold and words.background is None:
        raise UniRefinerError(
            f"background_threshold is {threshold}, but no class of {words.title} is "
            "background: leave it out, or call a class 'background'."
        )
    return Protocol(
        variant=variant,
        templates=settings.templates,
        window=window,
        stride=settings.window_stride or window // 2,
        side=side,
        scale=settings.text_scale or words.scale,
        threshold=threshold,
        sigma=settings.sigma,
        batch=settings.window_batch,
    )


def read_names(file: str | Path) -> Names:
    """Words of each class from a text file, a line a class, synonyms behind commas.

    Raises:
        LabelError: no such file, no text, an empty line or word, or a word of two
            classes; names the line.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise LabelError(
            f"classes_file {path} cannot be read as text: {problem}"
        ) from None
    names: list[tuple[str, ...]] = []
    owner: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = tuple(" ".join(word.split()) for word in line.split(","))
        if not all(words):
            raise LabelError(
                f"{path.name}, line {number}: a class without a word. Write one class a "
                "line, in the order of the labels, synonyms behind commas."
            )
        for word in words:
            if owner.setdefault(word, number) != number:
                raise LabelError(
                    f"{path.name}: {word!r} stands in lines {owner[word]} and {number}; "
                    "a word can be of one class only."
                )
        names.append(words)
    if not names:
        raise LabelError(f"{path.name} is empty: write one class a line.")
    return tuple(names)


def word_set(
    classes: ClassLabels | None,
    layout: str,
    title: str,
    classes_file: str | None = None,
) -> WordSet:
    """Words of a data set: of `classes_file`, of a known set, or its own class names.

    In a folder, a class called ``background`` is the background.

    Args:
        classes: what the data set says itself; None where only `classes_file` can.

    Raises:
        LabelError: the file has another number of classes than the data set, or the data
            set has no names.
    """
    known = SETS.get(layout)
    names = None if classes_file is None else read_names(classes_file)
    if names is None and known is not None:
        return known
    if names is None:
        assert classes is not None
        if all(name.isdigit() for name in classes.names):
            raise LabelError(
                f"{title} has {len(classes)} classes without names: write them into a "
                "file, one a line, and name it as classes_file."
            )
        names = tuple((name,) for name in classes.names)
    elif classes is not None and len(names) != len(classes):
        raise LabelError(
            f"classes_file has {len(names)} lines, {title} has {len(classes)} classes: "
            "write one class a line, in the order of the labels, background included."
        )
    if known is not None:
        return replace(known, names=names)
    firsts = [words[0].lower() for words in names]
    background = firsts.index("background") if "background" in firsts else None
    return WordSet(title, names, background)


def find_text(
    checkpoints: Sequence[Checkpoint], trust_remote_code: bool = False
) -> TextSide:
    """The text side of the first checkpoint that has one.

    Raises:
        TextSideError: none has; says of each why.
    """
    reasons = []
    for checkpoint in checkpoints:
        if not checkpoint.source:
            continue
        try:
            text = load_text_side(
                checkpoint.source,
                dtype=checkpoint.model.dtype,
                trust_remote_code=trust_remote_code,
            )
        except TextSideError as problem:
            reasons.append(str(problem))
            continue
        return text.to(checkpoint.model.device)
    raise TextSideError(
        "Words need a text tower, and no checkpoint brings one. " + " ".join(reasons)
    )


def text_features(text: TextSide, names: Names, templates: str) -> Tensor:
    """Mean over the templates, normalised before and after.

    Returns:
        ``(words, projection)`` float32, every word of every class in order.
    """
    sentences = TEMPLATES[templates]
    words = [word for group in names for word in group]
    prompts = [sentence.format(word) for word in words for sentence in sentences]
    starts = tqdm(range(0, len(prompts), PROMPTS), desc="words", leave=False)
    encoded = [text.encode(prompts[start : start + PROMPTS]) for start in starts]
    features = functional.normalize(torch.cat(encoded).float(), dim=-1)
    means = features.unflatten(0, (len(words), len(sentences))).mean(dim=1)
    return functional.normalize(means, dim=-1)


def class_probabilities(similarity: Tensor, names: Names, scale: float) -> Tensor:
    """Softmax over all words, then the best word of each class.

    Args:
        similarity: cosines ``(1, words, height, width)``.

    Returns:
        ``(1, classes, height, width)``; does not sum to 1 where there are synonyms.
    """
    probability = (similarity * scale).softmax(dim=1)
    if probability.shape[1] == len(names):
        return probability
    groups = probability.split([len(words) for words in names], dim=1)
    return torch.cat([group.amax(dim=1, keepdim=True) for group in groups], dim=1)


def predicted(probability: Tensor, threshold: float, background: int | None) -> Tensor:
    """Most probable class ``(height, width)``; `background` below the threshold.

    Args:
        probability: ``(1, classes, height, width)``.
    """
    best, prediction = probability[0].max(dim=0)
    if background is not None and threshold > 0:
        prediction[best < threshold] = background
    return prediction


@torch.no_grad()
def similarity_map(
    checkpoint: Checkpoint,
    image: Image.Image,
    words: Tensor,
    projection: nn.Module | None,
    protocol: Protocol,
) -> Tensor:
    """Cosines of every pixel of the resized image with every word.

    Windows overlap; cosines are averaged there.

    Args:
        words: ``(words, projection)``, normalised.

    Returns:
        ``(1, words, height, width)`` on the CPU.
    """
    ratio = protocol.side / min(image.size)
    width, height = (max(protocol.side, round(ratio * side)) for side in image.size)
    pixels = checkpoint.reading(image, (height, width))

    def score(windows: Tensor) -> list[Tensor]:
        patches = dense_text_features(
            checkpoint.model,
            windows,
            variant=protocol.variant,
            projection=projection,
            register_width=checkpoint.register_width,
            sigma=protocol.sigma,
        )
        cosines = functional.normalize(patches.float(), dim=-1) @ words.T
        side = protocol.window // checkpoint.patch_size
        return [cosines.transpose(1, 2).unflatten(2, (side, side))]

    (scores,) = slide(
        pixels,
        protocol.window,
        protocol.stride,
        protocol.batch,
        score,
        checkpoint.model.device,
    )
    return scores


def evaluate_zero_shot(
    checkpoint: Checkpoint,
    val: LabelledImages,
    classes: ClassLabels,
    words: WordSet,
    text: TextSide,
    features: Tensor,
    protocol: Protocol,
    *,
    pictures: int = 4,
) -> SegmentationResult:
    """Measure a tower; nothing is trained, and nothing is done to the prediction.

    On several processes each takes its share of the images; every one returns the whole
    result.

    Args:
        features: of the words, see `text_features`.

    Raises:
        LabelError: see `ClassLabels.read`.
        UniRefinerError: every label is ignored.
    """
    validation = Validation(len(classes), pictures)
    mine, count = processes()
    title = f"zero-shot, {checkpoint.name}"
    numbers = range(mine, len(val), count)
    for number in tqdm(numbers, desc=title, leave=False, disable=mine > 0):
        image, values = val.pair(number)
        label = classes.read(values, val.names[number])
        similarity = similarity_map(
            checkpoint, image, features, text.projection, protocol
        )
        similarity = resized(similarity, label.shape)
        probability = class_probabilities(similarity, words.names, protocol.scale)
        prediction = predicted(probability, protocol.threshold, words.background)
        validation.count(number, prediction, label)
    return SegmentationResult.of([validation.finish()])
