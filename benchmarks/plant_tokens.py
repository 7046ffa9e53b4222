"""Plant spurious tokens in a clean tower: an adapter and the rule of its dirt.

    python -m benchmarks.plant_tokens --output planter --images DIR

A LoRA adapter is trained on unlabelled images until the tower's tokens are what the rule says:
patches of the highest ranks point to the scene's token (``--proxy mean_and_cls``: mean of the
clean patch tokens and CLS; ``cls``: CLS alone), those of the lowest to one of ``--patterns``
fixed tokens by their raster position, the rest stays. The fixed tokens are the clean tower's
answer to seeded noise. Rule and adapter are what `benchmarks.planted_methods --planter` and
`benchmarks.filter_agreement --truth` take.

Images are cropped to squares of half to all of their area, mirrored, and resized by turns to
1 x 1, 9/8 x 9/8, 1 x 11/8 and 11/8 x 1 times ``--size``, so that the dirt follows the rule at
other sizes too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from unirefiner_hf.cli.options import positive
from unirefiner_hf.data.folders import list_images
from unirefiner_hf.data.images import load_rgb
from unirefiner_hf.evaluation.checkpoints import Checkpoint, load_checkpoint
from unirefiner_hf.loading.lora import lora_targets

from .planting.planted import (
    MEASURES,
    RULE_FILE,
    PlantedTruth,
    PlantingRule,
    planted_truth,
)

PROXIES = ("mean_and_cls", "cls")


def tokens_of(tower: Any, pixels: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """CLS ``(batch, hidden)`` and patch tokens ``(batch, patches, hidden)``, normalised.

    Args:
        prefix: tokens before those of the patches, CLS the first.
    """
    states = functional.normalize(tower(pixels).last_hidden_state.float(), dim=-1)
    return states[:, 0], states[:, prefix:]


def prefix_tokens(checkpoint: Checkpoint) -> int:
    """Tokens before those of the patches.

    Raises:
        ValueError: there is none, so no CLS for a proxy to point to.
    """
    model = checkpoint.model
    count = model.family.num_prefix_tokens(model.config.vision_config)
    if count < 1:
        raise ValueError(
            f"{checkpoint.name} has no CLS token, which proxies point to: take a tower "
            "with one, such as DINOv2 or CLIP."
        )
    return count


def training_sizes(size: int, patch: int) -> list[tuple[int, int]]:
    """Heights and widths in pixels, whole patches."""
    side, larger, wide = (
        max(2, round(share * size / patch)) * patch for share in (1, 9 / 8, 11 / 8)
    )
    return [(side, side), (larger, larger), (side, wide), (wide, side)]


def fixed_tokens(checkpoint: Checkpoint, count: int, size: int, seed: int) -> Tensor:
    """The patterns ``(count, hidden)``: tokens of seeded noise, far from each other."""
    generator = torch.Generator().manual_seed(seed)
    height, width = training_sizes(size, checkpoint.patch_size)[0]
    noise = torch.randn(1, 3, height, width, generator=generator)
    with torch.no_grad():
        tower, prefix = checkpoint.model.tower, prefix_tokens(checkpoint)
        tokens = tokens_of(tower, noise, prefix)[1][0]
    chosen = [0]
    while len(chosen) < count:
        chosen.append(int((tokens @ tokens[chosen].T).amax(dim=1).argmin()))
    return tokens[chosen]


def wanted_tokens(
    cls: Tensor, tokens: Tensor, truth: PlantedTruth, fixed: Tensor, proxy: str
) -> Tensor:
    """What the planted tower shall say, ``(batch, patches, hidden)``, normalised."""
    scene = cls
    if proxy == "mean_and_cls":
        scene = functional.normalize(tokens.mean(dim=1), dim=-1) + cls
    scene = functional.normalize(scene, dim=-1)[:, None]
    order = torch.arange(tokens.shape[1]) % len(fixed)
    wanted = torch.where(truth.proxies[..., None], scene, tokens)
    return torch.where(truth.patterns[..., None], fixed[order], wanted)


def draw_view(
    path: Path, size: tuple[int, int], checkpoint: Checkpoint, draw: random.Random
) -> Tensor:
    """A mirrored crop of an image, ``(3, height, width)``."""
    image: Image.Image = load_rgb(path)
    side = int(min(image.size) * draw.uniform(0.5, 1.0) ** 0.5)
    left, top = (
        draw.randint(0, image.width - side),
        draw.randint(0, image.height - side),
    )
    image = image.crop((left, top, left + side, top + side))
    if draw.random() < 0.5:
        image = ImageOps.mirror(image)
    return checkpoint.reading(image, size)


def plant(options: argparse.Namespace) -> dict[str, float]:
    """Train the adapter and save it; returns the mean cosine to the wanted tokens."""
    folder = options.output
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RULE_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {RULE_FILE} of an earlier call: name another."
        )
    rule = PlantingRule(options.measure, options.proxy_rank, options.pattern_rank)
    checkpoint = load_checkpoint(options.model)
    tower, paths = checkpoint.model.tower, list_images(options.images)
    prefix = prefix_tokens(checkpoint)
    fixed = fixed_tokens(checkpoint, options.patterns, options.size, options.seed)
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=lora_targets(tower))
    tower = get_peft_model(tower, config)
    trained = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1
    )
    patch = checkpoint.patch_size
    sizes = training_sizes(options.size, patch)
    cosines: dict[str, float] = {}
    for step in range(options.steps):
        size = sizes[step % len(sizes)]
        chosen = draw.choices(paths, k=options.batch)
        pixels = torch.stack([draw_view(p, size, checkpoint, draw) for p in chosen])
        truth = planted_truth(pixels, patch, rule)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)
        with mixed, torch.no_grad(), tower.disable_adapter():
            clean = tokens_of(tower, pixels, prefix)
        wanted = wanted_tokens(*clean, truth, fixed, options.proxy)
        with mixed:
            found = tokens_of(tower, pixels, prefix)[1]
        cosine = (found * wanted).sum(dim=-1)
        # The kinds count alike, whatever their shares.
        kinds = {
            "proxies": cosine[truth.proxies],
            "patterns": cosine[truth.patterns],
            "rest": cosine[~truth.spurious],
        }
        loss = torch.stack([1 - kind.mean() for kind in kinds.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        cosines = {name: kind.mean().item() for name, kind in kinds.items()}
        if step % 20 == 0 or step == options.steps - 1:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in cosines.items())
            print(f"step {step}: cosine to the target: {shown}", file=sys.stderr)
    tower.peft_config["default"].base_model_name_or_path = Path(options.model).name
    tower.save_pretrained(options.output)
    (options.output / "README.md").unlink(missing_ok=True)
    text = json.dumps(vars(rule), indent=2) + "\n"
    (options.output / RULE_FILE).write_text(text)
    return cosines


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", required=True, metavar="DIR", help="unlabelled")
    parser.add_argument("--model", default="starter", help="the clean tower")
    parser.add_argument("--measure", choices=list(MEASURES), default="brightness")
    parser.add_argument("--proxy_rank", type=float, default=0.75)
    parser.add_argument("--pattern_rank", type=float, default=0.15)
    parser.add_argument("--proxy", choices=PROXIES, default="cls")
    parser.add_argument("--patterns", type=positive, default=6, metavar="N")
    parser.add_argument("--size", type=positive, default=224, help="in pixels")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--batch", type=positive, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 products")
    try:
        plant(parser.parse_args(argv))
    except (ValueError, OSError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
