"""Nested training state (optimiser, schedule, random generators) as safetensors.

Tensors are stored as tensors, everything else as JSON in the file's metadata, so that
reading a checkpoint never unpickles anything.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


def save_tree(tree: Any, path: Path) -> None:
    """Write dicts, lists, numbers, strings, None and tensors to one file.

    Tuples come back as lists.

    Raises:
        TypeError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def pack(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            if all(isinstance(key, str) for key in node):
                return {key: pack(value) for key, value in node.items()}
            return {_PAIRS: [[key, pack(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return [pack(item) for item in node]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{type(node).__name__} cannot be stored without pickle.")

    packed = json.dumps(pack(tree))
    save_file(tensors, path, metadata={"tree": packed})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote, tensors on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        packed = json.loads((file.metadata() or {})["tree"])

    def unpack(node: Any) -> Any:
        if isinstance(node, dict):
            if _TENSOR in node:
                return tensors[node[_TENSOR]]
            if _PAIRS in node:
                return {key: unpack(value) for key, value in node[_PAIRS]}
            return {key: unpack(value) for key, value in node.items()}
        if isinstance(node, list):
            return [unpack(item) for item in node]
        return node

    return unpack(packed)


def random_states() -> dict[str, Any]:
    """States of the Python, NumPy and torch generators (CPU and every GPU)."""
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the generators back; states of GPUs this machine lacks are left out."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(
        (name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached)
    )
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


def _numpy_state() -> list[Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return [
        name,
        np.asarray(keys).tolist(),
        int(position),
        int(has_gauss),
        float(cached),
    ]
