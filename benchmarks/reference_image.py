"""Which reference image finds most spurious tokens, where the truth is known.

    python -m benchmarks.reference_image --adapter PLANTED

PLANTED is a LoRA adapter that plants spurious tokens into the starter tower by a rule on the
pixels: the busiest 30 % of the patches become global proxies, the flattest 12 % fixed patterns
(rank by the standard deviation of a patch's normalised pixels). Every candidate is tried as
reference for the other photographs, 224 px; printed is the F1 of the two FP-GP passes against
the rule.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from peft import PeftModel
from PIL import Image, ImageOps
from torch import Tensor

from unirefiner_hf.images import default_reference, preprocess
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import load_tower
from unirefiner_hf.spurious.diagnose import diagnose
from unirefiner_hf.starter import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    starter_tower,
    whole_photographs,
)

SIZE, PATCH = 224, 14


def pixels_of(image: Image.Image) -> Tensor:
    """The central square, normalised, ``(1, 3, SIZE, SIZE)``."""
    side = min(image.size)
    square = ImageOps.fit(image, (side, side))
    return preprocess(square, (SIZE, SIZE), IMAGENET_MEAN, IMAGENET_STD).unsqueeze(0)


def noise(scales: tuple[int, ...]) -> Tensor:
    """Uniform noise at several scales, ``(1, 3, SIZE, SIZE)``."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, SIZE, SIZE)
    for scale in scales:
        small = torch.rand(1, 3, scale, scale, generator=generator) - 0.5
        large = torch.nn.functional.interpolate(small, SIZE, mode="bicubic")
        total = total + large / scale**0.5
    return total / total.std()


def planted(pixels: Tensor) -> Tensor:
    """Where the rule plants a spurious token, ``(patches,)`` bool."""
    patches = pixels[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    spread = patches.permute(1, 2, 0, 3, 4).flatten(2).std(dim=-1).flatten()
    rank = spread.argsort().argsort() / (spread.numel() - 1)
    return (rank >= 0.70) | (rank < 0.12)


def f1(found: Tensor, truth: Tensor) -> float:
    return (2 * (found & truth).sum() / (found.sum() + truth.sum())).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapter", required=True, help="folder of the planted adapter"
    )
    adapter = parser.parse_args().adapter
    tower = load_tower(str(starter_tower()))
    tower = PeftModel.from_pretrained(tower, adapter).merge_and_unload().eval()
    model = UniRefinerModel.from_tower(tower, register_width=0)
    photographs = {name: pixels_of(p) for name, p in whole_photographs().items()}
    candidates = {
        "default_reference": pixels_of(default_reference()),
        "noise at six scales": noise((4, 8, 16, 32, 64, 128)),
        "noise at pixel scale": noise((SIZE,)),
        "grey": torch.zeros(1, 3, SIZE, SIZE),
        **photographs,
    }
    for name, reference in candidates.items():
        scores = [
            f1(diagnose(model, pixels, reference).fpgp[0], planted(pixels))
            for other, pixels in photographs.items()
            if other != name
        ]
        print(
            f"{name:22} F1 {statistics.mean(scores):.3f} over {len(scores)} photographs"
        )


if __name__ == "__main__":
    main()
