"""Compare every block of the method with numbers of the authors' implementation.

``python -m tests.golden.check FILE`` prints one line a block with its largest error
and exits 1 when one is above 1e-4. Blocks, sigmas, thresholds, layers and frame
widths are read from the tensors' names, so any file of the layout can be checked.
A mask that differs anywhere has error 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from unirefiner_hf.methods import losses, views
from unirefiner_hf.modeling.registers import frame_pixels, register_mask
from unirefiner_hf.spurious.attention_flow import attention_inflow, read_by_others
from unirefiner_hf.spurious.detectors import undetected
from unirefiner_hf.spurious.lazy_channels import find_lazy_channels
from unirefiner_hf.spurious.similarity import dissimilar, highest_cosine

REFERENCE = Path(__file__).with_name("reference.safetensors")
TOLERANCE = 1e-4

Errors = Iterator[tuple[str, float]]


class GoldenFile:
    """The tensors and metadata of one golden file."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
            self.metadata = file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def matching(self, pattern: str) -> Iterator[tuple[re.Match[str], Tensor]]:
        """Tensors whose whole name matches, with the match."""
        for name, tensor in self.tensors.items():
            if match := re.fullmatch(pattern, name):
                yield match, tensor


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite when shapes differ or a value is NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = (ours.detach().double() - theirs.double()).abs().max().item()
    return error if error == error else float("inf")


def check_registers(golden: GoldenFile) -> Errors:
    image = golden["registers.image"]
    for match, padded in golden.matching(r"registers\.r(\d+)\.padded"):
        width = int(match[1])
        patch = (padded.shape[-1] - image.shape[-1]) // (2 * width)
        yield match[0], difference(frame_pixels(image, width, patch, "zero"), padded)
        expected = golden[f"registers.r{width}.mask"]
        grid = (image.shape[-2] // patch, image.shape[-1] // patch)
        mask = register_mask(grid, width).expand_as(expected)
        yield f"registers.r{width}.mask", difference(mask, expected)


def check_roi(golden: GoldenFile) -> Errors:
    boxes, tokens, pixels = (golden[f"roi.{k}"] for k in ("boxes", "tokens", "pixels"))
    rows = round((tokens.shape[1] * pixels.shape[2] / pixels.shape[3]) ** 0.5)
    ours = views.crop_tokens(tokens, (rows, tokens.shape[1] // rows), boxes)
    yield "roi.out", difference(ours, golden["roi.out"])
    ours = views.crop_maps(pixels, boxes, tuple(pixels.shape[-2:]))
    yield "roi.pixels_out", difference(ours, golden["roi.pixels_out"])


def check_fpgp(golden: GoldenFile) -> Errors:
    scores = highest_cosine(golden["fpgp.foreground"], golden["fpgp.comparison"])
    for match, clean in golden.matching(r"fpgp\.clean_sigma([\d.]+)"):
        yield match[0], difference(dissimilar(scores, float(match[1])), clean)
    for match, clean in golden.matching(r"fpgp\.clean_cos([\d.]+)"):
        yield match[0], difference(dissimilar(scores, cosine=float(match[1])), clean)


def check_adaptive(golden: GoldenFile) -> Errors:
    tokens, registers = golden["adaptive.tokens"], golden["adaptive.registers"]
    for match, clean in golden.matching(r"adaptive\.clean_([\d.]+)"):
        ours = undetected(tokens, registers, float(match[1]))
        yield match[0], difference(ours, clean)


def check_ah(golden: GoldenFile) -> Errors:
    foreground = golden["ah.foreground"]

    def select(tokens: Tensor) -> Tensor:
        return tokens[foreground].view(len(foreground), -1, tokens.shape[-1])

    layers = [int(match[1]) for match, _ in golden.matching(r"ah\.q(\d+)")]
    flow = [(select(golden[f"ah.q{n}"]), select(golden[f"ah.k{n}"])) for n in layers]
    for match, clean in golden.matching(r"ah\.clean_sigma([\d.]+?)(_norejected)?"):
        rejected = golden["ah.rejected"]
        if match[2]:
            rejected = torch.zeros_like(rejected)
        inflow = attention_inflow(flow, rejected)
        ours = read_by_others(inflow, rejected, float(match[1])) & ~rejected
        yield match[0], difference(ours, clean)


def check_loss(golden: GoldenFile) -> Errors:
    target, teacher, spurious, clean = (
        golden[f"loss.in.{k}"] for k in ("target", "teacher_full", "spurious", "clean")
    )
    for match, total in golden.matching(r"loss\.u([\d.]+)\.total"):
        name = f"loss.u{match[1]}"
        raw = [
            golden[f"loss.in.{k}"].clone().requires_grad_()
            for k in ("crop", "reg", "full")
        ]
        crop, registers, image = (functional.normalize(x, dim=-1) for x in raw)
        theta = losses.unrelated_similarity(target, clean)
        regu = losses.refinement_loss(
            crop, target, teacher, clean, theta, uniformity=float(match[1])
        )
        uniformity = losses.register_uniformity_loss(image, registers)
        absorption = losses.absorption_loss(registers, spurious, crop, teacher, theta)
        loss = regu + uniformity + 0.1 * absorption
        loss.backward()
        alignment = (crop * target).sum(dim=-1)[clean].mean()
        yield f"{name}.alignment", difference(alignment, golden[f"{name}.alignment"])
        expected = golden[f"{name}.refinement"]
        yield f"{name}.refinement", difference(regu + uniformity, expected)
        expected = golden[f"{name}.register_uniformity"]
        yield f"{name}.register_uniformity", difference(uniformity, expected)
        yield f"{name}.absorption", difference(absorption, golden[f"{name}.absorption"])
        yield f"{name}.total", difference(loss, total)
        for key, tensor in zip(("crop", "reg", "full"), raw, strict=True):
            assert tensor.grad is not None
            expected = golden[f"{name}.grad.{key}"]
            yield f"{name}.grad.{key}", difference(tensor.grad, expected)


def check_scd(golden: GoldenFile) -> Errors:
    raw = golden["loss.in.crop"].clone().requires_grad_()
    crop = functional.normalize(raw, dim=-1)
    loss = losses.correlation_loss(crop, golden["scd.target"])
    loss.backward()
    assert raw.grad is not None
    yield "scd.value", difference(loss, golden["scd.value"])
    yield "scd.grad.crop", difference(raw.grad, golden["scd.grad.crop"])


def check_lazy(golden: GoldenFile) -> Errors:
    found = find_lazy_channels(golden["lazy.bank"])
    expected = json.loads(golden.metadata["lazy.masked_channels"])
    yield "lazy.masked_channels", float(found.channels != expected)
    cosine = float(golden.metadata["lazy.final_neg_mean"])
    yield "lazy.final_neg_mean", abs(found.unrelated_cosine[-1] - cosine)


CHECKS: dict[str, Callable[[GoldenFile], Errors]] = {
    "registers": check_registers,
    "roi": check_roi,
    "fpgp": check_fpgp,
    "adaptive": check_adaptive,
    "ah": check_ah,
    "loss": check_loss,
    "scd": check_scd,
    "lazy": check_lazy,
}


def largest_errors(path: Path) -> dict[str, tuple[float, str, int]]:
    """Largest error, the value it is in, and how many values were compared, by block.

    Raises:
        ValueError: the file lacks a block, or a block holds nothing to compare.
    """
    golden = GoldenFile(path)
    result = {}
    for block, check in CHECKS.items():
        try:
            errors = list(check(golden))
        except KeyError as missing:
            raise ValueError(f"{path.name}: block {block!r} lacks {missing}.") from None
        if not errors:
            raise ValueError(f"{path.name}: block {block!r} has nothing to compare.")
        name, error = max(errors, key=lambda item: item[1])
        result[block] = (error, name, len(errors))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.check", description=__doc__
    )
    parser.add_argument("file", type=Path, nargs="?", default=REFERENCE)
    file = parser.parse_args(argv).file
    try:
        errors = largest_errors(file)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    for block, (error, name, count) in errors.items():
        verdict = "ok" if error <= TOLERANCE else "FAIL"
        print(f"{verdict:4} {block:10} {error:.2e}  worst of {count}: {name}")
    return int(any(error > TOLERANCE for error, _, _ in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
