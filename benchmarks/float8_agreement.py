"""How far float8 passes without gradient change the filters and the losses.

    python -m benchmarks.float8_agreement

The starter tower (a DINOv2-small with its published weights) on the photographs that come from
PyPI packages; the same views and draws for every reading. Printed are the share of crop tokens
on which the clean mask agrees with that of float32 passes, and the mean change of each loss
and its size; beside float8, bfloat16 passes, which everyone trains with. On a CPU the float8 values
are those of the GPU, their products summed in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unirefiner_hf.data.images import default_reference
from unirefiner_hf.data.pixels import PixelReading
from unirefiner_hf.loading.float8 import use_float8
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.loading.starter import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    starter_tower,
    whole_photographs,
)
from unirefiner_hf.methods.unirefiner.objective import UniRefiner
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.towers import load_tower

TERMS = UniRefiner.LOSS_TERMS
READINGS = ("float32", "bfloat16", "float8")


class Watched(UniRefiner):
    """Keeps the clean mask of the last step; passes without gradient in `reading`."""

    reading = "float32"
    mask: Tensor

    def _filter(self, *args: Any) -> Any:
        found = super()._filter(*args)
        self.mask = found[0]
        return found

    @contextmanager
    def without_gradient(self) -> Iterator[None]:
        mixed = self.reading == "bfloat16"
        with super().without_gradient():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                yield


def build(reading: str, layers: list[int], size: int) -> Watched:
    """The starter tower with an adapter off its neutral start."""
    tower = load_tower(str(starter_tower()))
    if reading == "float8":
        use_float8(tower)
    model = UniRefinerModel.from_tower(tower)
    torch.manual_seed(0)
    model.tower = add_adapter(tower, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    objective = Watched(model, UniRefinerSettings(ah_layers=layers), pixels_of(size))
    objective.reading = reading
    return objective.train()


def pixels_of(size: int, image: Any = None) -> Tensor:
    image = default_reference() if image is None else image
    reading = PixelReading(IMAGENET_MEAN, IMAGENET_STD)
    return reading(image, (size, size)).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--steps", type=int, default=2, help="draws of the views")
    parser.add_argument("--images", type=int, default=3, help="photographs")
    options = parser.parse_args()
    size = options.size
    images = [pixels_of(size, image) for image in whole_photographs().values()]
    pixels = torch.cat(images[: options.images])
    readings = {name: build(name, [5, 6], size) for name in READINGS}
    agreed = {name: 0.0 for name in READINGS}
    change = {name: dict.fromkeys(TERMS, 0.0) for name in READINGS}
    size_of = dict.fromkeys(TERMS, 0.0)
    for number in range(options.steps):
        found = {}
        for name, objective in readings.items():
            torch.manual_seed(number)
            out = objective(pixels, 1.0)
            terms = {term: out[term].item() for term in TERMS}
            found[name] = terms, objective.mask
        exact, mask = found["float32"]
        for term in TERMS:
            size_of[term] += abs(exact[term]) / options.steps
        for name, (out, other) in found.items():
            agreed[name] += (mask == other).float().mean().item() / options.steps
            for term in TERMS:
                off = abs(out[term] - exact[term])
                change[name][term] += off / options.steps
    for name in READINGS[1:]:
        shown = ", ".join(
            f"{term} {off:.4f} of {size_of[term]:.2f}"
            for term, off in change[name].items()
        )
        print(f"{name:9} clean masks agree on {agreed[name]:.4f}; changes: {shown}")


if __name__ == "__main__":
    main()
