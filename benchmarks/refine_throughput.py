"""Images a second, utilisation and memory of real refinement steps.

    python -m benchmarks.refine_throughput --config siglip2/so400m-patch16-512
    python -m benchmarks.refine_throughput --config dinov2/small --steps 2 \
        --per_device_train_batch_size 2

Takes any recipe and its overrides, as `unirefiner refine` does; the images are noise, and the
weights are random, which does not change speed. Towers of `benchmarks.shapes` need no network,
others their config. A step is what the Trainer makes of one: forward under mixed precision,
backward, clipping, AdamW. Reading and decoding of images are not in it: on a GPU they run in
`--dataloader_num_workers` processes beside the step (see RESULTS.md for the rate they need).

Arithmetic. Per image and step the method passes through the tower 3 composites and 1 full
image (teacher), 3 framed crops (relation pass), and 1 framed image with gradient; backward
through frozen weights costs about one forward more, recomputation another. For EVA-CLIP-8B at
448 px (7.5 G parameters; 1024 patches, 1408 with a strip, 1600 with a frame of 4) this is about
2 x 7.5e9 x (3 x 1409 + 1025 + 3 x 1601 + 3 x 1157) tokens = 203 TFLOP, with attention about
215; for SigLIP2-So400m at 512 px about 13 to 14. 5,000 images twice are then 2.1e18 and 1.3e17
floating point operations. One H200 does about 790 TFLOP/s in large bfloat16 products; half of
that gives 90 minutes and under 6 minutes, which is the goal. `unirefiner estimate` counts the
same exactly, from the config.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from benchmarks.shapes import SHAPES
from benchmarks.step_time import matrix_rate
from unirefiner_hf.errors import UniRefinerError
from unirefiner_hf.estimation.devices import GPUS
from unirefiner_hf.estimation.dry_run import dry_step
from unirefiner_hf.loading.arguments import fewest_sides
from unirefiner_hf.loading.backbone import image_size, takes_final_norm
from unirefiner_hf.loading.float8 import use_float8
from unirefiner_hf.methods.base import backbone_arguments, check_arguments
from unirefiner_hf.methods.objective import LOSSES, Surroundings
from unirefiner_hf.modeling.families import DUAL_ENCODERS
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.training.compiled import compile_layers
from unirefiner_hf.training.recipe import Recipe, recipe_of_words

IMAGES, EPOCHS = 5000, 2


def random_tower(recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The tower the recipe names, its weights random, on the default device."""
    args, name = recipe.args, str(recipe.model)
    if args.base_quantization is not None:
        raise UniRefinerError(
            f"base_quantization is {args.base_quantization!r}, and random weights are not "
            "quantised here: leave it out."
        )
    config = SHAPES.get(name)
    if config is None:
        config = AutoConfig.from_pretrained(name, revision=args.revision)
        if config.model_type in DUAL_ENCODERS:
            config = config.vision_config
    return AutoModel.from_config(
        config, dtype=dtype, attn_implementation=args.attn_implementation
    )


def trainable(recipe: Recipe, mixed: bool, float8: bool) -> UniRefinerModel:
    """The register model on the default device, made trainable by the method."""
    settings, args = recipe.method, backbone_arguments(recipe.args)
    objective, norm = settings.objective(), args.final_norm
    tower = random_tower(recipe, objective.base_dtype(args, mixed))
    model = UniRefinerModel.from_tower(
        tower,
        register_fill=args.register_fill,
        final_norm=takes_final_norm(tower.config) if norm is None else norm,
        num_register_tokens=settings.num_register_tokens,
    )
    if float8:
        use_float8(tower)
    objective.attach(model, settings, args, str(recipe.model))
    return model


def measure(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, time the steps."""
    args, settings = recipe.args, recipe.method
    check_arguments(args, settings)
    mixed = bool(args.bf16)
    batch = args.per_device_train_batch_size
    checkpointing = bool(args.gradient_checkpointing)
    with torch.device("meta"):
        model = trainable(recipe, mixed, float8=False)
    size = image_size(args.image_size, model.config.vision_config, model.patch_size)
    cost = dry_step(
        model,
        settings,
        image_size=size,
        batch=batch,
        register_factor=args.register_factor,
        autocast=torch.bfloat16 if mixed else None,
        as_on_gpu=options.device == "cuda",
        checkpointing=checkpointing,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = trainable(recipe, mixed, bool(args.teacher_float8))
    given = Surroundings(torch.randn(1, 3, *size), args.register_factor, torch.ones(3))
    objective = settings.objective().build(model, settings, given)
    objective.to(options.device).train()
    if checkpointing:
        objective.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if args.compile_layers:
        compile_layers(model)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels = torch.randn(batch, 3, *size, device=options.device)

    def step() -> None:
        autocast = torch.autocast(options.device, torch.bfloat16)
        with autocast if mixed else nullcontext():
            loss = objective(pixels, 1.0)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(options.warmup):
        step()
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[len(seconds) // 2]
    kind = torch.bfloat16 if mixed else torch.float32
    product = matrix_rate(
        options.device, kind, 8192 if options.device == "cuda" else 1024
    )
    rate = cost.total_flops / median
    passes = sum(
        sum(count.values()) for part, count in cost.flops.items() if part != LOSSES
    )
    return {
        "model": recipe.model,
        "image_size": fewest_sides(size),
        "batch": batch,
        "precision": "bf16" if mixed else "float32",
        "checkpointing": checkpointing,
        "compiled": args.compile_layers,
        "seconds_a_step": median,
        "images_a_second": batch / median,
        "tflop_an_image": cost.total_flops / batch / 1e12,
        "of_it_in_the_tower": passes / cost.total_flops,
        "tflops": rate / 1e12,
        "share_of_large_products": rate / (product * 1e9),
        **_published(options.device, rate, kind),
        **_peak(options.device),
        "estimated_peak_gb": (cost.peak_bytes + 8 * cost.trainable) / 1e9,
        "minutes_for_5000_images_twice": IMAGES * EPOCHS / batch * median / 60,
    }


def _published(device: str, rate: float, kind: torch.dtype) -> dict[str, float]:
    """Model FLOPs utilisation of a GPU of the table."""
    if device != "cuda":
        return {}
    name = torch.cuda.get_device_name().lower()
    found = [gpu for key, gpu in GPUS.items() if key in name.replace(" ", "-")]
    return {"share_of_published_rate": rate / found[-1].rate(kind)} if found else {}


def _peak(device: str) -> dict[str, float]:
    """Memory a GPU allocated at most; for a CPU see benchmarks.memory_check."""
    if device != "cuda":
        return {}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def fields_of(words: list[str]) -> dict[str, list[str] | None]:
    """``--field value ...`` as keys of a recipe."""
    fields: dict[str, list[str] | None] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            values = fields[word[2:].replace("-", "_")] = []
        elif fields:
            values.append(word)
        else:
            raise UniRefinerError(f"{word!r} is no option; give --field value.")
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "python -m benchmarks.refine_throughput --config RECIPE [options]"
    parser.epilog = "Further options are keys of a recipe: --field value."
    parser.add_argument("--config", metavar="RECIPE", help="name or file of a recipe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", help="also write the result to this file")
    options, words = parser.parse_known_args()
    overrides = {"output_dir": ["unused"], **fields_of(words)}
    if options.device == "cpu":
        overrides["use_cpu"] = ["true"]
    result = measure(recipe_of_words(options.config, overrides), options)
    for name, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:30} {shown}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
