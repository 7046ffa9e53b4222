"""What happens before the first step: checks, images, objective, lazy channels."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..data.images import default_reference, load_rgb
from ..data.unlabelled import open_training_images, sample_images
from ..export.holding import check_free
from ..export.result_folder import check_run_folder, folder_of
from ..export.run_folder import (
    RESULTS,
    checkpoint_name,
    is_run,
    is_trained,
    last_checkpoint_step,
    read_record,
    read_refiner_state,
    recorded_method,
)
from ..export.whole import named_steps, newest_whole
from ..hub.sync import check_publication, fetch_last_checkpoint
from ..loading.adapter import CheckpointError
from ..loading.backbone import Backbone, Model, public_name
from ..loading.starter import starter_data
from ..methods.objective import Objective, Surroundings
from ..methods.settings import MethodSettings
from ..modeling.errors import UniRefinerError
from ..spurious.lazy_channels import LazyChannels, find_lazy_channels
from ..spurious.similarity import gather_tokens
from .arguments import UniRefinerArguments
from .distributed import fail_together, told_by_first

logger = logging.get_logger(__name__)

LAZY_IMAGES, LAZY_TOKENS = 64, 128
"""Images of the search, and tokens of each."""


class RunError(UniRefinerError):
    """The run cannot start as asked."""


def check_together(args: UniRefinerArguments) -> None:
    """Refuse an argument that another one would leave unread."""
    if args.snapshot_steps and not args.report_images:
        raise RunError(
            f"snapshot_steps is {args.snapshot_steps}, and report_images 0: pictures are of "
            "the images of the report. Set report_images, or leave snapshot_steps out."
        )
    if args.final_lr_share is not None and args.warmup_steps:
        raise RunError(
            f"warmup_steps is {args.warmup_steps}, which final_lr_share "
            f"({args.final_lr_share}) does not go with: the rate falls from the first step."
        )


def check_places(model: Model, args: UniRefinerArguments) -> None:
    """Refuse, before anything is loaded, where results could not go at the end.

    Raises:
        ExportError: the run's folder holds what is not its own; see `check_run_folder`.
        HubError: the run is to be published and could not be; see `check_publication`.
    """
    _by_first(args, _check_places, model, args)


def _check_places(model: Model, args: UniRefinerArguments) -> None:
    check_run_folder(Path(str(args.output_dir)), folder_of(model))
    if args.push_to_hub:
        check_publication(args, public_name(model), resume=bool(args.resume))


def open_unlabelled(data: Any, args: UniRefinerArguments) -> Any:
    """The training images; their size and normalisation are the backbone's, not loaded yet.

    Raises:
        RunError: the run would lie among them.
    """
    if isinstance(data, (str, Path)) and Path(data).is_dir():
        if Path(data).resolve() == Path(str(args.output_dir)).resolve():
            raise RunError(
                f"output_dir is {args.output_dir}, the folder of the images: name another, "
                "in it or elsewhere."
            )
    return open_training_images(
        starter_data(data),
        split=args.data_split,
        config_name=args.data_config,
        image_column=args.image_column,
        streaming=args.streaming,
        max_images=args.max_images,
        seed=args.seed,
        process=args.process_index,
        processes=args.world_size,
    )


def reference_pixels(base: Backbone, args: UniRefinerArguments) -> Tensor:
    """The unrelated reference image, ``(1, 3, height, width)``, normalised."""
    picture = default_reference()
    if args.reference_image is not None:
        picture = load_rgb(args.reference_image)
    return base.reading(picture, base.image_size).unsqueeze(0)


def build_objective(
    base: Backbone,
    settings: MethodSettings,
    reference: Tensor,
    args: UniRefinerArguments,
) -> Objective:
    """The objective of the run, on its device."""
    mean, std = torch.tensor(base.reading.mean), torch.tensor(base.reading.std)
    white = (1 - mean) / std
    given = Surroundings(reference, args.register_factor, white)
    return settings.objective().build(base.model, settings, given).to(args.device)


def check_length(args: UniRefinerArguments) -> None:
    """Refuse a stream without an end and without a number of steps."""
    if args.max_steps <= 0 and args.max_images is None:
        raise RunError(
            "A stream does not tell how long it is: set max_images (with num_train_epochs) "
            "or max_steps."
        )


def settle_stream(total_batch: int, args: UniRefinerArguments) -> None:
    """Give a stream its number of steps; refuse what a stream has no use for."""
    unread = {
        "dataloader_drop_last": args.dataloader_drop_last,
        "dataloader_in_order": not getattr(args, "dataloader_in_order", True),
        "train_sampling_strategy": args.train_sampling_strategy != "random",
    }
    for name, given in unread.items():
        if given:
            raise RunError(
                f"{name} is {getattr(args, name)!r}, and the images are a stream, which has "
                "no end and an order of its own: leave it out."
            )
    if args.max_steps > 0:
        return
    check_length(args)
    assert args.max_images is not None
    seen = args.num_train_epochs * args.max_images
    args.max_steps = math.ceil(seen / total_batch)


def use_one_gpu(args: UniRefinerArguments) -> None:
    """One process trains on one GPU; Trainer would split its batches over all it sees."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs, of which this one process uses one: accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml uses all."
        )
        args._n_gpu = 1


def checkpoint_to_resume(
    run: Path, args: UniRefinerArguments
) -> tuple[Path | None, tuple[str, ...]]:
    """The newest whole checkpoint to go on from, None at the start of a run.

    Says which newer ones are passed over, and why; gives their names. The first process
    looks, for all.

    Raises:
        RunError: the folder holds a run that is not to go on, or what no run left.
        CheckpointError: none of its checkpoints is whole.
        HeldError: another command is at work there.
    """
    _by_first(args, check_free, run, "refine")
    if args.resume and args.push_to_hub and not named_steps(run):
        with args.main_process_first(desc="fetching the checkpoint"):
            if args.local_process_index == 0:
                fetch_last_checkpoint(str(args.hub_model_id), run, args.hub_token)
    checkpoint, passed = _by_first(args, _look_for_checkpoint, run, args.resume)
    for name, damage in passed.items():
        logger.warning(
            f"{name} is passed over: {damage}. Going on from {checkpoint.name}."
        )
    if checkpoint is None and args.resume:
        logger.warning(f"{run.name} holds no checkpoint: starting at step 0.")
    return checkpoint, tuple(passed)


def _by_first(args: UniRefinerArguments, function: Callable, *given: Any) -> Any:
    """What a function gives on the first process, on all; where it raises, all do."""
    result: Any = None
    problem: Exception | None = None
    if not args.process_index:
        try:
            result = function(*given)
        except (UniRefinerError, OSError) as error:
            problem = error
    fail_together(problem)
    return told_by_first(result)


def _look_for_checkpoint(run: Path, resume: bool) -> tuple[Path | None, dict[str, str]]:
    if not resume or not named_steps(run):
        check_not_taken(run)
        return None, {}
    checkpoint, passed = newest_whole(run)
    if checkpoint is None:
        told = "; ".join(f"{name}: {damage}" for name, damage in passed.items())
        raise CheckpointError(
            f"{run} holds no whole checkpoint to go on from ({told}). Put the files back, "
            "or start again in another output_dir."
        )
    return checkpoint, passed


def check_state(checkpoint: Path) -> None:
    """Refuse a checkpoint of the adapter alone.

    Raises:
        CheckpointError: it holds no state of schedule and optimiser.
    """
    if not any(checkpoint.glob("scheduler.*")):
        raise CheckpointError(
            f"{checkpoint} holds the adapter alone, as save_only_model asks for, and "
            "nothing to go on training from: merge it, or start again in another "
            "output_dir."
        )


def set_aside(run: Path, names: Sequence[str]) -> None:
    """Take damaged checkpoints out of the way, so that none counts as the newest."""
    for name in names:
        aside = run / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(run / name, aside)
        logger.warning(f"{name} is called {aside.name} from now on.")


def check_not_taken(run: Path) -> None:
    """Refuse a folder with anything in it that a new run would replace.

    A start that failed before its first checkpoint leaves nothing to lose.

    Raises:
        RunError: says what is there.
    """
    if not run.is_dir():
        return
    if named_steps(run) or (is_run(run) and is_trained(read_record(run))):
        raise holds_a_run(run)
    there = [name for name in RESULTS if (run / name).exists()]
    if there:
        raise RunError(
            f"{run} holds {there[0]}, which a run would replace, and no run that left it: "
            "name another output_dir, or move it away."
        )


def check_method(checkpoint: Path | None, settings: MethodSettings) -> None:
    """Refuse to continue a run by another method; adapters of two may fit one backbone."""
    method = None if checkpoint is None else recorded_method(checkpoint.parent)
    if method is not None and method != settings.name:
        raise RunError(
            f"{checkpoint} is of method {method}, and the method asked for is "
            f"{settings.name}: continue with that one, or name another output_dir."
        )


def holds_a_run(run: Path) -> RunError:
    """What to say of a folder that is taken."""
    step = last_checkpoint_step(run)
    at = f", at {checkpoint_name(step)}" if step is not None else ""
    return RunError(
        f"{run} already holds a run{at}: continue it with --resume {run} (in Python "
        f"resume={str(run)!r}), or name another output_dir."
    )


def settle_lazy_channels(
    objective: Objective, images: Any, checkpoint: Path | None
) -> list[int]:
    """Search once; a resumed run keeps what its checkpoint recorded."""
    if not objective.looks_for_lazy_channels:
        return []
    if checkpoint is not None:
        channels = read_refiner_state(checkpoint)["lazy_channels"]
    else:
        sample = sample_images(images, LAZY_IMAGES)
        if len(sample) < 2:
            logger.warning("One image is too few for the lazy-channel search: skipped.")
            return []
        found = _search_lazy_channels(objective, sample)
        channels = found.channels
        logger.info(f"Lazy channels {channels}: cosines {found.unrelated_cosine}.")
    hidden = objective.channel_mask.numel()
    mask = LazyChannels(channels, [], "").mask(hidden)
    objective.set_channel_mask(mask.to(objective.channel_mask))
    return channels


def _search_lazy_channels(objective: Objective, images: list[Tensor]) -> LazyChannels:
    """Up to 128 teacher tokens of each image, drawn by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    bank = []
    for pixels in images:
        tokens = objective.teacher_tokens(pixels.unsqueeze(0)).float().cpu()
        count = min(LAZY_TOKENS, tokens.shape[1])
        index = torch.randperm(tokens.shape[1], generator=generator)[:count]
        bank.append(gather_tokens(tokens, index.unsqueeze(0)))
    return find_lazy_channels(torch.cat(bank))
