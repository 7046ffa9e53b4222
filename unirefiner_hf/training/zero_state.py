"""DeepSpeed's optimiser state, whole, in the form torch's own optimisers have.

ZeRO keeps parts of flattened parameters on each process, and would save them as pickles.
What is trained here is small, so its state is gathered by parameter instead: the file needs
no pickle, and any number of processes, any ZeRO stage, DDP and a single process read it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def names_by_group(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of the parameters of each group, in the order of the optimiser's numbers."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]]
        for group in optimizer.param_groups
    ]


def is_elementwise(engine: Any) -> bool:
    """Whether the state is one value a weight, in memory, so that it can be gathered.

    Not so of optimisers that pack weights in blocks (8 bit), nor where it lies on NVMe.
    """
    if getattr(engine.optimizer, "swap_optimizer", False):
        return False
    return all(
        not isinstance(value, Tensor) or value.dim() == 0 or value.shape == flat.shape
        for flat, entries in _base(engine).state.items()
        for value in entries.values()
    )


def gather_optimizer(engine: Any, groups: list[list[str]]) -> dict[str, Any]:
    """The state as ``torch.optim.Optimizer.state_dict`` has it, tensors on the CPU.

    To be called by every process.

    Args:
        groups: from `names_by_group`, taken before the engine was made.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    base = _base(engine)
    flat, entries = next(iter(base.state.items()))
    wide = [
        key
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == flat.shape
    ]
    alike = {key: value for key, value in entries.items() if key not in wide}
    parameters = dict(engine.module.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    numbered: list[list[int]] = []
    for names in groups:
        numbered.append(list(range(len(state), len(state) + len(names))))
        for number, name in zip(numbered[-1], names, strict=True):
            _link(parameters[name], base)
            whole = {
                key: safe_get_full_optimizer_state(parameters[name], key).cpu()
                for key in wide
            }
            state[number] = {**alike, **whole}
    return {
        "state": state,
        "param_groups": [
            {**_settings(group), "params": numbers}
            for group, numbers in zip(base.param_groups, numbered, strict=True)
        ],
    }


def restore_optimizer(
    engine: Any,
    groups: list[list[str]],
    tree: dict[str, Any],
    weights: dict[str, Tensor],
) -> None:
    """Put back what `gather_optimizer`, or an optimiser of torch, gave.

    Args:
        groups: from `names_by_group`, taken before the engine was made.
        tree: its groups of the same lengths as `groups`.
        weights: name -> the trained parameters, whole, float32: the engine's own copies
            are made of what it computes with, which may be bfloat16.
    """
    base, parameters = _base(engine), dict(engine.module.named_parameters())
    numbers = [number for group in tree["param_groups"] for number in group["params"]]
    names = [name for group in groups for name in group]
    states = {
        name: tree["state"].get(number, {})
        for name, number in zip(names, numbers, strict=True)
    }
    _prepare(base, _flat_parts(engine), states)
    with torch.no_grad():
        for name in names:
            entries = {
                key: value
                for key, value in states[name].items()
                if isinstance(value, Tensor) and value.dim()
            }
            _write(parameters[name], weights[name], entries, base)
    for group, saved in zip(base.param_groups, tree["param_groups"], strict=True):
        group.update(_settings(saved))


def without_empty_groups(tree: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Leave out groups without a parameter, which earlier checkpoints have and ZeRO drops.

    In place.

    Args:
        tree: state of the optimiser.
        schedule: state of the learning rate's schedule, one value a group.
    """
    groups = tree["param_groups"]
    kept = [number for number, group in enumerate(groups) if group["params"]]
    tree["param_groups"] = [groups[number] for number in kept]
    for key, values in schedule.items():
        if isinstance(values, list) and len(values) == len(groups):
            schedule[key] = [values[number] for number in kept]


def _base(engine: Any) -> Optimizer:
    """The optimiser that ZeRO runs on its flat parts."""
    return engine.optimizer.optimizer


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _flat_parts(engine: Any) -> list[Tensor]:
    """This process's flattened parts, which the state of the base optimiser belongs to."""
    parts = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    if parts is not None:
        return list(parts)
    return [part for group in _base(engine).param_groups for part in group["params"]]


def _prepare(
    base: Optimizer, parts: list[Tensor], states: dict[str, dict[str, Any]]
) -> None:
    """Give every flat part a state of zeros, which the first step would make."""
    example = next((entries for entries in states.values() if entries), {})
    own_kind = type(base).__module__.startswith("torch.")
    for part in parts:
        fresh: dict[str, Any] = {}
        for key, value in example.items():
            if isinstance(value, Tensor) and value.dim():
                fresh[key] = torch.zeros_like(part)
            elif own_kind:
                fresh[key] = torch.as_tensor(value).clone()
            else:  # optimisers of DeepSpeed count in plain numbers
                fresh[key] = value.item() if isinstance(value, Tensor) else value
                if key == "step":
                    fresh[key] = int(fresh[key])
        base.state[part].update(fresh)


def _write(
    parameter: nn.Parameter, weight: Tensor, entries: dict[str, Tensor], base: Optimizer
) -> None:
    """This process's part of a parameter's float32 copy and of its state."""
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):  # stage 3
        utils.safe_set_local_fp32_param(parameter, _part_of(parameter, weight))
        for key, value in entries.items():
            part = _part_of(parameter, value)
            utils.safe_set_local_optimizer_state(parameter, part, key)
        return
    if not _link(parameter, base):
        return
    utils.safe_set_full_fp32_param(parameter, weight)
    for key, value in entries.items():
        utils.safe_set_full_optimizer_state(parameter, value, key)


def _link(parameter: nn.Parameter, base: Optimizer) -> bool:
    """Have a parameter of ZeRO-1/2 know its part of the state; False where it has none here.

    DeepSpeed links every group after the first before the state of that group is made.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return False
    flat = next(
        part
        for part in base.param_groups[mapping.param_group_index]["params"]
        if part in base.state
    )
    mapping.set_optim_state_fragment(flat, base.state[flat])
    return True


def _part_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The part of a whole value that ZeRO-3 keeps here, its padding zero."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    part = torch.zeros(size, dtype=torch.float32)
    given = value.flatten()[rank * size : (rank + 1) * size]
    part[: given.numel()] = given
    return part
