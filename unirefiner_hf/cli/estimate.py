"""``unirefiner estimate``: what a refinement takes, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from . import refine

if TYPE_CHECKING:
    from ..estimation.estimate import Estimate

UNUSED = ("deepspeed", "fsdp", "fsdp_config", "torch_compile", "tf32", "fp16")
"""Fields that want the machine of the run, or do not change the counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options: those of ``refine``, and where it would run."""
    refine.add_arguments(parser)
    parser.usage = (
        "unirefiner estimate --config RECIPE [--gpu NAME] [--gpus N] "
        "[--strategy ddp|zero2|zero3] [--field value ...]"
    )
    parser.epilog = (
        "The tower's config is enough: a Hub id, or a folder with config.json. The step "
        "runs on tensors without data, so nothing is loaded."
    )
    where = parser.add_argument_group("where it would run")
    where.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="h200, h100, a100, l40s, 4090, "
        "..., or cpu for this machine (default: h100)",
    )
    where.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="how many (default: 1)"
    )
    where.add_argument(
        "--strategy",
        default="ddp",
        metavar="NAME",
        help="how several share: ddp, zero2 or zero3 (default: ddp)",
    )
    where.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the published rate a step reaches (default: 0.4, 0.7 on a CPU)",
    )
    where.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images of the data set (default: the recipe's max_images, else 5000)",
    )
    where.add_argument("--json", metavar="FILE", help="also write the numbers here")


def run(arguments: argparse.Namespace) -> None:
    """Estimate and print.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key, GPU or strategy, or a value that does not fit.
    """
    from ..estimation.devices import find_device
    from ..estimation.estimate import estimate
    from ..training.recipe import build_arguments

    device = find_device(arguments.gpu)
    values = refine.recipe_values(arguments)
    tf32 = values.get("tf32") or []
    values = {key: words for key, words in values.items() if key not in UNUSED}
    # The recipe's own machine is another one: neither data nor a GPU is needed here.
    values.setdefault("data", ["unused"])
    values.setdefault("output_dir", ["unused"])
    values.setdefault("bf16", ["false" if device.name == "cpu" else "true"])
    values["use_cpu"] = ["true"]
    model, data, method, training = build_arguments(values, refine.DATACLASSES)
    found = estimate(
        model,
        method,
        training,
        device=device,
        devices=arguments.gpus,
        strategy=arguments.strategy,
        efficiency=arguments.efficiency,
        images=arguments.images or data.max_images or 5000,
        tf32=[word.lower() for word in tf32] in (["true"], ["yes"], ["1"]),
    )
    print(describe(found))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(numbers(found), file, indent=2)


def numbers(found: Estimate) -> dict[str, Any]:
    """The estimate as plain numbers: bytes, seconds, operations a step of a device."""
    cost = found.cost
    return {
        "model": found.name,
        "gpu": found.device.name,
        "gpus": found.devices,
        "strategy": found.strategy,
        "parameters": {"frozen": cost.base, "trained": cost.trainable},
        "tokens": cost.tokens,
        "flops": {part: sum(count.values()) for part, count in cost.flops.items()},
        "memory": found.memory,
        "peak_bytes": found.peak_bytes,
        "seconds_a_step": found.seconds,
        "steps": found.steps,
        "run_seconds": found.run_seconds,
    }


def describe(found: Estimate) -> str:
    """The estimate in words and two tables."""
    from ..estimation.dry_run import PARTS

    cost, device, config = found.cost, found.device, found.config
    many = f"{found.devices} x {device.name}, {found.strategy}"
    lines = [
        f"{found.name}: {config.model_type}, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {found.image_size} px, {found.precision}",
        f"batch {found.batch} on "
        + (many if found.strategy else f"one {device.name}")
        + f"; {cost.base / 1e6:,.1f} M parameters frozen, "
        f"{cost.trainable / 1e6:,.1f} M trained",
        "",
        f"{'one step of one device':26}{'images':>8}{'tokens':>10}{'TFLOP':>10}{'':>7}",
    ]
    for part in PARTS:
        flops = sum(cost.flops.get(part, {}).values())
        if not flops:
            continue
        images = str(cost.images.get(part, ""))
        tokens = f"{cost.tokens[part]:,}" if part in cost.tokens else ""
        share = f"{flops / cost.total_flops:6.1%}"
        lines.append(f"  {part:24}{images:>8}{tokens:>10}{_tera(flops):>10}{share:>7}")
    total = cost.total_flops
    each = f"{_tera(total / found.batch)} an image"
    lines += [f"  {'total':24}{'':18}{_tera(total):>10}  ({each})", ""]
    lines.append(f"{'peak memory of one device':44}{'GB':>10}")
    for name, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        if size >= 5e6:
            lines.append(f"  {name:42}{size / 1e9:10.2f}")
    peak, memory = found.peak_bytes, device.memory
    lines.append(f"  {'total':42}{peak / 1e9:10.2f}  of {memory / 1e9:.0f}")
    if peak > 0.95 * memory:
        lines.append(f"  does not fit: {_remedy(found)}")
    lines += ["", *_time(found)]
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.{3 if flops < 1e13 else 1}f}"


def _remedy(found: Estimate) -> str:
    from ..estimation.dry_run import RECOMPUTATION

    if RECOMPUTATION not in found.cost.flops:
        return "--gradient_checkpointing true keeps less of the student"
    return (
        "--no_grad_batch 1 shrinks the passes without gradient, then a smaller "
        "--per_device_train_batch_size"
    )


def _time(found: Estimate) -> list[str]:
    from ..estimation.dry_run import RELATION

    device, images = found.device, found.batch * found.devices
    rate = "measured" if device.name == "cpu" else "published"
    lines = [
        f"{found.seconds:.2f} s a step at {found.efficiency:.0%} of the {rate} rates "
        f"({device.bfloat16 / 1e12:,.3g} TFLOP/s bf16, {device.float32 / 1e12:,.3g} "
        f"float32): {images / found.seconds:,.1f} images/s"
    ]
    if found.exchanged:
        lines.append(
            f"{found.exchanged / 1e9:,.2f} GB exchanged a step and device, "
            f"{found.exchange_seconds:.3f} s at {device.link / 1e9:.0f} GB/s, beside it"
        )
    lines.append(
        f"{_clock(found.run_seconds)} for {found.steps} steps"
        + (
            f" ({found.steps_without_scd} of them before L_scd)"
            if RELATION in found.cost.flops
            else ""
        )
    )
    return lines


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 1200:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"
