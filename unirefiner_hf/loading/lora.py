"""The adapter a refinement trains."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..modeling.families import family_of, layers_of


def lora_targets(tower: PreTrainedModel) -> str:
    """Regular expression for every Linear in the tower's layers.

    Pooling heads are left out: patch tokens do not pass through them.
    """
    family = family_of(tower.config)
    layers = family.layers
    names = {
        name.split(".", 1)[1]
        for name, module in layers_of(tower, family).named_modules()
        if isinstance(module, nn.Linear)
    }
    inside = "|".join(re.escape(name) for name in sorted(names))
    return rf"{re.escape(layers)}\.\d+\.({inside})"


def add_adapter(
    tower: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.1,
    name: str | None = None,
) -> PeftModel:
    """Freeze a tower and wrap it with LoRA on every Linear of its layers.

    Args:
        tower: changed in place.
        name: how the adapter's config calls its base; a path is cut down to its last
            part, so that no path of this machine is written.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(tower),
    )
    with warnings.catch_warnings():  # PEFT asks by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = get_peft_model(tower, config)
    base = str(tower.name_or_path) if name is None else name
    if Path(base).is_absolute() or Path(base).exists():
        base = Path(base).name
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped
