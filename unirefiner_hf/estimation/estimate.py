"""`estimate`: what a refinement will take, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import UniRefinerError
from ..loading.backbone import Model, weightless_backbone
from ..loading.float8 import float8_linears
from ..loading.quantized import BYTES, layer_linears
from ..methods.base import backbone_arguments, check_arguments
from ..methods.objective import RELATION
from ..methods.settings import MethodSettings
from ..resources import find_recipe
from ..results import Result, Table
from ..training.arguments import UniRefinerArguments
from ..training.asked import asked
from ..training.recipe import (
    Recipe,
    Values,
    build_arguments,
    read_recipe,
    recipe_of_words,
    to_words,
)
from . import dry_run
from .devices import Device, find_device
from .dry_run import StepCost, dry_step

STRATEGIES = ("ddp", "zero2", "zero3")
IMAGES = 5000
"""Images of a data set of unknown size: those of the published runs."""
ELSEWHERE = ("deepspeed", "fsdp", "fsdp_config", "tf32")
"""Fields that want the machine of the run when arguments are made of them."""
OPTIMIZER = "optimiser"
GATHERED = "gathered layers"
BUCKETS = "gradient buckets"
FLOAT8_COPY = "float8 copy of the frozen layers"
LIVE_PARAMETERS = 1e9
"""Parameters ZeRO-3 keeps gathered at once (``stage3_max_live_parameters``)."""
GROWTH = 4
"""Bytes of a trained parameter, its gradient, and each of AdamW's two moments."""


@dataclass(frozen=True)
class Estimate(Result):
    """What one refinement takes.

    Attributes:
        name: of the backbone; `config` its own.
        image_size: height and width of the images, pixels.
        batch: images a step and device.
        precision: ``bf16``, or ``float32`` without mixed precision.
        strategy: how the devices share; None of one alone.
        efficiency: share of the device's rates a step reaches.
        cost: one step of one device, every loss term on.
        memory: what holds a device's memory at the fullest moment -> bytes.
        seconds: of a step; the longer of computing and exchanging, which overlap.
        exchanged: bytes a device sends a step.
        exchange_seconds: those bytes over its link.
        steps: of the whole run; `early_steps` of them before the last loss term sets in,
            without the relation pass.
        run_seconds: of the whole run's steps; loading, the lazy-channel search, saving
            and the final picture are not in it.
    """

    name: str
    config: PreTrainedConfig
    image_size: tuple[int, int]
    batch: int
    precision: str
    device: Device
    devices: int
    strategy: str | None
    efficiency: float
    cost: StepCost
    memory: dict[str, int]
    seconds: float
    exchanged: int
    exchange_seconds: float
    steps: int
    early_steps: int
    run_seconds: float

    @property
    def peak_bytes(self) -> int:
        """Bytes on each device at the fullest moment."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that leaves a twentieth of the device's memory, for what is not counted."""
        return self.peak_bytes <= 0.95 * self.device.memory

    @property
    def utilisation(self) -> float:
        """Share of the device's bfloat16 rate (float32 rate without mixed precision)."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self.cost.total_flops / self.seconds / self.device.rate(dtype)

    @property
    def title(self) -> str:
        """Backbone, devices and batch."""
        config = self.config
        where = f"one {self.device.name}"
        sides = " x ".join(map(str, dict.fromkeys(self.image_size)))
        if self.strategy:
            where = f"{self.devices} x {self.device.name}, {self.strategy}"
        return (
            f"{self.name}: {config.model_type}, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, {sides} px, {self.precision}; batch "
            f"{self.batch} on {where}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, operations a step of a device."""
        cost = self.cost
        return {
            "model": self.name,
            "gpu": self.device.name,
            "gpus": self.devices,
            "strategy": self.strategy,
            "image_size": list(self.image_size),
            "parameters": {"frozen": cost.base, "trained": cost.trainable},
            "tokens": cost.tokens,
            "flops": {part: sum(count.values()) for part, count in cost.flops.items()},
            "memory": self.memory,
            "peak_bytes": self.peak_bytes,
            "seconds_a_step": self.seconds,
            "steps": self.steps,
            "run_seconds": self.run_seconds,
        }

    def tables(self) -> list[Table]:
        """Operations of a step by part, memory by what holds it, and the time in words."""
        return [self._step(), self._memory()]

    def _step(self) -> Table:
        cost = self.cost
        total = cost.total_flops
        rows = []
        for part in cost.parts:
            flops = sum(cost.flops[part].values())
            images = str(cost.images.get(part, ""))
            tokens = f"{cost.tokens[part]:,}" if part in cost.tokens else ""
            rows.append((part, images, tokens, _tera(flops), f"{flops / total:.1%}"))
        rows.append(("total", "", "", _tera(total), ""))
        return Table(
            ("one step of one device", "images", "tokens", "TFLOP", "share"),
            rows,
            f"{self.title}; {cost.base / 1e6:,.1f} M parameters frozen, "
            f"{cost.trainable / 1e6:,.1f} M trained",
            (f"{_tera(total / self.batch)} TFLOP an image",),
        )

    def _memory(self) -> Table:
        memory = sorted(self.memory.items(), key=lambda item: -item[1])
        rows = [(name, f"{size / 1e9:.2f}") for name, size in memory if size >= 5e6]
        peak = f"{self.peak_bytes / 1e9:.2f} of {self.device.memory / 1e9:.0f}"
        notes = self._time()
        if not self.fits:
            notes.insert(0, f"does not fit: {self._remedy()}")
        heads = ("peak memory of one device", "GB")
        return Table(heads, [*rows, ("total", peak)], notes=notes)

    def _remedy(self) -> str:
        if dry_run.RECOMPUTATION not in self.cost.flops:
            return "--gradient_checkpointing true keeps less of the student"
        return (
            "--no_grad_batch 1 shrinks the passes without gradient, then a smaller "
            "--per_device_train_batch_size"
        )

    def _time(self) -> list[str]:
        device, images = self.device, self.batch * self.devices
        rate = "measured" if device.name == "cpu" else "published"
        lines = [
            f"{self.seconds:.2f} s a step at {self.efficiency:.0%} of the {rate} rates "
            f"({device.bfloat16 / 1e12:,.3g} TFLOP/s bf16, {device.float32 / 1e12:,.3g} "
            f"float32): {images / self.seconds:,.1f} images/s"
        ]
        if self.exchanged:
            lines.append(
                f"{self.exchanged / 1e9:,.2f} GB exchanged a step and device, "
                f"{self.exchange_seconds:.3f} s at {device.link / 1e9:.0f} GB/s, beside it"
            )
        run = f"{_clock(self.run_seconds)} for {self.steps} steps"
        if RELATION in self.cost.flops:
            run += f" ({self.early_steps} of them before L_scd)"
        return [*lines, run]


def estimate(
    model: Model | None = None,
    args: UniRefinerArguments | None = None,
    method: str | MethodSettings | type[MethodSettings] | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    gpu: str = "h100",
    gpus: int = 1,
    strategy: str = "ddp",
    efficiency: float | None = None,
    images: int | None = None,
    tf32: bool | None = None,
    **fields: Any,
) -> Estimate:
    """What `refine` of the same would take; no weights are read, nothing is changed.

    Neither images nor a folder for the run are needed, and a GPU of the run need not be
    here.

    Args:
        model, args, method, recipe, fields: see `unirefiner_hf.refine`; of the model its
            config is enough. Where `bf16` is not set, precision is mixed on a GPU. `args`
            settle it when they are made, by the machine they are made on.
        gpu: a name in `devices.GPUS`, or ``cpu`` for the processor of this machine.
        gpus: so many, each with `args.per_device_train_batch_size` images.
        strategy: how several devices share: ``ddp`` copies everything; ``zero2`` parts
            the optimiser, ``zero3`` the frozen base too (DeepSpeed).
        efficiency: share of the device's published rate; None takes the device's own.
        images: of the data set, for the time of the run; None: `args.max_images`, or 5000.
        tf32: float32 products (the losses) run on tensor cores; None: as `args.tf32` says.

    Raises:
        UniRefinerError: an unknown GPU or strategy, a number out of its range, a backbone
            that is not supported; or as `refine`.
    """
    device = find_device(gpu)
    told = asked(recipe, args, method, fields, _read_elsewhere)
    model = told.model if model is None else model
    if model is None:
        raise UniRefinerError(
            "model is missing: name a Hub id, a folder, or 'starter', or give a model."
        )
    args, settings = told.args, told.method
    images = images if images is not None else args.max_images or IMAGES
    efficiency = device.efficiency if efficiency is None else efficiency
    _check(args, device, gpus, strategy, efficiency, images)
    check_arguments(args, settings)
    mixed = bool(args.bf16) if "bf16" in told.keys else device.name != "cpu"
    allow_tf32 = bool(args.tf32 if tf32 is None else tf32)
    backbone, objective = backbone_arguments(args), settings.objective()
    dtype = objective.base_dtype(backbone, mixed)
    emptied, name, image_size = weightless_backbone(
        model, backbone, dtype=dtype, num_register_tokens=settings.num_register_tokens
    )
    tower: Any = emptied.tower
    linears = layer_linears(tower).values()
    weights = sum(linear.weight.numel() for linear in linears)
    eight = sum(linear.weight.numel() for linear in float8_linears(tower))
    objective.attach(emptied, settings, backbone, name)
    cost = dry_step(
        emptied,
        settings,
        image_size=image_size,
        batch=args.per_device_train_batch_size,
        register_factor=args.register_factor,
        autocast=torch.bfloat16 if mixed else None,
        as_on_gpu=device.name != "cpu",
        checkpointing=_checkpointing(args),
        gradients_kept=args.gradient_accumulation_steps > 1,
    )
    shared = strategy if gpus > 1 else None
    compute = {
        part: sum(
            count / device.rate(kind, allow_tf32) / efficiency
            for kind, count in by_dtype.items()
        )
        for part, by_dtype in cost.flops.items()
    }
    if args.teacher_float8:
        gain = 1 / device.rate(dtype) - 1 / device.float8
        for part, tokens in cost.tokens_without_gradient.items():
            compute[part] -= 2 * eight * tokens * gain / efficiency
    exchanged = _exchanged(cost, shared, gpus, _checkpointing(args))
    exchange = exchanged / device.link
    whole = max(sum(compute.values()), exchange)
    without = max(sum(compute.values()) - compute.get(RELATION, 0), exchange)
    steps = _steps(args, images, gpus)
    early = min(steps, math.ceil(settings.full_loss_from * steps))
    seconds = early * without + (steps - early) * whole
    memory = _memory(cost, shared, gpus)
    if args.base_quantization is not None:
        saved = dtype.itemsize - BYTES[args.base_quantization]
        memory[dry_run.BASE] -= int(saved * weights)
    if args.teacher_float8:
        memory[FLOAT8_COPY] = eight
    return Estimate(
        name=name,
        config=tower.config,
        image_size=image_size,
        batch=args.per_device_train_batch_size,
        precision="bf16" if mixed else "float32",
        device=device,
        devices=gpus,
        strategy=shared,
        efficiency=efficiency,
        cost=cost,
        memory=memory,
        seconds=whole,
        exchanged=exchanged,
        exchange_seconds=exchange,
        steps=steps,
        early_steps=early,
        run_seconds=seconds * args.gradient_accumulation_steps,
    )


@dataclass
class _Products:
    tf32: bool | None = None


def recipe_elsewhere(
    recipe: str | Path | None, overrides: Mapping[str, Values]
) -> Recipe:
    """A recipe and the words of a command line, for a machine that is not this one.

    Raises:
        UniRefinerError: as `load_recipe`.
    """
    told = {} if recipe is None else read_recipe(find_recipe(str(recipe)))
    tf32 = {**told, **overrides}.get("tf32")
    (products,) = build_arguments({"tf32": tf32}, (_Products,))
    words = {"output_dir": ["unused"], **overrides, "use_cpu": ["true"]}
    read = recipe_of_words(recipe, {**words, **dict.fromkeys(ELSEWHERE)})
    read.args.tf32 = products.tf32
    return read


def _read_elsewhere(recipe: str | Path | None, **fields: Any) -> Recipe:
    return recipe_elsewhere(
        recipe, {name: to_words(value) for name, value in fields.items()}
    )


def _check(
    args: UniRefinerArguments,
    device: Device,
    gpus: int,
    strategy: str,
    efficiency: float,
    images: int,
) -> None:
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise UniRefinerError(f"strategy is {strategy!r}; use {known}.")
    if args.base_quantization is not None and strategy == "zero3" and gpus > 1:
        raise UniRefinerError(
            "base_quantization does not go with zero3: use ddp or zero2."
        )
    if args.teacher_float8 and not device.float8:
        raise UniRefinerError(f"teacher_float8: {device.name} has no float8 products.")
    for name, value in (("gpus", gpus), ("images", images)):
        if value < 1:
            raise UniRefinerError(f"{name} is {value}; it must be at least 1.")
    if not 0 < efficiency <= 1:
        raise UniRefinerError(f"efficiency is {efficiency}; it must be in (0, 1].")


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.{3 if flops < 1e13 else 1}f}"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 1200:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _checkpointing(args: UniRefinerArguments) -> bool:
    # transformers 5.23 renamed the option; the old name mirrors the new one.
    return bool(args.gradient_checkpointing)


def _steps(args: UniRefinerArguments, images: int, devices: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(images / (args.per_device_train_batch_size * devices))
    updates = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * updates)


def _memory(cost: StepCost, strategy: str | None, devices: int) -> dict[str, int]:
    """Bytes of one device at the fullest moment, by what holds them."""
    memory = dict(cost.peak)
    trained = GROWTH * cost.trainable
    memory[OPTIMIZER] = 2 * trained
    if strategy is not None:
        memory[BUCKETS] = trained
    if strategy in ("zero2", "zero3"):
        # The moments and a float32 copy of the trained weights, each parted.
        memory[OPTIMIZER] = math.ceil(3 * trained / devices)
    if strategy == "zero3":
        base = memory[dry_run.BASE]
        live = min(1.0, LIVE_PARAMETERS / cost.base)
        memory[dry_run.BASE] = math.ceil(base / devices)
        memory[GATHERED] = math.ceil(base * live)
    return {name: size for name, size in memory.items() if size}


def _exchanged(
    cost: StepCost, strategy: str | None, devices: int, checkpointing: bool
) -> int:
    """Bytes a device sends a step: gradients summed, sharded weights gathered."""
    if strategy is None:
        return 0
    share = (devices - 1) / devices
    total = 2 * GROWTH * cost.trainable * share
    if strategy == "zero3":
        gathers = sum(cost.calls.values()) + 1 + checkpointing
        total += gathers * cost.peak[dry_run.BASE] * share
    return math.ceil(total)
