"""One refinement from start to finish: what `unirefiner refine` runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import SchedulerType, set_seed
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..data.images import default_reference, denormalise, load_rgb, preprocess
from ..data.unlabelled import RefinementStream, build_dataset, collate, sample_images
from ..export.card import card_from_record
from ..export.checkpoint import export_refined
from ..hub.push import push_run
from ..hub.sync import HubSync, fetch_last_checkpoint
from ..loading.base import Base, load_base
from ..loading.float8 import check_float8, leave_float8
from ..loading.quantized import check_device
from ..loading.starter import starter_photographs, starter_tower
from ..methods.distillation import PlainDistillation
from ..methods.ph_reg import PHReg
from ..methods.settings import UniRefinerSettings
from ..methods.unirefiner import UniRefinerObjective
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..spurious.lazy_channels import LazyChannels, find_lazy_channels
from ..spurious.similarity import gather_tokens
from .arguments import (
    DataArguments,
    ModelArguments,
    RefineTrainingArguments,
    scaled_learning_rate,
)
from .before_after import compare, figure
from .callbacks import Snapshots
from .compiled import compile_layers
from .distributed import (
    LostProcessError,
    check_launch,
    gather_named,
    load_whole,
    lost_contact,
    wait_for_all,
)
from .trainer import (
    CheckpointError,
    RefinementTrainer,
    last_checkpoint_step,
    load_adapter,
    read_refiner_state,
)

logger = logging.get_logger(__name__)

RECORD = "run.json"
LAZY_IMAGES, LAZY_TOKENS = 64, 128
OBJECTIVES: dict[str, type[UniRefinerObjective]] = {
    "unirefiner": UniRefinerObjective,
    "ph_reg": PHReg,
    "plain": PlainDistillation,
}


class RunError(ValueError):
    """The run cannot start as asked."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its message names the checkpoint that was left."""


def refine(
    model_args: ModelArguments,
    data_args: DataArguments,
    settings: UniRefinerSettings,
    args: RefineTrainingArguments,
) -> Path:
    """Refine a tower and leave everything in ``args.output_dir``.

    ``merged/`` (loads with `AutoModel`), ``adapter/``, ``before_after.png``,
    ``metrics.json``, ``run.json`` and the checkpoints.

    Returns:
        The run's folder.

    Raises:
        RunError: the folder holds a run already, it would be published without a licence,
            or PH-Reg is launched with parted weights.
        BaseError: the image size does not fit the tower.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was left.
        LostProcessError: another process of the run is gone.
        LaunchError, NonFiniteLossError, CheckpointError, ImageError: see there.
    """
    check_launch(args.world_size)
    _use_one_gpu(args)
    run = Path(str(args.output_dir))
    checkpoint = _checkpoint_to_resume(run, args)
    wait_for_all()
    check_device(model_args.base_quantization, args.device)
    if model_args.teacher_float8:
        check_float8(args.device)
    set_seed(args.seed)
    load_whole()
    base = load_base(model_args, settings, bf16=bool(args.bf16))
    if args.push_to_hub and base.license is None:
        raise RunError(
            f"The licence of {base.name} is unknown, and a published model needs one: look "
            "it up and set model_license."
        )
    mean, std = base.mean, base.std
    size = (base.image_size, base.image_size)
    dataset = build_dataset(
        _photographs() if data_args.data == "starter" else data_args.data,
        image_size=size,
        mean=mean,
        std=std,
        split=data_args.data_split,
        config_name=data_args.data_config,
        image_column=data_args.image_column,
        streaming=data_args.streaming,
        max_images=data_args.max_images,
        seed=args.seed,
        process=args.process_index,
        processes=args.world_size,
    )
    report = dataset.report
    for name, reason in report.skipped.items():
        logger.warning(f"Left out {name}: {reason}")
    picture = (
        load_rgb(data_args.reference_image)
        if data_args.reference_image is not None
        else default_reference()
    )
    reference = preprocess(picture, size, mean, std).unsqueeze(0)

    objective = OBJECTIVES[settings.method](
        base.model,
        settings,
        reference,
        model_args.register_factor,
        white=(1 - torch.tensor(mean)) / torch.tensor(std),
    ).to(args.device)
    if args.compile_layers:
        compile_layers(base.model)
    lazy = _lazy_channels(objective, dataset, checkpoint)
    shown = sample_images(dataset, data_args.report_images)

    total_batch = args.train_batch_size * args.gradient_accumulation_steps
    total_batch *= args.world_size
    if args.scale_learning_rate:
        args.learning_rate = scaled_learning_rate(args.learning_rate, total_batch)
    if isinstance(dataset, RefinementStream) and args.max_steps <= 0:
        args.max_steps = _steps_of_stream(data_args.max_images, total_batch, args)
    trainer = RefinementTrainer(
        model=objective,
        args=args,
        train_dataset=dataset,
        data_collator=collate,
        lazy_channels=lazy,
    )
    if settings.method == "ph_reg" and trainer.parts_weights:
        raise RunError(
            "Method ph_reg exchanges weights of the tower for the teacher's, which needs all "
            "of them in each process: launch with ddp.yaml or zero2.yaml in place of ZeRO-3 "
            "or FSDP."
        )
    if args.push_to_hub:
        trainer.add_callback(HubSync(args, base.name))
    if args.snapshot_steps and shown:
        width = objective.register_width(*size)
        snapshots = Snapshots(
            base.model, shown, width, run / "snapshots", args.snapshot_steps
        )
        trainer.add_callback(snapshots)

    record = _record(base, model_args, data_args, settings, args)
    record["method"]["lazy_channels"] = lazy
    record["training"]["total_batch"] = total_batch
    record["training"]["learning_rate"] = args.learning_rate
    record["training"]["distributed_type"] = trainer.accelerator.distributed_type.value
    record["data"]["images"] = report.total
    if trainer.is_world_process_zero():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RECORD, {**record, "finished": False})

    started = time.monotonic()
    with trainer.graceful_stop.watching():
        try:
            if checkpoint is None or not trainer.restore_finished(checkpoint):
                trainer.train(
                    resume_from_checkpoint=str(checkpoint) if checkpoint else None
                )
        except Exception as problem:
            if isinstance(problem, CheckpointError) or not lost_contact(problem):
                raise
            raise _lost(run, trainer, problem) from problem
    if trainer.graceful_stop.received is not None:
        step = last_checkpoint_step(run)
        raise Interrupted(
            f"Stopped by {trainer.graceful_stop.received}; checkpoint-{step} was left. "
            "Continue with --resume."
        )
    final_metrics = trainer.final_metrics()
    skipped = {**report.skipped, **gather_named(trainer.skipped)}
    record["data"]["skipped"] = skipped
    record["training"]["steps"] = trainer.state.global_step
    record["training"]["epochs"] = trainer.state.epoch
    if isinstance(dataset, RefinementStream):
        seen, images = trainer.state.global_step * total_batch, data_args.max_images
        record["training"]["epochs"] = seen / images if images else None
    record["training"]["seconds"] = round(time.monotonic() - started, 1)
    record["training"]["resumed"] = checkpoint is not None
    record["losses"] = final_metrics
    record["training"]["wrapper"] = type(trainer.model_wrapped).__name__
    _finish(run, trainer, base, shown, reference, settings, model_args, record)
    wait_for_all()
    if not trainer.is_world_process_zero():
        return run
    if args.push_to_hub:
        _publish(run, model_args, args)
    if skipped:
        logger.warning(
            f"{len(skipped)} images could not be used; {RECORD} names each and why."
        )
    return run


def _finish(
    run: Path,
    trainer: RefinementTrainer,
    base: Base,
    shown: list[Tensor],
    reference: Tensor,
    settings: UniRefinerSettings,
    model_args: ModelArguments,
    record: dict[str, Any],
) -> None:
    """Adapter, comparison, picture, record and the merged checkpoint.

    Every process takes part in the forward passes, where weights may be split; the first
    writes.
    """
    model: UniRefinerModel = trainer.refiner.model.eval()
    leave_float8(model)
    width = trainer.refiner.register_width(base.image_size, base.image_size)
    if model_args.inference_register_width is not None:
        width = model_args.inference_register_width
    model.config.register_width = width
    record["model"]["register_width"] = width
    trainer.save_adapter(run / "adapter")
    images: dict[str, Image.Image] = {}
    if shown:
        device = trainer.args.device
        mask = trainer.refiner.channel_mask
        comparison = compare(model, shown, reference.to(device), settings, width, mask)
        record["spurious_shares"] = comparison.shares()
        record["spurious_shares"]["images"] = len(shown)
    if not trainer.is_world_process_zero():
        return
    if shown:
        pictures = [denormalise(pixels, base.mean, base.std) for pixels in shown]
        images["before_after.png"] = figure(comparison, pictures)
        images["before_after.png"].save(run / "before_after.png")
    metrics = {
        "spurious_shares": record.get("spurious_shares"),
        "losses": record["losses"],
        "history": trainer.state.log_history,
        "seconds": record["training"]["seconds"],
        "steps": record["training"]["steps"],
    }
    write_json(run / "metrics.json", metrics)
    write_json(run / RECORD, {**record, "finished": True})
    load_whole()
    quantized = model_args.base_quantization is not None
    whole_weights = not quantized and not trainer.is_sharded
    if not whole_weights or next(model.parameters()).dtype != torch.float32:
        # The merge is in float32, from the base's own weights.
        whole = dataclasses.replace(
            model_args, base_dtype="float32", base_quantization=None
        )
        width = model.config.register_width
        model = load_base(whole, settings).model
        model.config.register_width = width
        load_adapter(model, run / "adapter")
    export_refined(
        model,
        run / "merged",
        image_processor=base.processor,
        image_size=base.image_size,
        card=card_from_record(record),
        images=images,
        text_side=None if base.text_side is None else base.text_side(),
        overwrite=True,
    )
    logger.warning(f"The refined model is in {run / 'merged'}.")


def _publish(
    run: Path, model_args: ModelArguments, args: RefineTrainingArguments
) -> None:
    """The finished model in place of the run in progress."""
    pushed = push_run(
        run,
        str(args.hub_model_id),
        private=bool(args.hub_private_repo),
        model=model_args.model,
        token=args.hub_token,
    )
    logger.warning(f"The refined model is at {pushed.url}.")


def _lost(
    run: Path, trainer: RefinementTrainer, problem: Exception
) -> LostProcessError:
    step = last_checkpoint_step(run)
    left = (
        "There is no checkpoint yet." if step is None else f"checkpoint-{step} is left."
    )
    how = "Start again" if step is None else "Continue with --resume"
    reason = " ".join(str(problem).split())[:200]
    return LostProcessError(
        f"Process {trainer.args.process_index} lost contact with another after step "
        f"{trainer.state.global_step}: it was killed or its machine is gone. {left} {how}, "
        f"on as many processes. ({reason})"
    )


def _steps_of_stream(
    images: int | None, total_batch: int, args: RefineTrainingArguments
) -> int:
    if images is None:
        raise RunError(
            "A stream does not tell how long it is: set max_images (with num_train_epochs) "
            "or max_steps."
        )
    return math.ceil(args.num_train_epochs * images / total_batch)


def _use_one_gpu(args: RefineTrainingArguments) -> None:
    """One process trains on one GPU; Trainer would split its batches over all it sees."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs, of which this one process uses one: accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml uses all."
        )
        args._n_gpu = 1


def _photographs() -> str:
    folder = starter_tower().parent / "photographs"
    starter_photographs(folder)
    return str(folder)


def _checkpoint_to_resume(run: Path, args: RefineTrainingArguments) -> Path | None:
    step = last_checkpoint_step(run) if run.is_dir() else None
    if args.resume:
        if step is None and args.push_to_hub:
            with args.main_process_first(desc="fetching the checkpoint"):
                if args.local_process_index == 0:
                    fetch_last_checkpoint(str(args.hub_model_id), run, args.hub_token)
            step = last_checkpoint_step(run) if run.is_dir() else None
        if step is None:
            logger.warning(f"{run.name} holds no checkpoint: starting at step 0.")
            return None
        return run / f"checkpoint-{step}"
    if step is not None or (run / RECORD).exists():
        at = f", at checkpoint-{step}" if step is not None else ""
        raise RunError(
            f"{run} already holds a run{at}: continue it with --resume, or name another "
            "output_dir."
        )
    return None


def _lazy_channels(
    objective: UniRefinerObjective,
    dataset: Any,
    checkpoint: Path | None,
) -> list[int]:
    """Search once; a resumed run keeps what its checkpoint recorded."""
    if not objective.looks_for_lazy_channels:
        return []
    if checkpoint is not None:
        channels = read_refiner_state(checkpoint)["lazy_channels"]
    else:
        images = sample_images(dataset, LAZY_IMAGES)
        if len(images) < 2:
            logger.warning("One image is too few for the lazy-channel search: skipped.")
            return []
        found = _search_lazy_channels(objective, images)
        channels = found.channels
        logger.info(f"Lazy channels {channels}: cosines {found.unrelated_cosine}.")
    hidden = objective.channel_mask.numel()
    mask = LazyChannels(channels, [], "").mask(hidden)
    objective.set_channel_mask(mask.to(objective.channel_mask))
    return channels


def _search_lazy_channels(
    objective: UniRefinerObjective, images: list[Tensor]
) -> LazyChannels:
    """Up to 128 teacher tokens of each image, drawn by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    bank = []
    for pixels in images:
        tokens = objective.teacher_tokens(pixels.unsqueeze(0)).float().cpu()
        count = min(LAZY_TOKENS, tokens.shape[1])
        index = torch.randperm(tokens.shape[1], generator=generator)[:count]
        bank.append(gather_tokens(tokens, index.unsqueeze(0)))
    return find_lazy_channels(torch.cat(bank))


def _record(
    base: Base,
    model_args: ModelArguments,
    data_args: DataArguments,
    settings: UniRefinerSettings,
    args: RefineTrainingArguments,
) -> dict[str, Any]:
    """The run's own account, without a path of this machine."""
    data = Path(data_args.data).expanduser()
    method = dataclasses.asdict(settings)
    packages = ("unirefiner_hf", "torch", "transformers", "accelerate", "peft")
    return {
        "format": 1,
        "model": {
            "base": base.name,
            "revision": model_args.revision,
            "license": base.license,
            "family": base.model.config.vision_config.model_type,
            "layers": base.model.config.num_hidden_layers,
            "image_size": base.image_size,
            "final_norm": base.model.config.final_norm,
            "register_factor": model_args.register_factor,
            "register_fill": model_args.register_fill,
            "inference_register_width": model_args.inference_register_width,
            "lora_rank": model_args.lora_rank,
            "lora_alpha": model_args.lora_alpha,
            "lora_dropout": model_args.lora_dropout,
            "keep_text": base.text_side is not None,
        },
        "data": {
            "source": data.resolve().name if data.exists() else data_args.data,
            "split": data_args.data_split,
            "max_images": data_args.max_images,
            "seed": args.seed,
        },
        "method": {"name": method.pop("method"), **method},
        "training": {
            "optimizer": OptimizerNames(args.optim).value,
            "weight_decay": args.weight_decay,
            "schedule": _schedule(args),
            "precision": "bfloat16" if args.bf16 else "float32",
            "base_quantization": model_args.base_quantization,
            "teacher_float8": model_args.teacher_float8,
            "processes": args.world_size,
            "batch_per_process": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "hardware": _hardware(args.device),
        },
        "versions": {name: _version(name) for name in packages},
    }


def _schedule(args: RefineTrainingArguments) -> str:
    if args.final_lr_share is not None:
        return f"exponential, to {args.final_lr_share:g} of the rate"
    return SchedulerType(args.lr_scheduler_type).value


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _version(package: str) -> str:
    if package == "unirefiner_hf":
        from .. import __version__

        return __version__
    return version(package)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(draft, path)
