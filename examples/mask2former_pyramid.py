"""Train a Mask2Former head on a refined tower, save it, reload it and predict.

    python examples/mask2former_pyramid.py demo_out/merged head/ [DATA [STEPS]]

DATA holds ``images/`` and, under the same names as PNG, ``labels/`` with a class index in
every pixel (255: none). Without it, or as ``""``,
discs and squares are drawn. A simple feature pyramid
gives the head maps finer than the patches. The tower stays frozen; head and pyramid learn.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from unirefiner_hf import UniRefinerPyramid, load_rgb

SIZE = 224  # a multiple of the patch size
BATCH = 2
# Of the tower's image processor.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def drawn(index: int) -> tuple[Tensor, Tensor]:
    """A disc (1) or a square (2) on noise (0)."""
    generator = torch.Generator().manual_seed(index)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    row, column = torch.randint(60, SIZE - 60, (2,), generator=generator)
    square = index % 2 == 1
    far = (y - row).abs().maximum((x - column).abs())
    inside = far < 45 if square else (y - row) ** 2 + (x - column) ** 2 < 45**2
    image = torch.randn(3, SIZE, SIZE, generator=generator) + 2.0 * inside
    return image, inside.long() * (2 if square else 1)


def read(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Images, normalised, and label maps of a folder."""
    pairs = []
    for file in sorted((folder / "images").iterdir()):
        image = load_rgb(file).resize((SIZE, SIZE))
        label = Image.open(folder / "labels" / f"{file.stem}.png")
        label = label.resize((SIZE, SIZE), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
        pixels = (pixels - MEAN) / STD
        pairs.append((pixels, torch.from_numpy(numpy.array(label)).long()))
    return pairs


def batches(pairs: list[tuple[Tensor, Tensor]], count: int) -> Iterator[dict]:
    """Random batches: each image with one mask for every class in it."""
    for _ in range(count):
        chosen = [pairs[int(i)] for i in torch.randint(len(pairs), (BATCH,))]
        classes = [label[label != 255].unique() for _, label in chosen]
        masks = [
            (label == kinds[:, None, None]).float()
            for (_, label), kinds in zip(chosen, classes)
        ]
        images = torch.stack([image for image, _ in chosen])
        yield {"pixel_values": images, "mask_labels": masks, "class_labels": classes}


def predict(model: Mask2FormerForUniversalSegmentation, images: Tensor) -> Tensor:
    """The class of every pixel, ``(batch, height, width)``."""
    with torch.no_grad():
        output = model(images)
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    masks = output.masks_queries_logits.sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", classes, masks)
    return functional.interpolate(scores, images.shape[-2:], mode="bilinear").argmax(1)


def main(checkpoint: str, output: str, data: str = "", steps: int = 20) -> None:
    pairs = read(Path(data)) if data else [drawn(index) for index in range(16)]
    labels = max(int(label[label != 255].max()) for _, label in pairs) + 1
    pyramid = UniRefinerPyramid.from_refined(checkpoint, pyramid_size=128)
    pyramid.refined.requires_grad_(False)
    config = Mask2FormerConfig(
        backbone_config=pyramid.config,
        num_labels=labels,
        feature_size=128,
        mask_feature_size=128,
        hidden_dim=128,
        encoder_layers=2,
        decoder_layers=4,
        num_queries=20,
        train_num_points=2048,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = pyramid
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=3e-4)
    model.train()
    pyramid.refined.eval()
    for step, batch in enumerate(batches(pairs, steps), start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.2f}")
    model.eval().save_pretrained(output)

    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(output)
    images = torch.stack([image for image, _ in pairs[:BATCH]])
    truth = torch.stack([label for _, label in pairs[:BATCH]])
    predicted, again = predict(model, images), predict(loaded, images)
    agreed = (predicted == again).float().mean()
    right = (again == truth)[truth != 255].float().mean()
    print(f"reloaded: {agreed:.1%} of pixels as before saving; {right:.1%} right")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
