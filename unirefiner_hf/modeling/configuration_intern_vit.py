"""Configuration of InternViT (arXiv 2312.14238) as published, for transformers' own tower."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import InternVLVisionConfig

from .errors import UniRefinerError

DENSE_LAYERS = 45
"""Layers that run. InternViT-6B was trained with 48; the last three suit contrast with text
and are left out for dense use, as its authors do from InternViT-6B-448px-V1-2 on."""

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)

# Published field -> ours, and the value where a config lacks it.
_FIELDS: dict[str, tuple[str, Any]] = {
    "num_channels": ("num_channels", 3),
    "hidden_act": ("hidden_act", "gelu"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "norm_type": ("norm_type", "rms_norm"),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_factor": ("layer_scale_init_value", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}


@strict
class PublishedInternViTConfig(InternVLVisionConfig):
    """An `InternVLVisionConfig` whose weights are still to be read as published.

    It is saved, and loads again, as an `InternVLVisionConfig`.
    """

    @staticmethod
    def describes(published: dict[str, Any]) -> bool:
        """Whether a ``config.json`` is that of a published InternViT."""
        return published.get("model_type") == "intern_vit_6b"

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> PublishedInternViTConfig:
        """A published ``config.json`` for dense use: 45 layers at most.

        Raises:
            UniRefinerError: a field this tower needs is missing, an unknown norm, or one
                of queries and keys with an epsilon of its own.
        """
        missing = [field for field in _NEEDED if field not in published]
        if missing:
            raise UniRefinerError(
                f"the config of InternViT lacks {', '.join(missing)}."
            )
        kept = {field: published[field] for field in _NEEDED}
        kept["num_hidden_layers"] = min(kept["num_hidden_layers"], DENSE_LAYERS)
        for field, (ours, usual) in _FIELDS.items():
            value = published.get(field)
            kept[ours] = usual if value is None else value
        if kept["norm_type"] not in ("rms_norm", "layer_norm"):
            raise UniRefinerError(
                f"norm_type is {kept['norm_type']!r}; it must be rms_norm or layer_norm."
            )
        if kept["use_qk_norm"] and kept["layer_norm_eps"] != 1e-6:
            raise UniRefinerError(
                f"layer_norm_eps is {kept['layer_norm_eps']}; with qk_normalization it "
                "must be 1e-06, which InternVLVisionModel norms queries and keys with."
            )
        dtype = published.get("torch_dtype", published.get("dtype"))
        # Mean pooling: no last norm, as published.
        return cls(**kept, use_mean_pooling=True, dtype=dtype)


__all__ = ["PublishedInternViTConfig"]
