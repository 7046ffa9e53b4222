"""Several processes: what they agree on, and what is whole on none of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UniRefinerError


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


def load_whole() -> None:
    """Let the next `from_pretrained` load whole weights under ZeRO-3 as well."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def is_distributed() -> bool:
    """Whether processes are connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wait_for_all() -> None:
    """Go on when every process is here."""
    if is_distributed():
        dist.barrier()


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
    return isinstance(problem, dist.DistError) or any(word in text for word in words)


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
