"""Train a UperNet head on a refined tower, the way a segmentation team would start.

    python examples/segmentation_backbone.py demo_out/merged [STEPS]
    python examples/segmentation_backbone.py user/name-unirefined [STEPS]

Replace `batches` by your own loader of normalised images and label maps. The tower stays
frozen; only the head learns.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from unirefiner_hf import UniRefinerBackbone

NUM_LABELS = 3
SIZE = 224  # a multiple of the patch size


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stand-in data: the label of a pixel is its brightest channel."""
    for _ in range(count):
        coarse = torch.randn(2, 3, 8, 8)
        images = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
        yield images, images.argmax(dim=1)


def main(checkpoint: str, steps: int = 10) -> None:
    layers = UniRefinerBackbone.from_pretrained(checkpoint).config.num_hidden_layers
    depths = sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3, 4)})
    stages = [f"stage{depth}" for depth in depths]
    backbone = UniRefinerBackbone.from_pretrained(checkpoint, out_features=stages)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=128,
        num_labels=NUM_LABELS,
        use_auxiliary_head=False,
    )
    segmenter = UperNetForSemanticSegmentation(config)
    segmenter.backbone = backbone.requires_grad_(False).eval()
    head = [p for p in segmenter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(head, lr=1e-3)
    for step, (images, labels) in enumerate(batches(steps), start=1):
        outputs = segmenter(pixel_values=images, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (outputs.logits.argmax(dim=1) == labels).float().mean()
        print(f"step {step}: loss {outputs.loss.item():.3f}, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
