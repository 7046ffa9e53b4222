"""Several processes: what they agree on, and what is whole on none of them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UniRefinerError

PATIENCE = 2 * 3600
"""Seconds that the others wait for one that loads or publishes."""
_MEETINGS = itertools.count()


class LaunchError(UniRefinerError):
    """The launcher started another number of processes than take part."""


class LostProcessError(UniRefinerError, RuntimeError):
    """Another process of the run is gone; the message tells how to continue."""


def announced_processes() -> int:
    """Processes the launcher says it started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(processes: int) -> None:
    """Refuse to run as independent copies.

    Args:
        processes: those that take part, as Accelerate counts them.

    Raises:
        LaunchError: the launcher started another number.
    """
    announced = announced_processes()
    if announced != processes:
        raise LaunchError(
            f"The launcher started {announced} processes, but this one takes part in a run "
            f"of {processes}: each would train alone. Start from a file in "
            "recipes/accelerate, without 'use_cpu: true' in it; for DDP on CPUs set "
            "ACCELERATE_USE_CPU=true instead."
        )


def needs_gloo() -> bool:
    """Whether several processes have nothing but CPUs to meet on."""
    return announced_processes() > 1 and not torch.cuda.is_available()


def connect_cpus(timeout: int) -> None:
    """Connect DDP's processes on CPUs, where transformers would leave `ddp_timeout` unread.

    Args:
        timeout: seconds after which a process that does not answer is lost.
    """
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    launched = on_cpus and "MASTER_ADDR" in os.environ and "RANK" in os.environ
    if needs_gloo() and launched and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def load_whole() -> None:
    """Let the next `from_pretrained` load whole weights under ZeRO-3 as well."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def is_distributed() -> bool:
    """Whether processes are connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wait_for_all() -> None:
    """Go on when every process is here.

    Raises:
        LostProcessError: one is gone.
    """
    if is_distributed():
        with _naming_the_lost():
            dist.barrier()


def wait_long_for_all() -> None:
    """Go on when every process is here, though some work alone for long before.

    Loading and publishing may take one process far longer than a step takes all: that must
    not pass for a lost one, which `ddp_timeout` finds. It asks the launcher's store in
    place of a collective, so that a store that is gone ends the wait at once.

    Raises:
        LostProcessError: one is gone, or did not come within `PATIENCE`.
    """
    if not is_distributed():
        return
    store = dist.distributed_c10d._get_default_store()
    name = f"unirefiner/meeting/{next(_MEETINGS)}"
    processes, until = dist.get_world_size(), time.monotonic() + PATIENCE
    with _naming_the_lost():
        here = int(store.add(name, 1))
        while here < processes:
            if time.monotonic() > until:
                raise LostProcessError(
                    f"{processes - here} of {processes} processes did not come within "
                    f"{PATIENCE // 3600} hours."
                )
            time.sleep(0.2)
            here = int(store.add(name, 0))
        dist.barrier()


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem, LostProcessError) or not lost_contact(problem):
            raise
        raise LostProcessError(
            "Another process of the run is gone, or the link to it: start the same command "
            "again, with --resume where there is a checkpoint. "
            f"({' '.join(str(problem).split())[:200]})"
        ) from problem


def disconnect() -> None:
    """Disconnect from the other processes; gloo aborts one that ends while connected."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def highest(value: int, device: torch.device) -> int:
    """The highest of all processes' values; to be called by every process."""
    if not is_distributed():
        return value
    shared = torch.tensor([value], device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def gather_named(names: dict[str, str]) -> dict[str, str]:
    """The union of all processes' name -> text; to be called by every process."""
    if not is_distributed():
        return dict(names)
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    return {name: text for part in gathered for name, text in part.items()}


def told_by_first(value: Any) -> Any:
    """The first process's value, on all; to be called by every process."""
    if not is_distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def fail_together(problem: Exception | None) -> None:
    """Raise the first process's error on all of them, so that none waits for the others.

    To be called by every process; the others give None.
    """
    told = told_by_first(problem if problem is None else str(problem))
    if problem is not None:
        raise problem
    if told is not None:
        raise UniRefinerError(f"Process 0 stopped: {told}")


def lost_contact(problem: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    if not is_distributed():
        return False
    words = ("gloo", "nccl", "connection closed", "connection reset", "socket")
    text = str(problem).lower()
    known = isinstance(problem, (dist.DistError, LostProcessError))
    return known or any(word in text for word in words)


def batch_seed(seed: int, position: int) -> int:
    """Seed of everything drawn for one batch: crops, strips, dropout.

    Args:
        position: of the batch in the run, counted over all processes. It belongs to the
            batch wherever that is computed, so one process and many draw alike.
    """
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
    return int(state[0])


def whole_trainable(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters of a DeepSpeed model by name, whole and in float32, on the CPU.

    They are the optimiser's own float32 copies, also where the model computes in
    bfloat16. To be called by every process.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = safe_get_full_fp32_param(parameter)
        if value is None:
            raise RuntimeError(f"DeepSpeed holds no float32 copy of {name}.")
        whole[name] = value.detach().to("cpu", torch.float32).clone()
    return whole
