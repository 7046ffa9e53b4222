"""One digest of a backbone's own weights, whatever precision they were loaded in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..modeling.modeling_unirefiner import UniRefinerModel
from .adapter import is_adapted

ADAPTERS, WRAPPED = "lora_", ".base_layer."
"""In the names of PEFT: its own tensors, and the module it wraps."""


def base_sha256(model: UniRefinerModel) -> str:
    """The sha256 of the backbone without its adapter: name, shape and value of each tensor.

    Values are rounded to bfloat16 first, so that a base in float32 and the same one in
    bfloat16 agree: training may load the one and merging the other. Of a quantised base,
    the bits it was packed in count, so that it agrees with the like alone.

    Args:
        model: before anything is trained or loaded into it.
    """
    tower = model.tower.get_base_model() if is_adapted(model) else model.tower
    digest = hashlib.sha256()
    tensors = {
        name.replace(WRAPPED, "."): value
        for name, value in tower.state_dict().items()
        if ADAPTERS not in name and isinstance(value, Tensor)
    }
    for name in sorted(tensors):
        value = tensors[name].detach()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(_raw(value))
    return digest.hexdigest()


def _raw(value: Tensor) -> Any:
    """The bytes of a tensor, of real numbers rounded to bfloat16."""
    if value.is_floating_point():
        value = value.to(torch.bfloat16)
    value = value.cpu().contiguous().reshape(-1)
    return value.view(torch.uint8).numpy().data
