"""What a refinement will take, before anything is loaded: memory, operations, time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..loading.base import base_dtype, base_source, framed, tower_without_weights
from ..loading.float8 import float8_linears
from ..loading.quantized import BYTES, layer_linears
from ..methods.settings import UniRefinerSettings
from ..training.arguments import ModelArguments, RefineTrainingArguments
from ..training.run import OBJECTIVES
from . import dry_run
from .devices import Device
from .dry_run import StepCost, dry_step

STRATEGIES = ("ddp", "zero2", "zero3")
NO_GRADIENT = {*dry_run.PASSES} - {dry_run.STUDENT}
OPTIMIZER = "optimiser"
GATHERED = "gathered layers"
BUCKETS = "gradient buckets"
FLOAT8_COPY = "float8 copy of the frozen layers"
LIVE_PARAMETERS = 1e9
"""Parameters ZeRO-3 keeps gathered at once (``stage3_max_live_parameters``)."""
GROWTH = 4
"""Bytes of a trained parameter, its gradient, and each of AdamW's two moments."""


@dataclass(frozen=True)
class Estimate:
    """What one refinement takes.

    Attributes:
        cost: one step of one device, L_scd on.
        memory: what holds a device's memory at the fullest moment -> bytes.
        seconds: of a step; the longer of computing and exchanging, which overlap.
        exchanged: bytes a device sends a step.
        exchange_seconds: those bytes over its link.
        steps: of the whole run; `steps_without_scd` of them before L_scd sets in.
        run_seconds: of the whole run's steps; loading, the lazy-channel search, saving
            and the final picture are not in it.
    """

    name: str
    config: PreTrainedConfig
    image_size: int
    batch: int
    precision: str
    device: Device
    devices: int
    strategy: str | None
    efficiency: float
    images: int
    cost: StepCost
    memory: dict[str, int]
    seconds: float
    exchanged: int
    exchange_seconds: float
    steps: int
    steps_without_scd: int
    run_seconds: float

    @property
    def peak_bytes(self) -> int:
        """Bytes on each device at the fullest moment."""
        return sum(self.memory.values())

    @property
    def utilisation(self) -> float:
        """Share of the device's bfloat16 rate (float32 rate without mixed precision)."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self.cost.total_flops / self.seconds / self.device.rate(dtype)


def estimate(
    model_args: ModelArguments,
    settings: UniRefinerSettings,
    args: RefineTrainingArguments,
    *,
    device: Device,
    devices: int = 1,
    strategy: str = "ddp",
    efficiency: float | None = None,
    images: int = 5000,
    tf32: bool = False,
) -> Estimate:
    """Estimate a refinement from the tower's config alone; no weights are read.

    Args:
        args: its `bf16` says whether precision is mixed.
        devices: of this kind, each with `args.per_device_train_batch_size` images.
        strategy: how several devices share: ``ddp`` copies everything; ``zero2`` parts
            the optimiser, ``zero3`` the frozen base too (DeepSpeed).
        efficiency: share of the device's published rate; None takes the device's own.
        images: of the data set, for the time of the run.
        tf32: float32 products (the losses) run on tensor cores.

    Raises:
        ValueError: an unknown strategy, a number that is not positive, or a tower that
            is not supported.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; use {', '.join(STRATEGIES)}.")
    if efficiency is None:
        efficiency = device.efficiency
    if model_args.base_quantization is not None and strategy == "zero3" and devices > 1:
        raise ValueError("base_quantization does not go with zero3: use ddp or zero2.")
    if model_args.teacher_float8 and not device.float8:
        raise ValueError(f"teacher_float8: {device.name} has no float8 products.")
    for name, value in (("gpus", devices), ("images", images)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; it must be in (0, 1].")
    tower: Any = tower_without_weights(model_args)
    dtype = base_dtype(model_args, bool(args.bf16), settings)
    tower.to(dtype=dtype)
    weights = sum(linear.weight.numel() for linear in layer_linears(tower).values())
    eight = sum(linear.weight.numel() for linear in float8_linears(tower))
    plain = replace(model_args, teacher_float8=False)
    model, image_size = framed(tower, plain, model_args.model, settings)
    batch = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    cost = dry_step(
        model,
        settings,
        image_size=image_size,
        batch=batch,
        register_factor=model_args.register_factor,
        objective_type=OBJECTIVES[settings.method],
        autocast=torch.bfloat16 if args.bf16 else None,
        as_on_gpu=device.name != "cpu",
        checkpointing=_checkpointing(args),
        gradients_kept=accumulation > 1,
    )
    shared = strategy if devices > 1 else None
    compute = {
        part: sum(
            count / device.rate(dtype, tf32) / efficiency
            for dtype, count in by_dtype.items()
        )
        for part, by_dtype in cost.flops.items()
    }
    if model_args.teacher_float8:
        gain = 1 / device.rate(dtype) - 1 / device.float8
        for part in compute.keys() & NO_GRADIENT:
            compute[part] -= 2 * eight * cost.tokens.get(part, 0) * gain / efficiency
    exchanged = _exchanged(cost, shared, devices, _checkpointing(args))
    exchange = exchanged / device.link
    with_scd = max(sum(compute.values()), exchange)
    without = max(sum(compute.values()) - compute.get(dry_run.RELATION, 0), exchange)
    steps = _steps(args, images, devices)
    early = min(steps, math.ceil(settings.scd_start * steps))
    seconds = early * without + (steps - early) * with_scd
    memory = _memory(cost, shared, devices)
    if model_args.base_quantization is not None:
        saved = dtype.itemsize - BYTES[model_args.base_quantization]
        memory[dry_run.BASE] -= int(saved * weights)
    if model_args.teacher_float8:
        memory[FLOAT8_COPY] = eight
    return Estimate(
        name=base_source(model_args)[1],
        config=tower.config,
        image_size=image_size,
        batch=batch,
        precision="bf16" if args.bf16 else "float32",
        device=device,
        devices=devices,
        strategy=shared,
        efficiency=efficiency,
        images=images,
        cost=cost,
        memory=memory,
        seconds=with_scd,
        exchanged=exchanged,
        exchange_seconds=exchange,
        steps=steps,
        steps_without_scd=early,
        run_seconds=seconds * accumulation,
    )


def _checkpointing(args: RefineTrainingArguments) -> bool:
    # transformers 5.23 renamed the option; the old name mirrors the new one.
    return bool(args.gradient_checkpointing)


def _steps(args: RefineTrainingArguments, images: int, devices: int) -> int:
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
