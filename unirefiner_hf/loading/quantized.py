"""A frozen base in four or eight bits, for cards it would not fit."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from ..errors import UniRefinerError
from ..modeling.families import family_of, layers_of

BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a quantised weight with its scales (nf4: double quantisation)."""


class QuantizationError(UniRefinerError):
    """The base cannot be quantised here."""


def check_device(kind: str | None, device: torch.device) -> None:
    """Refuse what does not train there.

    Raises:
        QuantizationError: nf4 on a CPU.
    """
    if kind == "nf4" and device.type == "cpu":
        raise QuantizationError(
            "base_quantization is 'nf4', which does not train on a CPU: bitsandbytes packs "
            "the weights there for inference only. Use 'int8', or a GPU."
        )


def layer_linears(tower: PreTrainedModel) -> dict[str, nn.Linear]:
    """The Linear modules of the tower's layers: what is quantised, and adapted."""
    family = family_of(tower.config)
    return {
        f"{family.layers}.{name}": module
        for name, module in layers_of(tower, family).named_modules()
        if isinstance(module, nn.Linear)
    }


def quantization(
    kind: str, tower: PreTrainedModel, compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """The config that quantises the Linear modules of a tower's layers, and no others.

    Args:
        kind: ``"nf4"`` or ``"int8"``.
        tower: of the same config; its weights are not read.
        compute_dtype: type of the products.

    Raises:
        QuantizationError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise QuantizationError(
            f"base_quantization is {kind!r}, which needs bitsandbytes: pip install "
            '"unirefiner_hf[quantized]", or leave base_quantization unset.'
        )
    quantised = layer_linears(tower)
    skipped = [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear) and name not in quantised
    ]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )
