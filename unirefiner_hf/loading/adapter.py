"""What is trained of a backbone: its files, and the backbone without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..modeling.errors import UniRefinerError
from ..modeling.files import check_finite, read_tensors
from ..modeling.modeling_unirefiner import UniRefinerModel
from .unlocked import UnlockedTower

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN_PARAMETERS = ("register_patch", "register_tokens")
"""Of the register model itself; each in a file of its name where there is one."""
FILES = (WEIGHTS, CONFIG, *(f"{name}.safetensors" for name in OWN_PARAMETERS))


class CheckpointError(UniRefinerError, RuntimeError):
    """A checkpoint could not be written or does not fit this run."""


def is_adapted(model: UniRefinerModel) -> bool:
    """Whether something is trained of the model's backbone."""
    return isinstance(model.tower, (PeftModel, UnlockedTower))


@contextmanager
def disable_adapter(model: UniRefinerModel) -> Iterator[None]:
    """The teacher: the bare backbone as it was before training, in the passes inside."""
    with model.without_register_tokens():
        with model.tower.disable_adapter() if is_adapted(model) else nullcontext():
            yield


def save_adapter(
    model: UniRefinerModel, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the tower's adapter as PEFT does, and what the register model learnt beside it.

    Of an unlocked tower (PH-Reg), the trained weights under the tower's own names.

    Args:
        model: the register model with a PEFT or unlocked tower.
        folder: made if missing.
        state_dict: the model's gathered weights where they are sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tower: PeftModel | UnlockedTower = model.tower
    weights = adapter_weights(
        tower, None if state_dict is None else below(state_dict, "tower.")
    )
    weights = {
        name: value.detach().cpu().contiguous() for name, value in weights.items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(tower, PeftModel):
        config = copy.copy(tower.peft_config[tower.active_adapter])
        config.inference_mode = True
        config.save_pretrained(str(folder))
    gathered = dict(model.named_parameters()) if state_dict is None else state_dict
    for name in _own_parameters(model):
        value = gathered[name].detach().cpu().contiguous()
        save_file({name: value}, folder / f"{name}.safetensors")


def load_adapter(model: UniRefinerModel, folder: Path) -> None:
    """Read an adapter, and what the register model learnt, that `save_adapter` wrote.

    Raises:
        CheckpointError: a file is missing, or the adapter belongs to another tower.
        UniRefinerError: a damaged file, or weights that are not finite.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder.name} holds no {WEIGHTS}.")
    weights = read_tensors(file)
    check_finite(
        weights.items(),
        f"The weights in {file}",
        "Go back to an earlier checkpoint of the run.",
    )
    expected = adapter_weights(model.tower)
    wrong = [
        name
        for name in sorted(weights.keys() | expected.keys())
        if name not in weights
        or name not in expected
        or weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"The adapter in {folder.name} does not fit this tower: {len(wrong)} of "
            f"{len(expected)} tensors differ in name or shape, the first is {wrong[0]}. "
            "Use the model, method and lora_rank of the run that wrote it."
        )
    own = _own_parameters(model)
    for name in own:
        if not (folder / f"{name}.safetensors").is_file():
            raise CheckpointError(f"{folder.name} holds no {name}.safetensors.")
    if isinstance(model.tower, UnlockedTower):
        model.tower.load_trained(weights)
    else:
        set_peft_model_state_dict(model.tower, weights)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in own:
            parameters[name].copy_(read_tensors(folder / f"{name}.safetensors")[name])


def adapter_weights(
    tower: PeftModel | UnlockedTower, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's weights under the names PEFT saves; no look-up of the base's files."""
    if isinstance(tower, UnlockedTower):
        if state_dict is None:
            return tower.trained()
        return {name: state_dict[f"base.{name}"] for name in tower.names}
    return get_peft_model_state_dict(
        tower, state_dict=state_dict, save_embedding_layers=False
    )


def merge_adapter(model: UniRefinerModel, dtype: torch.dtype = torch.float32) -> None:
    """Merge the tower's adapter into its weights, in float32, then cast.

    In place: afterwards `model.tower` is the plain tower, on the CPU. Weights that were
    loaded in a lower precision stay as coarse as they are.

    Raises:
        UniRefinerError: a weight does not fit the type.
    """
    model.cpu().float()
    if is_adapted(model):
        model.tower = model.tower.merge_and_unload()
    model.to(dtype)  # type: ignore[arg-type]
    check_finite(
        model.state_dict().items(),
        f"The merged weights in {str(dtype).removeprefix('torch.')}",
        "Merge into float32 (or bfloat16, which has its range).",
    )
    model.config.vision_config = model.tower.config


def below(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }


def _own_parameters(model: UniRefinerModel) -> list[str]:
    parameters = dict(model.named_parameters())
    return [name for name in OWN_PARAMETERS if name in parameters]
