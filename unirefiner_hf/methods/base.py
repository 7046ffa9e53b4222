"""A backbone made ready to be trained by a method."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from ..loading.arguments import BackboneArguments
from ..loading.backbone import Backbone, Model, load_backbone
from .settings import MethodSettings


def load_trainable(
    model: Model,
    args: BackboneArguments,
    settings: MethodSettings,
    *,
    bf16: bool = False,
    processor: BaseImageProcessor | None = None,
) -> Backbone:
    """Load a backbone and add what the method trains.

    Args:
        model, args, processor: see `load_backbone`.
        bf16: the run computes in bfloat16.

    Raises:
        UniRefinerError: an argument the method does not read, or as `load_backbone`.
    """
    check_arguments(args, settings)
    objective = settings.objective()
    base = load_backbone(
        model,
        args,
        dtype=objective.base_dtype(args, bf16),
        num_register_tokens=settings.num_register_tokens,
        processor=processor,
    )
    objective.attach(base.model, settings, args, base.name)
    base.model.config.method = settings.name
    return base


def check_arguments(args: BackboneArguments, settings: MethodSettings) -> None:
    """Refuse arguments that the method does not read.

    Raises:
        UniRefinerError: names the argument and the method.
    """
    settings.check(backbone_fields(args), backbone_fields(BackboneArguments()))


def backbone_fields(args: BackboneArguments) -> dict[str, Any]:
    """The fields of `BackboneArguments` of arguments that may hold others too."""
    names = [field.name for field in dataclasses.fields(BackboneArguments)]
    return {name: getattr(args, name) for name in names}


def backbone_arguments(args: BackboneArguments, **changes: Any) -> BackboneArguments:
    """Those fields alone, some of them changed."""
    return BackboneArguments(**{**backbone_fields(args), **changes})


__all__ = [
    "backbone_arguments",
    "backbone_fields",
    "check_arguments",
    "load_trainable",
]
