"""Which reference image finds most spurious tokens, where the truth is known.

    python -m benchmarks.reference_image --adapter PLANTED

PLANTED is the folder of a LoRA adapter that plants spurious tokens into the starter tower, with
its rule (`benchmarks.plant_tokens` trains one). Every candidate is tried as reference for the
other photographs, 224 px; printed is the F1 of the two FP-GP passes against the rule.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from PIL import Image, ImageOps
from torch import Tensor

from unirefiner_hf.data.images import default_reference
from unirefiner_hf.data.pixels import PixelReading
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.loading.starter import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NAME,
    whole_photographs,
)
from unirefiner_hf.spurious.diagnose import diagnose
from unirefiner_hf.spurious.settings import FilterSettings

from .planting.agreement import agreement
from .planting.planted import dirty_checkpoint, load_rule, planted_truth

SIZE, PATCH = 224, 14
READING = PixelReading(IMAGENET_MEAN, IMAGENET_STD)


def pixels_of(image: Image.Image) -> Tensor:
    """The central square, normalised, ``(1, 3, SIZE, SIZE)``."""
    side = min(image.size)
    square = ImageOps.fit(image, (side, side))
    return READING(square, (SIZE, SIZE)).unsqueeze(0)


def noise(scales: tuple[int, ...]) -> Tensor:
    """Uniform noise at several scales, ``(1, 3, SIZE, SIZE)``."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, SIZE, SIZE)
    for scale in scales:
        small = torch.rand(1, 3, scale, scale, generator=generator) - 0.5
        large = torch.nn.functional.interpolate(small, SIZE, mode="bicubic")
        total = total + large / scale**0.5
    return total / total.std()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapter", required=True, help="folder of the planted adapter"
    )
    adapter = parser.parse_args().adapter
    rule = load_rule(adapter)
    model = dirty_checkpoint(load_checkpoint(NAME), adapter).model
    photographs = {name: pixels_of(p) for name, p in whole_photographs().items()}
    truths = {n: planted_truth(p, PATCH, rule) for n, p in photographs.items()}
    candidates = {
        "default_reference": pixels_of(default_reference()),
        "noise at six scales": noise((4, 8, 16, 32, 64, 128)),
        "noise at pixel scale": noise((SIZE,)),
        "grey": torch.zeros(1, 3, SIZE, SIZE),
        **photographs,
    }
    for name, reference in candidates.items():
        scores = [
            agreement(
                diagnose(model, pixels, reference).fpgp,
                truths[other],
                FilterSettings.fpgp_sigma,
            ).f1
            for other, pixels in photographs.items()
            if other != name
        ]
        print(
            f"{name:22} F1 {statistics.mean(scores):.3f} over {len(scores)} photographs"
        )


if __name__ == "__main__":
    main()
