"""What can be told wrong in a second, before a backbone is loaded."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, get_scheduler

from ..data.images import ImageError, load_rgb
from ..errors import UniRefinerError, as_users
from ..modeling.errors import MissingLibraryError
from ..outputs import check_folder
from .arguments import UniRefinerArguments
from .start import check_length

CONSTANT = {
    "constant": ("warmup_steps", "lr_scheduler_kwargs"),
    "constant_with_warmup": ("lr_scheduler_kwargs",),
}
"""Schedules -> arguments that transformers would drop without a word."""


def check_early(data: Any, args: UniRefinerArguments) -> None:
    """Refuse images, an output, an optimiser or a schedule that cannot be had.

    Raises:
        OutputError: the run's folder is a file, or cannot be written.
        ImageError: no such images, or a reference that cannot be read.
        MissingLibraryError: the optimiser's package is not installed.
        RunError: a stream without a length.
        UniRefinerError: arguments that optimiser or schedule do not take.
    """
    check_folder(str(args.output_dir))
    _check_there(data)
    if isinstance(data, datasets.IterableDataset) or args.streaming:
        check_length(args)
    if args.reference_image is not None:
        load_rgb(args.reference_image)
    _check_optimizer(args)


def _check_there(data: Any) -> None:
    if not isinstance(data, (str, Path)) or data == "starter":
        return
    path = Path(data).expanduser()
    if not path.exists() and (
        isinstance(data, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data)
    ):
        if str(data).strip():
            raise ImageError(f"{data}: there is no such folder or file.")
        raise ImageError("data is empty: name a folder or file of images, or a Hub id.")


def _check_optimizer(args: UniRefinerArguments) -> None:
    """Make optimiser and schedule of one weight, where it is torch that has the first."""
    name = getattr(args.optim, "value", args.optim)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as problem:
        raise MissingLibraryError(f"optim is {name!r}: {problem}") from problem
    except ValueError as problem:
        if args.optim_args or "install" in str(problem):
            raise UniRefinerError(f"optim is {name!r}: {problem}") from problem
        return  # it wants the model, which is not there yet
    except (KeyError, IndexError, TypeError) as problem:
        raise UniRefinerError(
            f"optim_args is {args.optim_args!r}: {problem}"
        ) from problem
    if args.optim_args:
        bare = copy.copy(args)
        bare.optim_args = None
        if Trainer.get_optimizer_cls_and_kwargs(bare) == (kind, options):
            raise UniRefinerError(
                f"optim_args is {args.optim_args!r}, and optim {name!r} reads none: leave "
                "it out."
            )
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(weights)
    if kind.__module__.startswith("torch."):
        with as_users(f"optim {name!r} with optim_args {args.optim_args!r}", Exception):
            optimizer = kind(weights, **options)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if args.final_lr_share is not None and schedule != "constant":
        raise UniRefinerError(
            f"lr_scheduler_type is {schedule!r}, which final_lr_share "
            f"({args.final_lr_share}) does not go with: it is a schedule itself."
        )
    for unread in CONSTANT.get(schedule, ()):
        if getattr(args, unread):
            raise UniRefinerError(
                f"{unread} is {getattr(args, unread)!r}, and lr_scheduler_type "
                f"{schedule!r} does not read it: take constant_with_warmup, cosine, ..., "
                "or leave it out."
            )
    with as_users(
        f"lr_scheduler_type {schedule!r} with lr_scheduler_kwargs "
        f"{args.lr_scheduler_kwargs!r}",
        Exception,
    ):
        get_scheduler(
            schedule,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
