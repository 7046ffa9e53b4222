"""The run's own account, without a path of this machine."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from .. import __version__
from ..data.streams import RefinementStream
from ..export.run_folder import FORMAT
from ..loading.arguments import fewest_sides
from .arguments import UniRefinerArguments

if TYPE_CHECKING:
    from .trainer import UniRefinerTrainer

RECORDED = (
    "revision",
    "register_factor",
    "register_fill",
    "inference_register_width",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
)
"""Arguments that stand in the record as they were given, where the method reads them."""
PACKAGES = ("torch", "transformers", "accelerate", "peft")


def started_record(trainer: UniRefinerTrainer) -> dict[str, Any]:
    """What is known before the first step."""
    args, base, settings = trainer.args, trainer.backbone, trainer.settings
    config = base.model.config
    kept = [name for name in RECORDED if name not in settings.unread]
    model: dict[str, Any] = {name: getattr(args, name) for name in kept}
    if "register_fill" in model:
        model["register_fill"] = config.register_fill
    return {
        "format": FORMAT,
        "model": {
            "base": base.name,
            "license": base.license,
            "family": config.vision_config.model_type,
            "layers": config.num_hidden_layers,
            "image_size": fewest_sides(base.image_size),
            "final_norm": config.final_norm,
            "keep_text": base.text_side is not None,
            "sha256": trainer.asked["base weights"].removeprefix("sha256 "),
            **model,
        },
        "data": {
            "source": trainer.report.source,
            "split": args.data_split,
            "max_images": args.max_images,
            "seed": args.seed,
            "images": trainer.report.total,
            "passed_over": trainer.report.passed_over,
        },
        "method": {
            "name": settings.name,
            **dataclasses.asdict(settings),
            "lazy_channels": trainer.lazy_channels,
        },
        "training": {
            "optimizer": OptimizerNames(args.optim).value,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "schedule": _schedule(args),
            "precision": "bfloat16" if args.bf16 else "float32",
            "base_quantization": args.base_quantization,
            "teacher_float8": args.teacher_float8,
            "processes": args.world_size,
            "batch_per_process": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "total_batch": trainer.total_batch,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "hardware": _hardware(args.device),
        },
        "asked": trainer.asked,
        "versions": {
            "unirefiner_hf": __version__,
            **{name: version(name) for name in PACKAGES},
        },
    }


def finished_record(
    trainer: UniRefinerTrainer,
    losses: dict[str, float],
    skipped: dict[str, str],
    seconds: float,
    resumed: bool,
) -> dict[str, Any]:
    """The record with what is known after the last step."""
    record, state = trainer.record, trainer.state
    epochs: float | None = state.epoch
    if isinstance(trainer.train_dataset, RefinementStream):
        images = trainer.args.max_images
        seen = state.global_step * trainer.total_batch
        epochs = seen / images if images else None
    wrapper = trainer.model_wrapped
    return {
        **record,
        "model": {
            **record["model"],
            "register_width": trainer.refined.config.register_width,
        },
        "data": {**record["data"], "skipped": skipped},
        "training": {
            **record["training"],
            "steps": state.global_step,
            "epochs": epochs,
            "seconds": round(seconds, 1),
            "resumed": resumed,
            "wrapper": type(wrapper).__name__,
        },
        "losses": losses,
    }


def metrics_of(trainer: UniRefinerTrainer) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    record = trainer.record
    return {
        "spurious_shares": record.get("spurious_shares"),
        "losses": record["losses"],
        "history": trainer.state.log_history,
        "seconds": record["training"]["seconds"],
        "steps": record["training"]["steps"],
    }


def _schedule(args: UniRefinerArguments) -> str:
    if args.final_lr_share is not None:
        return f"exponential, to {args.final_lr_share:g} of the rate"
    return SchedulerType(args.lr_scheduler_type).value


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
