"""Towers that transformers alone does not read: EVA-CLIP, and InternViT as published.

A checkpoint of another family goes without them: `remote_code.save_remote_code` puts a
file in this one's place that knows none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_eva_clip import EvaClipVisionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AutoConfig.register(EvaClipVisionConfig.model_type, EvaClipVisionConfig, exist_ok=True)

# As published, and in refined checkpoints of earlier versions, weights named as published.
_INTERN_VIT = ("intern_vit_6b", "unirefiner_intern_vit")


def published_config(published: dict[str, Any]) -> PreTrainedConfig | None:
    """The config of a tower in a published ``config.json`` that transformers cannot read.

    None for every other.

    Raises:
        UniRefinerError: a variant that is not supported.
    """
    if EvaClipVisionConfig.describes(published):
        return EvaClipVisionConfig.from_published(published)
    if published.get("model_type") in _INTERN_VIT:
        # By name: a saved checkpoint, whose imports transformers follows, needs it never.
        module = importlib.import_module(f"{__package__}.published_intern_vit")
        return module.PublishedInternViTConfig.from_published(published)
    return None


def own_models() -> dict[str, type[PreTrainedModel]]:
    """Model type -> class of this package."""
    from .modeling_eva_clip import EvaClipVisionModel

    return {EvaClipVisionConfig.model_type: EvaClipVisionModel}


__all__ = ["own_models", "published_config"]
